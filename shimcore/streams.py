"""Handlers of methods that stream, for shimcore._ttrpc; imported with the first of them.

A handler that blocks gets an iterator where its client streams and returns one where it streams itself; one written as a
coroutine gets an async iterator, and is an async generator where it streams itself.
"""

from __future__ import annotations

from ._ttrpc import CLIENT_STREAM, COROUTINE, READABLE, SERVER_STREAM, WRITABLE
from .errors import DeadlineExceeded, Internal, Unknown
from .jobs import Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import Any

    from ._ttrpc import Context
    from .jobs import Task


_LATE = "the caller's deadline has passed"


class _Alarm:
    """Stepped by the timer of a call's deadline. Nothing can stop a timer, so what it holds of the call is let go of before."""

    __slots__ = ("ready",)

    def __init__(self, ready: _Ready) -> None:
        self.ready: _Ready | None = ready

    def step(self) -> None:
        if self.ready is not None:
            self.ready.resume(DeadlineExceeded(_LATE))


class _Ready(Op):
    """One direction of a call: awaited until a message can be received, or sent, by one coroutine at a time.

    Raises DeadlineExceeded when the call's deadline comes first."""

    __slots__ = ("_alarm", "_call", "_events", "_task")

    def __init__(self, call: Context, events: int) -> None:
        self._call = call
        self._events = events
        self._task: Task | None = None
        self._alarm: _Alarm | None = None

    def begin(self, task: Task) -> bool:
        left = self._call.remaining
        if left is not None and left <= 0:
            raise DeadlineExceeded(_LATE)
        self._task = task
        if self._call.want(self._events, self.resume):
            self._task = None
            return True
        if left is not None and self._alarm is None:
            self._alarm = _Alarm(self)
            task.core.timer(left, self._alarm)
        return False

    def resume(self, error: BaseException | None = None) -> None:
        task, self._task = self._task, None
        if task is not None:
            box = [error]
            del error  # this frame may be in its traceback (see Task.step)
            task.step(None, box.pop())

    def over(self) -> None:
        if self._alarm is not None:
            self._alarm.ready = None


class Requests:
    """What the client sends, message by message, until it has half-closed. Iterate over it with `for` in a handler that may
    block, with `async for` in a coroutine.

    Raises Canceled when the caller has gone, DeadlineExceeded when its deadline has passed, Internal for a message that does not
    parse."""

    __slots__ = ("_call", "_parse", "_ready")

    def __init__(self, call: Context, parse: Callable[[bytes], Any]) -> None:
        self._call = call
        self._parse = parse
        self._ready = _Ready(call, READABLE)

    def _parsed(self, raw: bytes) -> Any:
        try:
            return self._parse(raw)
        except Exception as error:
            raise Internal(f"message can't be parsed: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raw = self._call.receive(True)
        if not isinstance(raw, bytes):  # waited for: None
            raise StopIteration
        return self._parsed(raw)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while (raw := self._call.receive(False)) is False:
            await self._ready
        if raw is None:
            raise StopAsyncIteration
        return self._parsed(raw)

    def over(self) -> None:
        """The call has been handled."""
        self._ready.over()


def serialized(message: Any, did: str = "sent") -> bytes:
    """A handler's message; did: what it has done with it."""
    try:
        raw = message.SerializeToString()
        if isinstance(raw, bytes):
            return raw
        error: Exception = TypeError("its SerializeToString returns no bytes")
    except Exception as exc:
        error = exc
    raise Unknown(f"handler {did} {type(message).__name__}, not a message: {error}")


def _blocking(handler: Callable[[Any, Context], Any], request: Any, call: Context) -> None:
    messages = handler(request, call)
    if not hasattr(messages, "__iter__"):
        raise Unknown(f"handler returned {type(messages).__name__}, not an iterator of messages")
    try:
        for message in messages:
            call.send(serialized(message), True)
    finally:
        if hasattr(messages, "close"):
            messages.close()


async def _awaiting(handler: Callable[[Any, Context], Any], request: Any, call: Context) -> None:
    messages = handler(request, call)
    if not hasattr(messages, "__aiter__"):
        raise Unknown(f"handler returned {type(messages).__name__}, not an async iterator of messages")
    ready = _Ready(call, WRITABLE)
    try:
        async for message in messages:
            raw = serialized(message)
            while not call.send(raw, False):
                await ready
    finally:
        ready.over()
        if hasattr(messages, "aclose"):
            await messages.aclose()


def adapted(
    kind: int, handler: Callable[[Any, Context], Any], parse: Callable[[bytes], Any], streams: int
) -> Callable[[Any, Context], Any]:
    """The handler as the server calls it, like one that does not stream; kind: POOL or COROUTINE."""

    def blocking(request: Any, context: Context) -> Any:
        if streams & CLIENT_STREAM:
            request = Requests(context, parse)
        return _blocking(handler, request, context) if streams & SERVER_STREAM else handler(request, context)

    async def awaiting(request: Any, context: Context) -> Any:
        if not streams & CLIENT_STREAM:
            return await _awaiting(handler, request, context)
        requests = Requests(context, parse)
        try:
            return await (_awaiting(handler, requests, context) if streams & SERVER_STREAM else handler(requests, context))
        finally:
            requests.over()

    return awaiting if kind == COROUTINE else blocking
