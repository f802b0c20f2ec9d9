"""One connection of a synchronous ttrpc client; no caller of it ever waits for another caller's write.

Who owns what. Callers append their frame to one queue under `lock` and send as much as the socket takes without blocking; the
reader thread sends what is left, parses what comes in and hands each frame to the exchange of its stream id. So a deadline covers
queueing, writing and the answer alike. A frame that has begun to go out is always finished, or every call behind it would be
garbage to the peer.

Bounds. Messages of streams that nobody has received count as unread; past `max_unread` bytes the socket is left unread, and the
peer is held up, until half of them have been taken: ttrpc has no window for each stream. A stream's sender waits while more than
`max_unsent` bytes are queued.

It ends in one place only, the reader thread: it runs the on-close callbacks, then fails every exchange under way, so a callback
has run before any failed call returns.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shimcore._frames import FrameParser, encode_frame
from shimcore.errors import Closed, ResourceExhausted
from shimcore.ttrpc.codec import TYPE_DATA, TYPE_REQUEST, Frame

_RECV_SIZE = 256 * 1024
STREAM_ID_MAX = 0xFFFFFFFF


class Exchange(Protocol):
    """What a stream id stands for. `take` and `fail` are called under the connection's lock."""

    method: str
    stream_id: int

    def take(self, frame: Frame) -> bool:
        """One frame of the peer's; True: no more can follow."""

    def fail(self, error: Closed) -> None:
        """The connection has ended."""


class Connection:
    """See above. Raises Closed when there is nobody at the address; ENOENT and ECONNREFUSED fail at once."""

    def __init__(self, address: str, connect_timeout: float, message_max: int, max_unread: int, max_unsent: int) -> None:
        self.address = address
        self._socket = _connect(address, connect_timeout)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parser = FrameParser(message_max)
        self._max_unread = max_unread
        self._max_unsent = max_unsent
        # It guards everything below, and every send: an fd that is closed under it can't be written to.
        self.lock = threading.Lock()
        self.room = threading.Condition(self.lock)
        self.closed: Closed | None = None
        self._under_way: dict[int, Exchange] = {}
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._unsent = 0
        self._unread = 0
        self._paused = False
        self._next_id = 1
        self._broken = 0  # errno of a failed send; the reader ends the connection for it
        self._closing = False
        self._callbacks: list[Callable[[Closed], None]] = []
        self._finished = threading.Event()
        self._reader = threading.Thread(target=self._read, name=f"ttrpc {address}", daemon=True)
        self._reader.start()

    def peer_credentials(self) -> tuple[int, int, int]:
        with self.lock:
            if self.closed is not None:
                raise again(self.closed)
            return credentials(self._socket)

    def on_close(self, callback: Callable[[Closed], None]) -> None:
        with self.lock:
            if self.closed is None:
                self._callbacks.append(callback)
                return
            error = self.closed
        callback(error)

    def close(self) -> None:
        with self.lock:
            self._closing = True
            self._kick()
        self.settle()

    def settle(self) -> None:
        """Wait until the callbacks have run, the connection having ended."""
        # A callback that calls or closes runs on the reader itself, which would wait for itself.
        if threading.current_thread() is not self._reader:
            self._finished.wait()

    # ---- a caller's side -----------------------------------------------------------------------------------

    def open(self, exchange: Exchange, flags: int, data: bytes) -> None:
        """Send a Request under a new stream id. Raises Closed, with stream id 0: nothing has been sent; ResourceExhausted."""
        with self.lock:
            closed = self.closed
            if closed is None:
                if self._next_id > STREAM_ID_MAX:
                    raise ResourceExhausted("no stream id is left on this connection")
                # The id is taken under the lock that orders the queue: ids must rise on the wire.
                self._push(exchange.method, self._next_id, TYPE_REQUEST, flags, data)
                exchange.stream_id = self._next_id
                self._under_way[exchange.stream_id] = exchange
                self._next_id += 2
        if closed is not None:
            self.settle()
            raise again(closed, exchange.method)

    def send(self, exchange: Exchange, flags: int, data: bytes) -> None:
        """Send a Data frame; under the lock."""
        if self.closed is None:
            self._push(exchange.method, exchange.stream_id, TYPE_DATA, flags, data)

    def full(self) -> bool:
        """Whether a stream's next message must wait for `room`; under the lock."""
        return self._unsent > self._max_unsent and self.closed is None

    def took(self, count: int) -> None:
        """Bytes of a stream's messages were received by their caller; under the lock."""
        self._unread -= count
        if self._paused and self._unread <= self._max_unread // 2:
            self._kick()

    def came(self, count: int) -> None:
        """Bytes of a stream's messages wait for their caller; under the lock."""
        self._unread += count

    def forget(self, exchange: Exchange) -> None:
        """Nobody waits for what is still to come; what has not begun to go out stays here. Under the lock."""
        self._under_way.pop(exchange.stream_id, None)
        # The head may have gone out in part; only what lies behind it can be taken back.
        for index in range(len(self._queue) - 1, 0, -1):
            if self._queue[index][0] == exchange.stream_id:
                self._unsent -= len(self._queue[index][1])
                del self._queue[index]
        self.room.notify_all()

    # ---- both sides, under the lock ------------------------------------------------------------------------

    def _push(self, method: str, stream_id: int, type: int, flags: int, data: bytes) -> None:
        try:
            frame = encode_frame(stream_id, type, flags, data)
        except ValueError as error:
            raise ResourceExhausted(f"{method}: {error}") from None
        self._queue.append((stream_id, memoryview(frame)))
        self._unsent += len(frame)
        if len(self._queue) == 1:
            self._flush()
            if self._queue:
                self._kick()

    def _kick(self) -> None:
        if self.closed is None:
            os.eventfd_write(self._wake, 1)

    def _flush(self) -> None:
        """Sends what the socket takes. A failure is left for the reader, which first reads what the peer still said."""
        was_full = self.full()
        while self._queue and not self._broken:
            stream_id, data = self._queue[0]
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError as error:
                self._broken = error.errno or errno.EIO
                self._queue.clear()
                self._unsent = 0
                self._kick()
                break
            self._unsent -= sent
            if sent < len(data):
                self._queue[0] = (stream_id, data[sent:])
            else:
                self._queue.popleft()
        if was_full and not self.full():
            self.room.notify_all()

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
            with self.lock:
                if self._closing:
                    return 0
                self._flush()
                broken = self._broken
                if self._paused and self._unread <= self._max_unread // 2:
                    self._paused = False
                wanted = (0 if self._paused else select.POLLIN) | (select.POLLOUT if self._queue else 0)
                if wanted:
                    poll.register(fd, wanted)
                elif fd in events or self._paused:
                    # Not even for a hang-up, which poll reports unasked and for ever.
                    _unregister(poll, fd)
            while (fd in events and not self._paused) or broken:
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
            with self.lock:
                # Nobody waits for a late answer, a second one, or one that was never asked for.
                exchange = self._under_way.get(frame.stream_id)
                if exchange is not None and exchange.take(frame):
                    del self._under_way[frame.stream_id]
                if self._unread > self._max_unread and not self._paused:
                    self._paused = True
                    self._kick()

    def _end(self, number: int) -> None:
        reason = os.strerror(number) if number else ("closed here" if self._closing else "closed by the peer")
        with self.lock:
            closed = Closed(f"connection to {self.address}: {reason}", peer=self.address, errno=number)
            self.closed = closed
            self._socket.close()
            os.close(self._wake)
            self._queue.clear()
            under_way, self._under_way = self._under_way, {}
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(closed)
            except Exception:
                # One bad callback must not keep the other callbacks and the callers waiting.
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._reader)))
        with self.lock:
            for exchange in under_way.values():
                exchange.fail(again(closed, exchange.method, exchange.stream_id))
            self.room.notify_all()
        self._finished.set()


def again(closed: Closed, method: str = "", stream_id: int = 0) -> Closed:
    """A fresh copy: one exception object raised in many threads would mix their tracebacks."""
    text = f"{method}: {closed}" if method else str(closed)
    return Closed(text, peer=closed.peer, errno=closed.errno, method=method, stream_id=stream_id)


def _unregister(poll: select.poll, fd: int) -> None:
    try:
        poll.unregister(fd)
    except KeyError:
        pass


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of a unix socket's peer."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = (int.from_bytes(raw[i : i + 4], sys.byteorder) for i in (0, 4, 8))
    return pid, uid, gid


def socket_name(address: str) -> str:
    """The name to connect a unix socket to."""
    name = address.removeprefix("unix://")
    return "\0" + name[1:] if name.startswith("@") else name


def _connect(address: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(socket_name(address))
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        # A path that is too long has no errno.
        number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EINVAL
        raise Closed(f"connect to {address}: {error.strerror or error}", peer=address, errno=number) from None
    return sock
