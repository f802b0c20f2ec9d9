"""A synchronous, thread-safe ttrpc client: many calls at once over one unix-socket connection.

Who owns what. Callers append their frame to one queue under `_lock` and send as much as the socket takes
without blocking; the reader thread sends what is left, parses what comes in and wakes each caller through a
lock of its own. So no caller ever waits for another caller's write: its deadline covers queueing, writing and
the answer alike. A frame that has begun to go out is always finished, or every call behind it would be
garbage to the peer.

The connection ends in one place only, the reader thread: it runs the on-close callbacks, then fails every
call in flight, so a callback has run before any failed call returns.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, Self, TypeVar, overload

from shimcore.errors import Closed, DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, from_code
from shimcore.ttrpc.codec import (
    FLAG_REMOTE_CLOSED,
    MESSAGE_MAX,
    TYPE_REQUEST,
    TYPE_RESPONSE,
    DecodeError,
    Frame,
    FrameParser,
    decode_response,
    encode_frame,
    encode_request,
)

#: Metadata key that names the containerd namespace of a call.
NAMESPACE_KEY = "containerd-namespace-ttrpc"

MetadataLike = Mapping[str, str] | Iterable[tuple[str, str]]

_RECV_SIZE = 256 * 1024
_STREAM_ID_MAX = 0xFFFFFFFF
_INT64_MAX = (1 << 63) - 1


class MessageLike(Protocol):
    """A protobuf message, as far as a request needs it."""

    def SerializeToString(self) -> bytes: ...


class _Parsed(Protocol):
    def ParseFromString(self, serialized: bytes, /) -> int: ...


R = TypeVar("R", bound=_Parsed)


class _Call:
    """One call in flight. `done` is held locked until the outcome is set; the caller alone takes it."""

    __slots__ = ("done", "error", "frame", "method", "stream_id")

    def __init__(self, method: str) -> None:
        self.method = method
        self.stream_id = 0
        self.frame: Frame | None = None
        self.error: Closed | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Client:
    """One connection to a ttrpc server. Any number of threads may call at once; a context manager that closes
    it.

    address: `unix:///path`, a plain path, or `@name` (or NUL and the name) for an abstract socket.
    namespace: containerd namespace that every call carries as metadata; none when empty.
    metadata: further pairs that every call carries.
    connect_timeout: seconds for the connection to be made.
    message_max: longest answer accepted, in bytes, the envelope included.

    Raises Closed when there is nobody at the address; ENOENT and ECONNREFUSED fail at once.
    """

    def __init__(
        self,
        address: str,
        *,
        namespace: str = "",
        metadata: MetadataLike = (),
        connect_timeout: float = 10.0,
        message_max: int = MESSAGE_MAX,
    ) -> None:
        self.address = address
        self._metadata = _pairs(metadata)
        if namespace:
            self._metadata += ((NAMESPACE_KEY, namespace),)
        self._socket = _connect(address, connect_timeout)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parser = FrameParser(message_max)
        # _lock guards everything below, and every send: an fd that is closed under it can't be written to.
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._next_id = 1
        self._broken = 0  # errno of a failed send; the reader ends the connection for it
        self._closing = False
        self._closed: Closed | None = None
        self._callbacks: list[Callable[[Closed], None]] = []
        self._finished = threading.Event()
        self._reader = threading.Thread(target=self._read, name=f"ttrpc {address}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed is not None

    def peer_credentials(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the process that listened, as it was then (SO_PEERCRED, unix(7)). Raises
        Closed.
        """
        with self._lock:
            if self._closed is not None:
                raise _again(self._closed)
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = (int.from_bytes(raw[i : i + 4], sys.byteorder) for i in (0, 4, 8))
        return pid, uid, gid

    def on_close(self, callback: Callable[[Closed], None]) -> None:
        """Has `callback` called once, on the reader thread, when the connection ends; at once and here if it
        has.
        """
        with self._lock:
            if self._closed is None:
                self._callbacks.append(callback)
                return
            error = self._closed
        callback(error)

    @overload
    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike,
        response_class: type[R],
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R: ...

    @overload
    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> bytes: ...

    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: type[R] | None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R | bytes:
        """Calls and waits for the answer.

        service, method: full name of the service, and of the method in it. request: a protobuf message, or
        one already encoded. response_class: class of the answer's message; without it the answer's bytes are
        returned. timeout: seconds for everything, queueing and writing included; None and math.inf wait for
        ever. The server is told it. metadata: pairs for this call, behind the client's own; keys are sent in
        lower case.

        Raises the error of shimcore.errors for the status that the server sent; DeadlineExceeded; Closed when
        the connection ended; ResourceExhausted when either message is too long; Internal for an answer that
        does not parse.
        """
        if timeout is not None and timeout == math.inf:
            timeout = None
        deadline = None if timeout is None else time.monotonic() + timeout
        name = f"{service}/{method}"
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        nanos = 0
        if timeout is not None:
            # 0 means no deadline on the wire, and a caller's 0 does not.
            nanos = min(int(timeout * 1e9), _INT64_MAX) or -1
        try:
            data = encode_request(service, method, payload, nanos, self._metadata + _pairs(metadata))
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"{name}: {error}") from None
        call = _Call(name)
        self._submit(call, data)
        self._wait(call, deadline)
        answer = self._outcome(call)
        if response_class is None:
            return answer
        message = response_class()
        try:
            message.ParseFromString(answer)
        except Exception as error:  # protobuf's DecodeError, not imported for a client of bytes
            raise Internal(f"{name}: answer does not parse: {error}") from None
        return message

    def close(self) -> None:
        """Ends the connection and waits until callbacks have run; calls in flight fail with Closed.
        Idempotent.
        """
        with self._lock:
            self._closing = True
            self._kick()
        self._settle()

    # ---- a caller's side -----------------------------------------------------------------------------------

    def _submit(self, call: _Call, data: bytes) -> None:
        with self._lock:
            closed = self._closed
            if closed is None:
                if self._next_id > _STREAM_ID_MAX:
                    raise ResourceExhausted("no stream id is left on this connection")
                # The id is taken under the lock that orders the queue: ids must rise on the wire.
                try:
                    frame = encode_frame(self._next_id, TYPE_REQUEST, FLAG_REMOTE_CLOSED, data)
                except ValueError as error:
                    raise ResourceExhausted(f"{call.method}: {error}") from None
                call.stream_id = self._next_id
                self._next_id += 2
                self._calls[call.stream_id] = call
                self._queue.append((call.stream_id, memoryview(frame)))
                if len(self._queue) == 1:
                    self._flush()
                    if self._queue:
                        self._kick()
        if closed is not None:
            self._settle()
            raise _again(closed, call.method)

    def _wait(self, call: _Call, deadline: float | None) -> None:
        if deadline is None:
            call.done.acquire()
            return
        left = deadline - time.monotonic()
        if left > 0 and call.done.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            return
        with self._lock:
            # One that had no time to begin with has failed, however quick the peer was.
            if left > 0 and call.done.acquire(blocking=False):
                return
            self._calls.pop(call.stream_id, None)
            # The head may have gone out in part; only what lies behind it can be taken back.
            for index in range(1, len(self._queue)):
                if self._queue[index][0] == call.stream_id:
                    del self._queue[index]
                    break
        raise DeadlineExceeded(f"{call.method}: no answer from {self.address} in time")

    def _outcome(self, call: _Call) -> bytes:
        if call.error is not None:
            raise call.error
        frame = call.frame
        assert frame is not None
        if frame.oversize:
            raise ResourceExhausted(f"{call.method}: answer of {frame.oversize} bytes is too long")
        if frame.type != TYPE_RESPONSE:
            raise Internal(f"{call.method}: a frame of type {frame.type} came where a response was due")
        try:
            response = decode_response(frame.data)
        except DecodeError as error:
            raise Internal(f"{call.method}: answer does not parse: {error}") from None
        if response.code:
            raise from_code(response.code, response.message)
        return response.payload

    def _settle(self) -> None:
        # A callback that calls or closes runs on the reader itself, which would wait for itself.
        if threading.current_thread() is not self._reader:
            self._finished.wait()

    # ---- both sides, under _lock ---------------------------------------------------------------------------

    def _kick(self) -> None:
        if self._closed is None:
            os.eventfd_write(self._wake, 1)

    def _flush(self) -> None:
        """Sends what the socket takes. A failure is left for the reader, which first reads what the peer
        still said.
        """
        while self._queue and not self._broken:
            stream_id, data = self._queue[0]
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                self._broken = error.errno or errno.EIO
                self._queue.clear()
                self._kick()
                return
            if sent < len(data):
                self._queue[0] = (stream_id, data[sent:])
            else:
                self._queue.popleft()

    # ---- the reader thread ---------------------------------------------------------------------------------

    def _read(self) -> None:
        number = 0
        try:
            number = self._loop()
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            self._end(number)

    def _loop(self) -> int:
        """Runs until the connection ends; errno of why, 0 for an orderly end."""
        poll = select.poll()
        fd = self._socket.fileno()
        poll.register(self._wake, select.POLLIN)
        poll.register(fd, select.POLLIN)
        buffer = memoryview(bytearray(_RECV_SIZE))
        while True:
            events = dict(poll.poll())
            if self._wake in events:
                os.eventfd_read(self._wake)
            with self._lock:
                if self._closing:
                    return 0
                self._flush()
                broken = self._broken
                poll.modify(fd, select.POLLIN | (select.POLLOUT if self._queue else 0))
            while fd in events or broken:
                try:
                    count = self._socket.recv_into(buffer)
                except BlockingIOError:
                    if broken:
                        return broken
                    break
                if not count:
                    return broken
                self._deliver(buffer[:count])
                if count < len(buffer) and not broken:
                    break

    def _deliver(self, data: memoryview) -> None:
        for frame in self._parser.feed(data):
            with self._lock:
                # Nobody waits for a late answer, a second one, or one that was never asked for.
                call = self._calls.pop(frame.stream_id, None)
                if call is not None:
                    call.frame = frame
                    call.done.release()

    def _end(self, number: int) -> None:
        reason = os.strerror(number) if number else ("closed here" if self._closing else "closed by the peer")
        with self._lock:
            closed = Closed(f"connection to {self.address}: {reason}", peer=self.address, errno=number)
            self._closed = closed
            self._socket.close()
            os.close(self._wake)
            self._queue.clear()
            calls, self._calls = self._calls, {}
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(closed)
            except Exception:
                # One bad callback must not keep the other callbacks and the callers waiting.
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._reader)))
        with self._lock:
            for call in calls.values():
                call.error = _again(closed, call.method, call.stream_id)
                call.done.release()
        self._finished.set()


def _pairs(metadata: MetadataLike) -> tuple[tuple[str, str], ...]:
    items = metadata.items() if isinstance(metadata, Mapping) else metadata
    return tuple((key.lower(), value) for key, value in items)


def _again(closed: Closed, method: str = "", stream_id: int = 0) -> Closed:
    """A fresh copy: one exception object raised in many threads would mix their tracebacks."""
    text = f"{method}: {closed}" if method else str(closed)
    return Closed(text, peer=closed.peer, errno=closed.errno, method=method, stream_id=stream_id)


def _connect(address: str, timeout: float) -> socket.socket:
    name = address.removeprefix("unix://")
    if name.startswith("@"):
        name = "\0" + name[1:]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(name)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        # A path that is too long has no errno.
        number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EINVAL
        raise Closed(f"connect to {address}: {error.strerror or error}", peer=address, errno=number) from None
    return sock
