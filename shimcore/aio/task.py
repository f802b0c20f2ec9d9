"""The Task whose coroutines are asyncio's.

The server knows one kind of coroutine, that of shimcore.jobs. So it is given one for each method of an author's, which awaits one
Call: that takes the author's coroutine to the loop and brings its end back.
"""

from __future__ import annotations

from .. import task
from .._ttrpc import COROUTINE
from ..errors import FailedPrecondition, Unavailable
from ..task import kind_of
from .loop import Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from .._reaper import Slot
    from .._ttrpc import Context
    from .loop import Loop

    F = TypeVar("F", bound=Callable[..., Any])

# Half of one of these is worse than all of it when nobody waits any more: a process that was made and belongs to no container; a
# container that is neither there nor deleted.
SHIELDED = frozenset({"start", "kill", "delete", "shutdown"})

_HOOKS = frozenset({"on_pid", "on_signal"})


def shielded(method: F) -> F:
    """Mark a coroutine that goes on to its end when its caller has gone, or its caller's deadline has passed."""
    method.__dict__["shimcore_shielded"] = True
    return method


class Task(task.Task):
    """As shimcore.Task; what is written as `async def` is a coroutine of asyncio, on the loop of the shimcore.aio.Shim that has
    made it.

    A method that is a plain `def` runs as it does there: on the pool, or with `@inline` where it was read. A coroutine is
    cancelled when its caller's connection ends before it has answered, or its caller's deadline passes, which answers
    DeadlineExceeded; `start`, `kill`, `delete`, `shutdown` and what is marked @shielded go on to their end.

    teardown, on_exit, on_pid and on_signal may be coroutines too. They have no caller. Those of on_exit run one after the other
    for each container, in the order of its exits; so do all of on_pid, and all of on_signal.
    """

    _loop: Loop | None = None  # set by the Shim

    def _served(self, name: str) -> Any:
        loop = self._running()
        method = getattr(self, name, None)
        if name == "on_exit":
            return _exits(loop, method)
        if method is None or kind_of(method) != COROUTINE:
            return method
        if name in _HOOKS:
            return lambda *args: _unless_ended(loop.in_order, name, lambda: method(*args))
        if name == "teardown":

            async def tear_down(slot: Slot) -> None:
                await Call(loop, lambda: method(slot), None)

            return tear_down
        carried = name in SHIELDED or getattr(method, "shimcore_shielded", False)

        async def serve(request: Any, context: Context) -> Any:
            return await Call(loop, lambda: method(request, context), context, carried)

        return serve

    def _running(self) -> Loop:
        if self._loop is None:
            raise FailedPrecondition(f"{type(self).__name__} is a Task of shimcore.aio, and so its shim has to be a Shim of it")
        return self._loop


def _exits(loop: Loop, hook: Any) -> Callable[[Slot], None]:
    later = kind_of(hook) == COROUTINE

    def told(slot: Slot) -> None:
        if slot in loop.waiting:
            _unless_ended(loop.call, loop.told, slot)
        if later:
            _unless_ended(loop.in_order, f"exit {slot.container_id}", lambda: hook(slot))
        else:
            hook(slot)

    return told


def _unless_ended(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Unavailable:  # the loop has ended, and with it the shim is about to
        pass
