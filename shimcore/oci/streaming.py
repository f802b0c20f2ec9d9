"""stdio by containerd's streaming API: `ttrpc+unix://SOCKET?streaming_id=ID` (containerd 2, CRI's io_type = "streaming").

SOCKET is our own: containerd calls us. For each of a process's streams it makes a connection, calls Streaming/Stream, sends the
id (StreamInit), and waits for an answer; then, mostly, it tells us of the process, by Create or Exec, with the same id. What
follows is Any messages: WindowUpdate from who reads says how many bytes more it takes, Data carries them. containerd reads stdout
and stderr, and writes stdin. After its restart it calls again with the same ids.

So the process has pipes, whose other ends are ours and are carried by the relay's thread: output is read from its pipe as far as
the window goes and no further, so what we hold is bounded, and a client that has gone leaves a full pipe, as with a FIFO. What is
known of an id is its call, its pipe (Output, Input), or both: whichever comes first waits for the other. A call that is younger
takes the place of an older one.

Fields are under the relay's lock. Calls are handled on the RPC thread; only Context.send is called on others. Imported when
somebody asks for a stream.
"""

from __future__ import annotations

import os
from select import EPOLLIN, EPOLLOUT

from .. import logger, wire
from .._ttrpc import READABLE, WRITABLE
from ..address import listening_path
from ..daemon import SOCKET_FD
from ..errors import AlreadyExists, Canceled, InvalidArgument, ResourceExhausted
from ..jobs import Op
from .binlog import query
from .relay import Carried, the_relay
from .stdio import Stream, unread_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .._reaper import Core
    from .._ttrpc import Context
    from ..jobs import Task

INIT = "containerd.services.streaming.v1.StreamInit"
DATA = "containerd.types.transfer.Data"
WINDOW_UPDATE = "containerd.types.transfer.WindowUpdate"

PIECE = 32768  # bytes of a message, as containerd sends them
WINDOW = 65536  # bytes of stdin that are held for a process that does not read
CLOSE_GRACE = 1.0  # seconds from CloseIO to the end of stdin, unless its stream ends before


ACK = wire.Raw(wire.any("type.googleapis.com/google.protobuf.Empty", b""))


def _content(raw: bytes) -> tuple[str, dict[int, int | bytes]]:
    """The name of an Any's message, and its fields. Raises InvalidArgument."""
    try:
        packed = dict(wire.fields(raw))
        url, value = packed.get(1, b""), packed.get(2, b"")
        if not isinstance(url, bytes) or not isinstance(value, bytes):
            raise ValueError("not an Any")
        return url.decode().rpartition("/")[2], dict(wire.fields(value))
    except ValueError as error:
        raise InvalidArgument(f"message of a stream: {error}") from None


class Call(Op):
    """One call of Stream. Awaited on the RPC thread, until there is a message or it is to end."""

    __slots__ = ("_task", "acked", "context", "core", "joined", "over")

    def __init__(self, core: Core, context: Context) -> None:
        self.core = core
        self.context = context
        self._task: Task | None = None
        self.acked = False  # the client has been told that it can go on
        self.joined = True  # there is who takes its messages; else they wait
        self.over = False

    def begin(self, task: Task) -> bool:
        self._task = task
        if self.over or (self.joined and self.context.want(READABLE, self._resume)):
            self._task = None
            return True
        return False

    def _resume(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.step()

    async def next(self) -> bytes:
        """The client's next message; b"" when the call is over, or the client has half-closed. Raises Canceled."""
        while not self.over:
            raw = self.context.receive(False) if self.joined else False
            if raw is not False:
                return raw or b""
            await self
        return b""

    def join(self) -> None:
        self.joined = True
        self.core.post(self._resume)

    def finish(self) -> None:
        """Answer it, behind what has been sent. On any thread."""
        self.over = True
        self.core.post(self._resume)


class Pump(Carried):
    """Our end of a pipe, and the call, if there is one, that it is carried for."""

    __slots__ = ("_asked", "call", "fd", "relay")

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.relay = the_relay()
        self.fd = fd
        self.call: Call | None = None
        self._asked = False  # the client is to be written to again when it has read

    def push(self) -> None:
        """Do what can be done now."""
        raise NotImplementedError

    def attach(self, call: Call) -> None:
        self.call = call
        self._asked = False
        self.push()

    def detach(self, call: Call) -> None:
        if self.call is call:
            self.call = None
            self._rearm()

    def message(self, kind: str, fields: dict[int, int | bytes]) -> None:
        """Of the client's. Raises ShimError, which ends the call."""

    def half_closed(self) -> None:
        """The client sends no more."""

    def give_up(self) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            self.relay.disarm(self)
            fd, self.fd = self.fd, -1
            os.close(fd)
        if self.call is not None:
            self.call.finish()
            self.call = None

    def _rearm(self) -> None:
        if self.fd >= 0:
            self.relay.arm(self)

    def _send(self, kind: str, value: bytes) -> bool:
        """Whether it is on its way. If not, the client has gone, or has too much to read already: when it has read, push() is
        called."""
        call = self.call
        if call is None or self._asked:
            return False
        try:
            if call.context.send(wire.any(kind, value), False):
                return True
        except Canceled:
            self.call = None
            return False
        self._asked = True
        call.core.post(lambda: self._ask(call))
        return False

    def _ask(self, call: Call) -> None:
        """On the RPC thread."""

        def again() -> None:
            with self.relay.lock:
                if self.call is call:
                    self._asked = False
                    self.push()

        if call.context.want(WRITABLE, again):
            again()


class Output(Pump):
    """What a process writes, on its way to the client."""

    __slots__ = ("_held", "given", "over", "window")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._held = b""  # taken from the pipe, and not sent
        self.window = 0  # bytes that the client takes
        self.given = 0  # bytes that clients were sent
        self.over = False  # every writer has gone, and all was sent

    def wanted(self) -> dict[int, int]:
        ready = self.call is not None and self.window > 0 and not self._held and not self._asked and not self.over
        return {self.fd: EPOLLIN} if ready else {}

    def ready(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, min(self.window, PIECE))
        except (BlockingIOError, InterruptedError):
            return
        if data:
            self._held = data
            self._hand_on()
            return
        self.over = True
        if self.call is not None:
            self.call.finish()

    def attach(self, call: Call) -> None:
        self.window = 0
        super().attach(call)
        if self.over or self.fd < 0:
            call.finish()

    def message(self, kind: str, fields: dict[int, int | bytes]) -> None:
        update = fields.get(1, 0)
        if kind != WINDOW_UPDATE or not isinstance(update, int):
            return
        if wire.signed(update) < 0 or self.window + update >= 1 << 31:
            raise InvalidArgument(f"window update of {wire.signed(update)}")
        self.window += update
        self.push()

    def half_closed(self) -> None:
        """It reads no more."""
        if self.call is not None:
            self.call.finish()
            self.call = None
        self._rearm()

    def push(self) -> None:
        self._hand_on()
        self._rearm()

    def _hand_on(self) -> None:
        while self._held and self.window > 0:
            piece = self._held[: min(self.window, PIECE)]
            if not self._send(DATA, wire.string(1, piece)):
                return
            self._held = self._held[len(piece) :]
            self.window -= len(piece)
            self.given += len(piece)

    def unread(self) -> int:
        return len(self._held) + (unread_bytes(self.fd) if self.fd >= 0 else 0)

    def take(self, size: int) -> bytes:
        """The oldest bytes, in the place of a client. Raises BlockingIOError."""
        data, self._held = self._held, b""
        if not data and self.fd >= 0:
            data = os.read(self.fd, size)
        self._rearm()
        return data

    def close(self) -> None:
        if self.fd >= 0 and (left := self.unread()):
            logger.warn("output of a stream was not taken", bytes=left)
        self._held = b""
        super().close()


class Input(Pump):
    """What the client writes, on its way to a process."""

    __slots__ = ("_data", "_granted", "ended")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._data = b""
        self._granted = 0  # bytes that the client may send
        self.ended = False  # no more is to come

    def wanted(self) -> dict[int, int]:
        return {self.fd: EPOLLOUT} if self._data else {}

    def ready(self, fd: int, events: int) -> None:
        try:
            self._data = self._data[os.write(fd, self._data) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # EPIPE: the process reads no more, nor need the client write
            self.close()
            return
        self._grant()

    def attach(self, call: Call) -> None:
        self._granted = 0
        super().attach(call)
        if self.ended or self.fd < 0:
            call.finish()

    def message(self, kind: str, fields: dict[int, int | bytes]) -> None:
        data = fields.get(1, b"")
        if kind != DATA or not isinstance(data, bytes) or self.fd < 0:
            return
        if len(data) > self._granted:
            raise ResourceExhausted(f"{len(data)} bytes of stdin where {self._granted} may be sent")
        self._granted -= len(data)
        self._data += data
        self.push()

    def half_closed(self) -> None:
        self.end()

    def end(self) -> None:
        """The process sees the end of the file behind what is held."""
        self.ended = True
        self.push()

    def step(self) -> None:
        """CLOSE_GRACE has passed."""
        with self.relay.lock:
            self.end()

    def push(self) -> None:
        if self._data and self.fd >= 0:
            self.ready(self.fd, EPOLLOUT)
        self._grant()
        self._rearm()

    def _grant(self) -> None:
        if self.ended:
            if not self._data:
                self.close()
            return
        more = WINDOW - len(self._data) - self._granted
        if self.fd >= 0 and more >= WINDOW // 2 and self._send(WINDOW_UPDATE, wire.integer(1, more)):
            self._granted += more

    def close(self) -> None:
        self._data = b""
        super().close()


class _End:
    """What is known of one id."""

    __slots__ = ("call", "pump")

    def __init__(self) -> None:
        self.call: Call | None = None
        self.pump: Pump | None = None


class _Given:
    """In the place of inotify's watch on a FIFO's readers: whether a client was sent anything since it was asked last."""

    __slots__ = ("_before", "_output")

    def __init__(self, output: Output) -> None:
        self._output = output
        self._before = output.given

    def somebody(self) -> bool:
        before, self._before = self._before, self._output.given
        return self._before != before

    def close(self) -> None:
        pass


class OutputStream(Stream):
    """Like a FIFO's, but its reader is the relay."""

    __slots__ = ("_output", "_release")

    carried = streamed = True

    def __init__(self, name: str, output: Output, write_fd: int, streams: Streams, id: str) -> None:
        super().__init__(name, -1, write_fd)
        self._output = output
        self._release = (streams, id)

    def unread(self) -> bool:
        with self._output.relay.lock:
            return self._output.unread() > 0

    def process_ended(self) -> bool:
        """The pipe keeps what was written; a client sees the end behind it."""
        fd, self.write_fd = self.write_fd, -1
        os.close(fd)
        return True

    def drained(self) -> bool:
        with self._output.relay.lock:
            return self._output.call is None or self._output.over

    def quiet(self) -> bool:
        return self.drained() or not self.unread()

    def watch(self) -> _Given:
        return _Given(self._output)

    def take(self, size: int) -> bytes:
        with self._output.relay.lock:
            return self._output.take(size)

    def close(self) -> None:
        if self.write_fd >= 0:
            self.process_ended()
        streams, id = self._release
        streams.release(id, self._output)


class InputStream:
    """stdin of a process."""

    __slots__ = ("_id", "_input", "_streams")

    streamed = True

    def __init__(self, input: Input, streams: Streams, id: str) -> None:
        self._input = input
        self._streams = streams
        self._id = id

    def close_soon(self) -> None:
        """CloseIO, which comes on another connection than what was written before it: that counts, too. On the RPC thread."""
        with self._input.relay.lock:
            if self._input.call is None:
                self._input.end()
            else:
                self._streams.core.timer(CLOSE_GRACE, self._input)

    def close(self) -> None:
        self._streams.release(self._id, self._input)


class Streams:
    """The streams of a shim's processes, by their ids: the service and what open_stdio needs.

    path: of the socket that we serve on; None: SOCKET_FD's."""

    def __init__(self, core: Core, path: str | None = None) -> None:
        self.core = core
        self._path = path
        self._ends: dict[str, _End] = {}
        self._lock = the_relay().lock

    # --- the processes' side, for the pool

    def check(self, uri: str) -> str:
        """The id in a URI. Raises InvalidArgument: there is none, or the socket is another than ours."""
        path, _, text = uri.partition("://")[2].partition("?")
        id = dict(query(text)).get("streaming_id", "")
        if not id:
            raise InvalidArgument(f"stdio has no streaming_id: {uri!r}")
        if self._path is None:
            self._path = _own_path()
        if not _same(path, self._path):
            raise InvalidArgument(f"stdio is a stream of the socket {path}, and this shim serves on {self._path or 'none'}")
        return id

    def open_output(self, uri: str, name: str, owner: tuple[int, int]) -> OutputStream:
        """A new pipe, whose write end is the process's. Raises InvalidArgument, AlreadyExists, OSError."""
        id = self.check(uri)
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_fd, False)
        output = Output(read_fd)
        try:
            if owner != (0, 0):
                os.fchown(write_fd, *owner)
            self._enter(id, output)
        except BaseException:
            os.close(read_fd)
            os.close(write_fd)
            raise
        return OutputStream(name, output, write_fd, self, id)

    def open_input(self, uri: str) -> tuple[int, InputStream]:
        """The read end of a new pipe, which is the process's, and what writes to it. Raises as open_output does."""
        id = self.check(uri)
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(write_fd, False)
        input = Input(write_fd)
        try:
            self._enter(id, input)
        except BaseException:
            os.close(read_fd)
            os.close(write_fd)
            raise
        return read_fd, InputStream(input, self, id)

    def _enter(self, id: str, pump: Pump) -> None:
        with self._lock:
            end = self._ends.setdefault(id, _End())
            if end.pump is not None:
                raise AlreadyExists(f"stream {id} is another process's")
            end.pump = pump
            if end.call is not None and end.call.acked:
                self._join(pump, end.call)

    def release(self, id: str, pump: Pump) -> None:
        """The process is deleted. Idempotent."""
        with self._lock:
            end = self._ends.get(id)
            if end is not None and end.pump is pump:
                del self._ends[id]
            pump.close()

    def _join(self, pump: Pump, call: Call) -> None:
        pump.attach(call)
        call.join()

    # --- the client's side, on the RPC thread

    async def stream(self, requests: object, context: Context) -> AsyncIterator[wire.Raw]:
        """Streaming/Stream."""
        call = Call(self.core, context)
        kind, fields = _content(await call.next())
        name = fields.get(1)
        if kind != INIT or not isinstance(name, bytes):
            raise InvalidArgument("the first message of a stream is a StreamInit with an id")
        id = name.decode("utf-8", "replace")
        with self._lock:
            end = self._ends.setdefault(id, _End())
            if end.call is not None:
                end.call.finish()
            end.call = call
        call.joined = False
        context.on_cancel(call.finish)
        try:
            yield ACK
            with self._lock:
                call.acked = True
                if end.pump is not None and end.call is call:
                    self._join(end.pump, call)
            while raw := await call.next():
                kind, fields = _content(raw)
                with self._lock:
                    if end.pump is not None and end.call is call:
                        end.pump.message(kind, fields)
            if not call.over:
                with self._lock:
                    if end.pump is not None and end.call is call:
                        end.pump.half_closed()
        finally:
            self._leave(id, end, call)

    def _leave(self, id: str, end: _End, call: Call) -> None:
        with self._lock:
            if end.call is call:
                end.call = None
                if end.pump is not None:
                    end.pump.detach(call)
                elif self._ends.get(id) is end:
                    del self._ends[id]


def _own_path() -> str:
    """Of the socket that this daemon was started with, "" when there is none."""
    try:
        return listening_path(SOCKET_FD)
    except OSError:
        return ""


def _same(path: str, own: str) -> bool:
    try:
        return path == own or os.path.samefile(path, own)
    except OSError:
        return False
