"""One call being handled: what its handler is given, and how a handler of any kind is run."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NamedTuple

from shimcore import logger, trace
from shimcore.errors import Canceled, DeadlineExceeded, Internal, ResourceExhausted, Unknown
from shimcore.streams import serialized
from shimcore.trace import Trace
from shimcore.ttrpc.codec import Metadata, Request

if TYPE_CHECKING:
    from shimcore.ttrpc.aio.server import Connection

# Of a call on this thread, as _ttrpc has it, or of one on a loop.
logger.trace_of_call = trace.current

_END = object()
_GONE = "the caller has gone"

Handler = Callable[[Any, "Context"], Any]


class Method(NamedTuple):
    service: str
    name: str
    handler: Handler  # a coroutine function, or one that makes an asynchronous iterator where the server streams
    request_class: Any
    client_streams: bool
    server_streams: bool


class Context:
    """What a handler is told about its call besides the request; as shimcore.Context. Threads of the pool may read it."""

    def __init__(self, call: Call, metadata: Metadata) -> None:
        self._call = call
        self._metadata = metadata
        self._trace: Trace | bool | None = False  # nobody has asked yet

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return list(self._metadata)

    def get(self, key: str, default: str | None = None) -> str | None:
        """First value of a metadata key; case does not matter."""
        return next(iter(self.get_all(key)), default)

    def get_all(self, key: str) -> list[str]:
        key = key.lower()
        return [value for name, value in self._metadata if name.lower() == key]

    @property
    def trace(self) -> Trace | None:
        """The W3C trace context that the caller sent; None: it sent none, or one that can't be read."""
        if isinstance(self._trace, bool):
            self._trace = trace.of(self._metadata)
        return self._trace

    @property
    def remaining(self) -> float | None:
        """Seconds until the caller's deadline; None: it gave none."""
        return None if self._call.deadline is None else self._call.deadline - time.monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether the caller's connection has gone, or its deadline passed."""
        remaining = self.remaining
        return self._call.gone or (remaining is not None and remaining <= 0)

    @property
    def peer(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the peer (SO_PEERCRED)."""
        return self._call.connection.peer

    @property
    def service(self) -> str:
        """Full name of the service that was called."""
        return self._call.method.service

    @property
    def method(self) -> str:
        """Name of the method in it."""
        return self._call.method.name

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have callback called once, on the loop's thread, when the caller's connection ends before its call is answered; at once
        if it has. A coroutine handler is cancelled then anyway."""
        self._call.on_gone(callback)


class Call:
    def __init__(self, connection: Connection, stream_id: int, method: Method, request: Request) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.method = method
        self.deadline = None if not request.timeout_nano else time.monotonic() + request.timeout_nano / 1e9
        self.context = Context(self, request.metadata)
        self.task: asyncio.Task[None] | None = None
        self.messages: deque[bytes] = deque()
        self.ended = False  # the peer sends no more messages
        self.changed = asyncio.Event()
        self.gone = False
        self.done = False
        self._callbacks: list[Callable[[], None]] = []

    async def run(self, request: Any) -> None:
        trace.calling.set(self.context.trace)  # for this task alone, and those that it makes
        try:
            left = self.context.remaining
            async with asyncio.timeout(left) as limit:
                payload = await self._handled(request)
        except asyncio.CancelledError:
            self._fail(Canceled("cancelled"))
        except TimeoutError as error:
            self._fail(DeadlineExceeded("the caller's deadline has passed") if limit.expired() else error)
        except BaseException as error:  # SystemExit of a handler must not end the loop
            self._fail(error)
        else:
            self.connection.answer(self, payload)

    def _fail(self, error: BaseException) -> None:
        self.connection.refuse(self, error)

    async def _handled(self, request: Any) -> bytes | None:
        result = self.method.handler(request, self.context)
        if inspect.isawaitable(result):
            result = await result
        if not self.method.server_streams:
            return serialized(result, "returned")
        if not hasattr(result, "__aiter__"):
            raise Unknown(f"handler returned {type(result).__name__}, not an asynchronous iterator of messages")
        try:
            async for message in result:
                await self._send(serialized(message))
        finally:
            if hasattr(result, "aclose"):
                await result.aclose()
        return None

    async def _send(self, message: bytes) -> None:
        limit = self.connection.max_message
        if len(message) > limit:
            raise ResourceExhausted(f"message length {len(message)} exceed maximum message size of {limit}")
        await self.connection.room()
        if self.gone or self.done:
            raise Canceled(_GONE)
        self.connection.send(self, message)

    async def receive(self) -> bytes | None:
        """The peer's next message; None after the last one."""
        while not self.messages:
            if self.gone or self.done or (self.connection.eof and not self.ended):
                raise Canceled(_GONE)
            if self.ended:
                return None
            self.changed.clear()
            await self.changed.wait()
        message = self.messages.popleft()
        self.connection.took(len(message))
        return message

    def on_gone(self, callback: Callable[[], None]) -> None:
        if self.gone:
            callback()
        else:
            self._callbacks.append(callback)

    def left(self) -> None:
        """The caller has gone."""
        self.gone = True
        self.changed.set()
        for callback in self._callbacks:
            try:
                callback()
            except Exception as error:
                report = {"message": "a callback of on_cancel failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(report)
        if self.task is not None:
            self.task.cancel()


class Requests:
    """What the client sends, message by message, until it has half-closed. Raises as shimcore.streams.Requests."""

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._loop = loop

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        raw = await self._call.receive()
        if raw is None:
            raise StopAsyncIteration
        try:
            return self._call.method.request_class.FromString(raw)
        except Exception as error:
            raise Internal(f"message can't be parsed: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """On a thread of the pool."""

        async def following() -> Any:
            return await anext(self, _END)  # a StopAsyncIteration can't pass through a future

        message = asyncio.run_coroutine_threadsafe(following(), self._loop).result()
        if message is _END:
            raise StopIteration
        return message


def adapted(handler: Handler, server_streams: bool, pool: ThreadPoolExecutor) -> Handler:
    """A handler that is no coroutine, as one."""
    if inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler):
        return handler

    async def on_a_thread(function: Callable[..., Any], *args: Any) -> Any:
        inside = copy_context().run  # a thread of the pool has no context of its own
        return await asyncio.get_running_loop().run_in_executor(pool, inside, function, *args)

    async def one(request: Any, context: Context) -> Any:
        return await on_a_thread(handler, request, context)

    async def many(request: Any, context: Context) -> AsyncIterator[Any]:
        messages = await on_a_thread(handler, request, context)
        if not hasattr(messages, "__iter__"):
            raise Unknown(f"handler returned {type(messages).__name__}, not an iterator of messages")
        iterator = iter(messages)
        try:
            while (message := await on_a_thread(next, iterator, _END)) is not _END:
                yield message
        finally:
            if hasattr(iterator, "close") and not getattr(iterator, "gi_running", False):
                pool.submit(iterator.close)

    return many if server_streams else one
