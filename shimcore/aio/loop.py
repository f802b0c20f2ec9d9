"""The thread that runs a daemon's asyncio loop, and the way to it and back.

Three threads meet here. The RPC thread begins calls, and is told of their ends by core.post. The loop's thread runs all that is
an author's coroutine. The thread that `serve` works on makes the loop and ends it. What goes to the loop goes by `call`, in
order; no thread waits for another but in `run` and `end`.
"""

from __future__ import annotations

from _contextvars import copy_context
from _thread import _local
from time import monotonic

from .. import logger
from .._reaper import ExitSignal
from ..daemon import start_thread
from ..debug import report
from ..errors import Canceled, DeadlineExceeded, Unavailable
from ..jobs import Op
from ..trace import calling, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections import deque
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeVar

    from .._reaper import Core, Slot
    from .._ttrpc import Context
    from ..errors import ShimError
    from ..jobs import Task as Waiter

    T = TypeVar("T")
    Make = Callable[[], Coroutine[Any, Any, Any]]
    Take = Callable[[float | None], None]

_here = _local()


def here() -> Loop:
    """The loop of the thread that asks. Raises RuntimeError on any other thread."""
    loop: Loop | None = getattr(_here, "loop", None)
    if loop is None:
        raise RuntimeError("this is for coroutines of a shimcore.aio shim, on its loop")
    return loop


def _failed(_: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
    """What asyncio would hand to logging: nobody has awaited a task that failed, or a callback has."""
    error = what.get("exception")
    if isinstance(error, BaseException):
        report(error, f"asyncio: {what['message']}")
    else:
        logger.error("asyncio", message=what["message"])


class Loop:
    """One asyncio loop and its thread, which starts with it."""

    def __init__(self, core: Core) -> None:
        import asyncio

        logger.trace_of_call = current  # of a call on the loop too
        self.core = core
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_failed)
        self.waiting: dict[Slot, list[asyncio.Future[None]]] = {}  # for exits; see process.exited
        self._queues: dict[str, tuple[deque[Make], asyncio.Task[None]]] = {}
        self._put_in = 0  # what in_order was given so far; counted by its callers' thread
        self._worked_off = 0  # counted by the loop's
        self._ending: asyncio.Task[None] | None = None
        self._stopped = False
        self._ended = ExitSignal()
        start_thread(self._body)

    def _body(self) -> None:
        import asyncio

        _here.loop = self
        asyncio.set_event_loop(self.loop)
        while not self._stopped:
            try:
                self.loop.run_forever()
            except BaseException as error:  # SystemExit, of a coroutine that has been given it, must not end the thread
                logger.error("a coroutine has left the loop", error=repr(error))
        self.loop.close()
        self._ended.signal()
        self.core.post(bool)  # who ends it may wait for notes

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called on the loop, from any thread. Raises Unavailable once it is closed."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            raise Unavailable("the shim is about to end") from None

    def run(self, coroutine: Coroutine[Any, Any, T], take: Take | None = None) -> T:
        """Run a coroutine to its end, from a thread that may wait for it. take: handles the core's notes, which ends of jobs and
        exits are, where no RPC thread does."""
        from asyncio import run_coroutine_threadsafe

        future = run_coroutine_threadsafe(coroutine, self.loop)
        if take is not None:
            future.add_done_callback(lambda _: self.core.post(bool))  # a note, as notes are waited for
            while not future.done():
                take(None)
        return future.result()

    def in_order(self, key: str, make: Make) -> None:
        """Run a coroutine after those that were put under the same key before it, from the thread that takes the core's notes. An
        error of it is logged."""
        self.call(self._put, key, make)
        self._put_in += 1

    @property
    def in_order_ended(self) -> bool:
        """Nothing that was put in is left to be done."""
        return self._put_in == self._worked_off

    def _put(self, key: str, make: Make) -> None:
        from collections import deque

        if key not in self._queues:
            queue: deque[Make] = deque()
            self._queues[key] = queue, self.loop.create_task(self._work_off(key, queue))
        self._queues[key][0].append(make)

    async def _work_off(self, key: str, queue: deque[Make]) -> None:
        from asyncio import current_task

        me = current_task()
        assert me is not None
        try:
            while queue:
                try:
                    await queue.popleft()()
                except BaseException as error:
                    if me.cancelling():  # the loop ends
                        raise
                    report(error, "a hook")
                finally:
                    self._worked_off += 1
        finally:
            del self._queues[key]

    def told(self, slot: Slot) -> None:
        """On the loop: a slot's exit was told."""
        for future in self.waiting.get(slot, ()):
            if not future.done():
                future.set_result(None)

    def end(self, cleanup: Make, timeout: float, take: Take | None = None) -> None:
        """End it, from a thread that may wait: what was put in order ends, then the cleanup, then what runs in it is cancelled.
        timeout: seconds for each. take: as for `run`."""
        try:
            self.call(self._begin_end, cleanup, timeout)
        except Unavailable:
            return
        until = monotonic() + 3 * timeout + 1
        while take is not None and not self._ended.is_set() and (left := until - monotonic()) > 0:
            take(left)
        if not self._ended.wait(until - monotonic()):
            logger.error("the loop does not end: a coroutine blocks its thread")

    def _begin_end(self, cleanup: Make, timeout: float) -> None:
        if self._ending is None:
            self._ending = self.loop.create_task(self._wind_up(cleanup, timeout))

    async def _wind_up(self, cleanup: Make, timeout: float) -> None:
        import asyncio

        async def settle(tasks: set[asyncio.Task[Any]]) -> None:
            # Not asyncio.timeout or gather: what does not heed its cancellation would be waited for in either.
            ended, left = await asyncio.wait(tasks, timeout=timeout) if tasks else (set(), set())
            for task in ended:
                if not task.cancelled() and (error := task.exception()) is not None:
                    logger.error("a task failed at the shim's end", error=repr(error))
            for task in left:
                logger.warn("a task does not end", task=getattr(task.get_coro(), "__qualname__", repr(task)))

        try:
            await settle({task for _, task in self._queues.values()})
            await settle({self.loop.create_task(cleanup())})
            running = asyncio.all_tasks() - {self._ending}
            for task in running:
                task.cancel()
            await settle(running)
        finally:
            self._stopped = True
            self.loop.stop()


class Call(Op):
    """One call of an author's coroutine, awaited by a coroutine of the RPC thread.

    context: whose trace it has, and whose caller's end, or deadline, cancels it unless it is shielded; None: nothing does but the
    loop's end."""

    __slots__ = ("_context", "_loop", "_make", "_task", "_timer", "_trace", "_waiter", "_why")

    def __init__(self, loop: Loop, make: Make, context: Context | None, shielded: bool = False) -> None:
        self._loop = loop
        self._make: Make | None = make
        self._context = None if shielded else context
        self._trace = None if context is None else context.trace
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: Waiter | None = None
        self._why: ShimError | None = None  # for which it was cancelled

    def begin(self, task: Waiter) -> bool:
        self._waiter = task
        context = self._context  # which _back lets go of
        self._loop.call(self._start)
        if context is not None:
            context.on_cancel(self._gone)
        return False

    def _gone(self) -> None:
        """On the RPC thread. Behind _start: that was put into the loop's queue first."""
        self._loop.call(self._cancel, Canceled("the caller has gone"))

    # ---- on the loop ----

    def _start(self) -> None:
        make, self._make = self._make, None
        assert make is not None
        try:
            inside = copy_context()
            inside.run(calling.set, self._trace)
            self._task = self._loop.loop.create_task(make(), context=inside)
        except BaseException as error:  # a method that takes other arguments
            self._back(None, error)
            return
        self._task.add_done_callback(self._done)
        left = None if self._context is None else self._context.remaining
        if left is not None:
            late = DeadlineExceeded("the caller's deadline has passed")
            self._timer = self._loop.loop.call_later(left, self._cancel, late)

    def _cancel(self, why: ShimError) -> None:
        if self._task is not None and not self._task.done():
            self._why = self._why or why
            self._task.cancel(str(why))

    def _done(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self._back(None, self._why or Canceled("the call's task was cancelled"))
        else:
            error = task.exception()
            self._back(None if error is not None else task.result(), error)

    def _back(self, value: Any, error: BaseException | None) -> None:
        """Resume who awaits it. Nothing that its error's traceback holds may hold the error; see jobs.Task.step."""
        if self._timer is not None:
            self._timer.cancel()
        waiter = self._waiter
        assert waiter is not None
        self._waiter = self._task = self._context = self._timer = self._why = None
        box = [(value, error)]
        self._loop.core.post(lambda: waiter.step(*box.pop()))
