"""The server: a protocol object for each connection and a task for each call, all on the loop's thread.

A coroutine handler is awaited; a plain one runs on a thread of a pool, or, marked with shimcore.inline, on the loop's own. The
rules of the wire are those of the compiled server (core/read.c, request.c, stream.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from shimcore._frames import FrameParser, decode_request, encode_frame, encode_response
from shimcore.address import remove_socket, start_listener
from shimcore.errors import Internal, InvalidArgument, ResourceExhausted, ShimError, Unavailable, Unimplemented, from_exception
from shimcore.ttrpc.aio.calls import Call, Context, Handler, Method, Requests, adapted
from shimcore.ttrpc.codec import (
    FLAG_NO_DATA,
    FLAG_REMOTE_CLOSED,
    MESSAGE_MAX,
    TYPE_DATA,
    TYPE_REQUEST,
    TYPE_RESPONSE,
    DecodeError,
    Frame,
)
from shimcore.ttrpc.connection import credentials
from shimcore.ttrpc.names import handlers

Interceptor = Callable[[Any, Context, Handler], Any]

_MESSAGE_COST = 64  # bytes that a message of a stream counts besides its own
_TEXT_MAX = 4096
_NAME_MAX = 256
_ACCEPT_AGAIN = 0.1  # seconds


class Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.max_message = server.max_message
        self.eof = False
        self.fd = -1
        self.peer = (0, 0, 0)
        self._server = server
        self._parser = FrameParser(server.max_message)
        self._calls: dict[int, Call] = {}
        self._last_id = 0
        self._unread = 0
        self._stalled = self._full = self._paused = False
        self._room = asyncio.Event()
        self._room.set()

    # ---- the protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(self._server.max_unsent, self._server.max_unsent // 2)
        sock = transport.get_extra_info("socket")
        self.fd = sock.fileno()
        self.peer = credentials(sock)
        if self._server.check_peer and self.peer[1:] != (os.geteuid(), os.getegid()):
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            if self.transport.is_closing():
                return
            try:
                self._frame(frame)
            except ShimError as error:
                self._respond(frame.stream_id, b"", error)

    def eof_received(self) -> bool:
        self.eof = True
        for call in self._calls.values():
            call.changed.set()
        if self._calls:  # its answers go out first, unless it has gone altogether
            self._server.watch(self)
        return bool(self._calls)

    def pause_writing(self) -> None:
        self._full = True
        self._room.clear()
        self._read_or_not()

    def resume_writing(self) -> None:
        self._full = False
        self._room.set()
        self._read_or_not()

    def connection_lost(self, error: Exception | None) -> None:
        self._room.set()
        for call in list(self._calls.values()):
            call.left()
        self._server.lost(self)  # before the transport closes its socket

    # ---- frames ----

    def _frame(self, frame: Frame) -> None:
        if frame.oversize:
            if frame.oversize >> 24:
                self.transport.close()
            raise ResourceExhausted(f"message length {frame.oversize} exceed maximum message size of {self.max_message}")
        if not frame.stream_id & 1:
            raise InvalidArgument("StreamID must be odd for client initiated streams")
        if frame.type == TYPE_REQUEST:
            self._request(frame)
        elif frame.type == TYPE_DATA:
            self._data(frame)

    def _request(self, frame: Frame) -> None:
        if frame.stream_id <= self._last_id:
            raise InvalidArgument("StreamID cannot be re-used and must increment")
        self._last_id = frame.stream_id
        try:
            request = decode_request(frame.data)
        except DecodeError as error:
            raise InvalidArgument(str(error)) from None
        if self._server.draining:
            raise Unavailable("server is shutting down")
        if len(self._calls) >= self._server.max_inflight:
            raise ResourceExhausted("too many requests in flight")
        method = self._server.find(request.service, request.method)
        call = Call(self, frame.stream_id, method, request)
        argument: Any
        if method.client_streams:
            argument = Requests(call, self._server.loop)
            if request.payload and not frame.flags & FLAG_NO_DATA:
                self._push(call, request.payload)
            call.ended = bool(frame.flags & FLAG_REMOTE_CLOSED)
        else:
            try:
                argument = method.request_class.FromString(request.payload)
            except Exception as error:
                raise Internal(f"request can't be parsed: {error}") from None
        self._calls[frame.stream_id] = call
        self._server.counts["calls"] += 1
        call.task = self._server.loop.create_task(call.run(argument))

    def _data(self, frame: Frame) -> None:
        call = self._calls.get(frame.stream_id)
        if call is None:
            raise InvalidArgument("StreamID is no longer active")
        if not call.method.client_streams:  # its request was all that counts
            return
        closes = bool(frame.flags & FLAG_REMOTE_CLOSED)
        if not frame.flags & FLAG_NO_DATA and (frame.data or not closes):
            if call.ended:
                self.refuse(call, InvalidArgument("data handling error: the stream was closed by its sender"))
                if call.task is not None:
                    call.task.cancel()
                return
            self._push(call, frame.data)
        call.ended = call.ended or closes
        call.changed.set()

    def _push(self, call: Call, message: bytes) -> None:
        call.messages.append(message)
        self._unread += len(message) + _MESSAGE_COST
        self._read_or_not()

    def _read_or_not(self) -> None:
        limit = self._server.max_unread
        self._stalled = self._unread > (limit // 2 if self._stalled else limit)
        pause = self._full or self._stalled
        if pause != self._paused and not self.eof and not self.transport.is_closing():
            self._paused = pause
            if pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # ---- for calls ----

    def took(self, count: int) -> None:
        self._unread -= count + _MESSAGE_COST
        self._read_or_not()

    async def room(self) -> None:
        await self._room.wait()

    def send(self, call: Call, message: bytes) -> None:
        self.transport.write(encode_frame(call.stream_id, TYPE_DATA, 0, message))

    def answer(self, call: Call, payload: bytes | None) -> None:
        """payload: of the answer; None where the server has streamed it all."""
        if self._over(call):
            if payload is None:
                self.transport.write(encode_frame(call.stream_id, TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b""))
            else:
                self._respond(call.stream_id, payload)
            self._end_if_half_closed()

    def refuse(self, call: Call, error: BaseException) -> None:
        if self._over(call):
            self._respond(call.stream_id, b"", error)
            self._end_if_half_closed()

    def _over(self, call: Call) -> bool:
        """Takes a call off the list; whether an answer is still due."""
        if call.done:
            return False
        call.done = True
        self._calls.pop(call.stream_id, None)
        while call.messages:
            self.took(len(call.messages.popleft()))
        self._server.settled()
        return not call.gone

    def _end_if_half_closed(self) -> None:
        if self.eof and not self._calls:
            self.transport.close()

    def _respond(self, stream_id: int, payload: bytes, error: BaseException | None = None) -> None:
        data = encode_response(payload)
        if len(data) > self.max_message:
            error = ResourceExhausted(f"message length {len(data)} exceed maximum message size of {self.max_message}")
        if error is not None:
            self._server.counts["failures"] += 1
            code, text = from_exception(error)
            data = encode_response(b"", code, text[:_TEXT_MAX])
        self.transport.write(encode_frame(stream_id, TYPE_RESPONSE, 0, data))

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def cancel(self) -> None:
        """What is in flight is not answered any more."""
        for call in list(self._calls.values()):
            call.left()


class Server:
    """A ttrpc server on the running loop; an asynchronous context manager that shuts it down.

    The options are those of shimcore.ttrpc.Server. workers: threads for handlers that are no coroutines. An interceptor is called
    as interceptor(request, context, handler) and returns what handler(request, context) returns: an awaitable or, where the
    server streams, an asynchronous iterator.
    """

    def __init__(
        self,
        *,
        max_message: int = MESSAGE_MAX,
        max_inflight: int = 65536,
        max_connections: int = 4096,
        max_unsent: int = 8 << 20,
        max_unread: int = 8 << 20,
        workers: int = 16,
        check_peer: bool = True,
        interceptors: Iterable[Interceptor] = (),
    ) -> None:
        if max_message > MESSAGE_MAX:  # what core/frame.c writes
            raise ValueError(f"max_message {max_message} is more than ttrpc's {MESSAGE_MAX}")
        self.max_message = max_message
        self.max_inflight = max_inflight
        self.max_unsent = max_unsent
        self.max_unread = max_unread
        self.check_peer = check_peer
        self.draining = False
        self.counts = {"calls": 0, "failures": 0}
        self._max_connections = max_connections
        self._interceptors = tuple(interceptors)
        self._services: dict[str, dict[str, Method]] = {}
        self._pool = ThreadPoolExecutor(workers, "ttrpc")
        self._listeners: dict[str, socket.socket] = {}
        self._connections: set[Connection] = set()
        # They have shut their sending side; the loop does not tell when they close the other one too (EPOLLHUP, epoll_ctl(2)).
        self._half_closed: dict[int, Connection] = {}
        self._hang_ups: select.epoll | None = None
        self._accepting: set[asyncio.Task[Any]] = set()
        self._paused = False
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()

    def register(self, service: ServiceDescriptor, implementation: object) -> None:
        """Serve a service; as shimcore.ttrpc.Server.register, but that coroutines and what they await are asyncio's."""
        methods = {}
        for method, handler in handlers(service, implementation):
            streams = method.client_streaming or method.server_streaming
            if getattr(handler, "shimcore_inline", False):
                if streams:
                    raise ValueError(f"{service.full_name}/{method.name}: a method that streams can't be inline")
            else:
                handler = adapted(handler, method.server_streaming, self._pool)
            for interceptor in reversed(self._interceptors):
                handler = _around(interceptor, handler)
            request_class = GetMessageClass(method.input_type)
            methods[method.name] = Method(
                service.full_name, method.name, handler, request_class, method.client_streaming, method.server_streaming
            )
        self._services[service.full_name] = methods

    async def listen(self, address: str) -> None:
        """Listen at an address, and serve from now on; as shimcore.ttrpc.Server.listen."""
        address = address if address.startswith("unix://") else f"unix://{address}"
        listener = socket.socket(fileno=start_listener(address))
        listener.setblocking(False)
        if self._hang_ups is None:
            self._hang_ups = select.epoll()
            self.loop.add_reader(self._hang_ups, self._hung_up)
        self._listeners[address] = listener
        self.loop.add_reader(listener, self._accept, listener)

    async def serve(self) -> None:
        """Wait until shutdown() has ended."""
        await self._ended.wait()

    async def shutdown(self, timeout: float = 5.0) -> None:
        """End it: no new connection and no new call; calls in flight are answered, for at most timeout seconds; then they are
        cancelled and every connection is closed. Idempotent."""
        until = self.loop.time() + timeout
        self.draining = True
        for address, listener in self._listeners.items():
            self.loop.remove_reader(listener)
            remove_socket(address)
            listener.close()
        self._listeners.clear()
        await self._quiet(until, lambda: not self._accepting and not any(one.in_flight for one in self._connections))
        for connection in self._connections:
            connection.cancel()
            connection.transport.close()  # once what was written is sent
        await self._quiet(until, lambda: not self._connections)
        for connection in list(self._connections):
            connection.transport.abort()
        await self._quiet(None, lambda: not self._connections)
        if self._hang_ups is not None:
            self.loop.remove_reader(self._hang_ups)
            self._hang_ups.close()
            self._hang_ups = None
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ended.set()

    def stats(self) -> dict[str, int]:
        """connections and in_flight (calls) now; calls and failures (answers with an error) so far."""
        in_flight = sum(one.in_flight for one in self._connections)
        return {"connections": len(self._connections), "in_flight": in_flight, **self.counts}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def _quiet(self, until: float | None, holds: Callable[[], bool]) -> None:
        """Wait until it holds, or until that time of the loop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not holds():
                    self._settled.clear()
                    await self._settled.wait()

    # ---- for connections ----

    def find(self, service: str, method: str) -> Method:
        methods = self._services.get(service)
        if methods is None:
            raise Unimplemented(f"service {service[:_NAME_MAX]}")
        if method not in methods:
            raise Unimplemented(f"method {method[:_NAME_MAX]}")
        return methods[method]

    def settled(self) -> None:
        self._settled.set()

    def watch(self, connection: Connection) -> None:
        assert self._hang_ups is not None
        self._half_closed[connection.fd] = connection
        self._hang_ups.register(connection.fd, 0)

    def _hung_up(self) -> None:
        assert self._hang_ups is not None
        for fd, _ in self._hang_ups.poll(0):
            self._hang_ups.unregister(fd)
            self._half_closed.pop(fd).transport.abort()

    def lost(self, connection: Connection) -> None:
        if self._half_closed.pop(connection.fd, None) and self._hang_ups is not None:
            self._hang_ups.unregister(connection.fd)
        self._connections.discard(connection)
        self._settled.set()
        self._resume()

    # ---- accepting ----

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            if len(self._connections) >= self._max_connections:
                self._pause()
                return
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._pause()
                self.loop.call_later(_ACCEPT_AGAIN, self._resume)
                return
            accepted.setblocking(False)
            connection = Connection(self)
            self._connections.add(connection)
            task = self.loop.create_task(self._made(connection, accepted))
            self._accepting.add(task)
            task.add_done_callback(self._accepted)

    async def _made(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: connection, accepted)
        except BaseException:
            self._connections.discard(connection)
            accepted.close()
            raise

    def _accepted(self, task: asyncio.Task[Any]) -> None:
        self._accepting.discard(task)
        self._settled.set()

    def _pause(self) -> None:
        self._paused = True
        for listener in self._listeners.values():
            self.loop.remove_reader(listener)

    def _resume(self) -> None:
        if self._paused and len(self._connections) < self._max_connections:
            self._paused = False
            for listener in self._listeners.values():
                self.loop.add_reader(listener, self._accept, listener)


def _around(interceptor: Interceptor, handler: Handler) -> Handler:
    return lambda request, context: interceptor(request, context, handler)
