"""The client: one connection, whose protocol object hands each frame to the call of its stream id.

All of it runs on the loop's thread. What is written goes to the transport, unless that is full: then whoever sends waits, so a
deadline covers queueing, writing and the answer alike. Messages of streams that nobody has received count as unread; past
`max_unread` bytes the socket is left unread, and the peer is held up, until half of them have been taken.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Self, TypeVar, cast, overload

from shimcore._frames import FrameParser, encode_frame
from shimcore.errors import Canceled, Closed, ResourceExhausted, ShimError
from shimcore.ttrpc.calls import MessageLike, StreamState, UnderWay, serialized
from shimcore.ttrpc.client import NAMESPACE_KEY, Interceptor, MetadataLike, Outgoing, Parsed, intercepted, pairs
from shimcore.ttrpc.codec import (
    FLAG_NO_DATA,
    FLAG_REMOTE_CLOSED,
    MESSAGE_MAX,
    TYPE_DATA,
    TYPE_REQUEST,
    Frame,
)
from shimcore.ttrpc.connection import STREAM_ID_MAX, again, credentials, socket_name

T = TypeVar("T")
R = TypeVar("R", bound=Parsed)


class _Connection(asyncio.Protocol):
    def __init__(self, address: str, message_max: int, max_unread: int, max_unsent: int) -> None:
        self.address = address
        self.closed: Closed | None = None
        self.under_way: dict[int, _Call | Stream[Any]] = {}
        self.callbacks: list[Callable[[Closed], None]] = []
        self.ended = asyncio.Event()
        self._parser = FrameParser(message_max)
        self._max_unread = max_unread
        self._max_unsent = max_unsent
        self._next_id = 1
        self._unread = 0
        self._paused = False
        self._closing = False
        self._room = asyncio.Event()
        self._room.set()

    # ---- the protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(self._max_unsent, self._max_unsent // 2)

    def data_received(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            # Nobody waits for a late answer, a second one, or one that was never asked for.
            call = self.under_way.get(frame.stream_id)
            if call is not None and call.take(frame):
                self.under_way.pop(frame.stream_id, None)
        if self._unread > self._max_unread and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def connection_lost(self, error: Exception | None) -> None:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number else ("closed here" if self._closing else "closed by the peer")
        closed = Closed(f"connection to {self.address}: {reason}", peer=self.address, errno=number)
        self.closed = closed
        for callback in self.callbacks:
            try:
                callback(closed)
            except Exception as wrong:
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "an on-close callback failed", "exception": wrong})
        for call in self.under_way.values():
            call.fail(again(closed, call.method, call.stream_id))
        self.under_way.clear()
        self._room.set()
        self.ended.set()

    # ---- for calls ----

    async def room(self) -> None:
        await self._room.wait()

    def open(self, call: _Call | Stream[Any], flags: int, data: bytes) -> None:
        if self.closed is not None or self.transport.is_closing():
            raise again(self.closed or Closed(f"connection to {self.address}: closed", peer=self.address), call.method)
        if self._next_id > STREAM_ID_MAX:
            raise ResourceExhausted("no stream id is left on this connection")
        self._write(call.method, self._next_id, TYPE_REQUEST, flags, data)
        call.stream_id = self._next_id
        self.under_way[call.stream_id] = call
        self._next_id += 2

    def send(self, call: Stream[Any], flags: int, data: bytes) -> None:
        if self.closed is None:
            self._write(call.method, call.stream_id, TYPE_DATA, flags, data)

    def _write(self, method: str, stream_id: int, type: int, flags: int, data: bytes) -> None:
        try:
            frame = encode_frame(stream_id, type, flags, data)
        except ValueError as error:
            raise ResourceExhausted(f"{method}: {error}") from None
        self.transport.write(frame)

    def forget(self, call: _Call | Stream[Any]) -> None:
        self.under_way.pop(call.stream_id, None)

    def came(self, count: int) -> None:
        self._unread += count

    def took(self, count: int) -> None:
        self._unread -= count
        if self._paused and self._unread <= self._max_unread // 2:
            self._paused = False
            if self.closed is None:
                self.transport.resume_reading()

    async def close(self) -> None:
        self._closing = True
        self.transport.abort()
        await self.ended.wait()


class _Call(UnderWay[Any]):
    def __init__(self, address: str, method: str, response_class: Any, deadline: float | None) -> None:
        super().__init__(address, method, response_class, deadline)
        self.outcome: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()

    def take(self, frame: Frame) -> bool:
        if not self.outcome.done():
            self.outcome.set_result(frame)
        return True

    def fail(self, error: Closed) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    async def made(self, connection: _Connection, flags: int, data: bytes) -> Any:
        async def wait() -> Frame:
            await connection.room()
            connection.open(self, flags, data)
            return await self.outcome

        try:
            frame = await within(self, wait())
        finally:
            connection.forget(self)
        return self._parsed(self._response(frame).payload)


async def within(call: UnderWay[Any], wait: Coroutine[Any, Any, T]) -> T:
    """What `wait` returns, if that is before the call's deadline. Raises DeadlineExceeded."""
    left = call.left()
    if left is None:
        return await wait
    if left <= 0:
        wait.close()
        raise call.late()
    try:
        async with asyncio.timeout(left) as limit:
            return await wait
    except TimeoutError:
        if not limit.expired():
            raise
        raise call.late() from None


class Stream(StreamState[T]):
    """A call with messages, of which either side may send many. An asynchronous context manager, which cancels what is not over.
    To iterate over it is to receive until the end.

    The one answer of a method whose server does not stream is received like a message, and is the last one.
    """

    _connection: _Connection

    def __init__(self, connection: _Connection, method: str, response_class: Any, deadline: float | None, **sides: bool) -> None:
        super().__init__(connection, method, response_class, deadline, **sides)
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    async def send(self, message: bytes | MessageLike) -> None:
        """Send one message; waits while the connection has more unsent than its max_unsent. Raises as shimcore.ttrpc.Stream's."""
        raw = serialized(message)
        self._may_send()
        await self._in_time(self._connection.room())
        self._may_send()
        self._connection.send(self, 0, raw)

    async def close_send(self) -> None:
        """Tell the server that nothing more comes. Idempotent."""
        if self._sends and not self._over:
            self._connection.send(self, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b"")
        self._sends = False

    async def receive(self) -> T | None:
        """Wait for the next message; None after the last one. Raises as shimcore.ttrpc.Stream.receive."""
        while not self._messages and not self._over:
            self._news.clear()
            await self._in_time(self._news.wait())
        raw = self._next()
        return None if raw is None else self._parsed(raw)

    def cancel(self) -> bool:
        """Give it up: receive() and send() raise Canceled. False: it was over already; messages that came are dropped all the
        same."""
        given_up = self._give_up(Canceled(f"{self.method}: cancelled here"))
        self._drop()
        return given_up

    async def _in_time(self, wait: Coroutine[Any, Any, Any]) -> None:
        try:
            await within(self, wait)
        except ShimError as error:
            if self._give_up(error):
                self._drop()

    def _changed(self) -> None:
        self._news.set()


class Client:
    """One connection to a ttrpc server, for one event loop; an asynchronous context manager that connects and closes it.

    The options are those of shimcore.ttrpc.Client, without `reconnect`. An interceptor is a plain function, called as
    interceptor(outgoing, proceed); what proceed(outgoing) returns is awaitable for call(), and the Stream for stream().
    """

    def __init__(
        self,
        address: str,
        *,
        namespace: str = "",
        metadata: MetadataLike = (),
        connect_timeout: float = 10.0,
        message_max: int = MESSAGE_MAX,
        interceptors: Iterable[Interceptor] = (),
        max_unread: int = 8 << 20,
        max_unsent: int = 1 << 20,
    ) -> None:
        self.address = address
        self._metadata = pairs(metadata)
        if namespace:
            self._metadata.append((NAMESPACE_KEY, namespace))
        self._connect_timeout = connect_timeout
        self._limits = message_max, max_unread, max_unsent
        self._interceptors = tuple(interceptors)
        self._made: _Connection | None = None

    async def connect(self) -> None:
        """Make the connection. Raises Closed when there is nobody at the address."""
        connection = _Connection(self.address, *self._limits)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_unix_connection(lambda: connection, socket_name(self.address))
        except OSError as error:
            number = getattr(error, "errno", 0) or 0
            text = f"connect to {self.address}: {error.strerror or error or 'timed out'}"
            raise Closed(text, peer=self.address, errno=number) from None
        self._made = connection

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def _connection(self) -> _Connection:
        if self._made is None:
            raise Closed(f"connection to {self.address}: not made yet", peer=self.address)
        return self._made

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._connection.closed is not None

    def peer_credentials(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the process that listened, as it was then (SO_PEERCRED, unix(7)). Raises Closed."""
        if self._connection.closed is not None:
            raise again(self._connection.closed)
        return credentials(self._connection.transport.get_extra_info("socket"))

    def on_close(self, callback: Callable[[Closed], None]) -> None:
        """Has `callback` called once, before any call fails of it, when the connection ends; at once if it has."""
        if self._connection.closed is not None:
            callback(self._connection.closed)
        else:
            self._connection.callbacks.append(callback)

    @overload
    async def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike,
        response_class: type[R],
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R: ...

    @overload
    async def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> bytes: ...

    async def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: Any = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Any:
        """As shimcore.ttrpc.Client.call. A task that is cancelled meanwhile gives the call up; its late answer is dropped."""

        def proceed(outgoing: Outgoing) -> Any:
            connection, data = self._connection, outgoing.encode()
            call = _Call(self.address, outgoing.name, outgoing.response_class, outgoing.deadline())
            return call.made(connection, FLAG_REMOTE_CLOSED, data)

        outgoing = Outgoing(service, method, request, response_class, timeout, self._metadata + pairs(metadata))
        return await intercepted(self._interceptors, proceed, outgoing)

    @overload
    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None,
        response_class: type[R],
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[R]: ...

    @overload
    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None = None,
        response_class: None = None,
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[bytes]: ...

    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None = None,
        response_class: Any = None,
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[Any]:
        """As shimcore.ttrpc.Client.stream; does not wait."""

        def proceed(outgoing: Outgoing) -> Stream[Any]:
            connection, data = self._connection, outgoing.encode()
            sides = {"client_streams": client_streams, "server_streams": server_streams}
            stream = Stream[Any](connection, outgoing.name, outgoing.response_class, outgoing.deadline(), **sides)
            connection.open(stream, outgoing.flags(client_streams), data)
            return stream

        outgoing = Outgoing(service, method, request, response_class, timeout, self._metadata + pairs(metadata))
        stream: Stream[Any] = intercepted(self._interceptors, proceed, outgoing)
        return stream

    async def close(self) -> None:
        """Ends the connection; calls in flight fail with Closed. Idempotent."""
        if self._made is not None:
            await self._made.close()
