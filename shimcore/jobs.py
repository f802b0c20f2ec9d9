"""Awaitables for handlers written as coroutines, and the small loop that steps them; no asyncio.

A handler that awaits one of these parks its RPC: no thread waits for it. Coroutines are stepped on one thread only (the RPC
thread, or whoever consumes the core's notes), so what they share needs no lock between two awaits.
"""

from __future__ import annotations

from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread

from ._reaper import NOTE_JOB, NOTE_POST, NOTE_TIMER, Core, JobResult, handled, switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, TypeVar

    T = TypeVar("T")


class Op:
    """Something a coroutine waits for. `begin` is called once with the task: it returns True when there is nothing to wait for,
    else it sees to it that the task is stepped when there is no more."""

    __slots__ = ()

    def begin(self, task: Task) -> bool:
        raise NotImplementedError

    def __await__(self) -> Generator[Op, Any, Any]:
        return (yield self)


class Task:
    """One coroutine under way. `done(value, error)` is called when it ends.

    call: the call that is handled by it. One that has nobody to answer handles none: it may outlive the call that began it, and
    would keep its connection."""

    __slots__ = ("_coro", "_done", "call", "core")

    def __init__(
        self, core: Core, coro: Coroutine[Op, Any, Any], done: Callable[[Any, BaseException | None], None] | None = None
    ) -> None:
        self.core = core
        self._coro = coro
        self._done = done
        self.call = None if done is None else handled()

    def step(self, value: Any = None, error: BaseException | None = None) -> None:
        """Resume the coroutine with a value, or by raising an error in it, and begin what it awaits next."""
        ready = True
        before = switch(self.call)
        try:
            while ready:
                try:
                    op = self._coro.send(value) if error is None else self._coro.throw(error)
                except StopIteration as end:
                    self._end(end.value, None)
                    return
                except BaseException as exc:  # SystemExit of a handler must not end the thread
                    self._end(None, exc)
                    return
                finally:
                    # An error whose traceback holds this frame or its caller's, and that frame the error, would live until a
                    # collection, and with it the handler's context and its connection.
                    value = error = None
                try:
                    ready = op.begin(self)
                except BaseException as exc:
                    error = exc
        finally:
            switch(before)
            before = None

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self._done is not None:
            self._done(value, error)
        elif error is not None:
            from . import logger

            logger.error("a background task failed", error=repr(error))


class Pool:
    """A few threads for what may block, made when they are needed; all but one end when they are not. submit() never waits."""

    __slots__ = ("_lock", "_pending", "_queue", "_size", "_started")

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = allocate_lock()
        self._pending = 0  # calls handed in and not ended
        self._started = 0

    def submit(self, call: Callable[[], object]) -> None:
        """Run a callable without arguments on a pool thread; it answers for its own errors."""
        with self._lock:
            self._pending += 1
            start = self._started < min(self._size, self._pending)
            self._started += start
        self._queue.put(call)
        if start:
            try:
                start_new_thread(self._work, ())
            except RuntimeError:  # no thread to be had: those that there are do it
                with self._lock:
                    self._started -= 1
                    if not self._started:
                        raise

    @property
    def idle(self) -> bool:
        """Nothing that was handed in is left to be done."""
        with self._lock:
            return not self._pending

    def close(self) -> None:
        """Let the threads end once what was handed in is done."""
        with self._lock:
            for _ in range(self._started):
                self._queue.put(None)

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            if call is None:
                with self._lock:
                    self._started -= 1
                return
            try:
                call()
            except BaseException as exc:
                from . import logger

                logger.error("a pool job failed", error=repr(exc))
            del call
            with self._lock:
                self._pending -= 1
                if 1 < self._started > self._pending:
                    self._started -= 1
                    return


class _RunJob(Op):
    __slots__ = ("_args", "_kwargs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args = args
        self._kwargs = kwargs

    def begin(self, task: Task) -> bool:
        # Stepped on the RPC thread, which lives as long as the shim: a runtime that outlived its shim would make a container
        # when `delete` has been, and nobody would know of it.
        task.core.job(*self._args, cookie=task, dies_with_thread=True, **self._kwargs)
        return False


def resume(note: tuple[Any, ...]) -> bool:
    """Take a note of the core that resumes a coroutine or runs a posted callable; False: it is another kind of note."""
    kind = note[0]
    if kind == NOTE_JOB:
        note[1].cookie.step(note[1].result())
    elif kind == NOTE_TIMER:
        note[1].step()
    elif kind == NOTE_POST:
        note[1]()
    else:
        return False
    return True


class _Sleep(Op):
    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def begin(self, task: Task) -> bool:
        task.core.timer(self._seconds, task)
        return False


class _InPool(Op):
    __slots__ = ("_call",)

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self._call = call

    def begin(self, task: Task) -> bool:
        fn, args = self._call

        def work() -> None:
            switch(task.call)
            try:
                value = fn(*args)
            except BaseException as exc:
                # Popped: neither this frame nor that of the lambda, which the traceback holds, may hold the error (see step).
                box = [exc]
                task.core.post(lambda: task.step(None, box.pop()))
            else:
                task.core.post(lambda: task.step(value))
            finally:
                switch(None)

        task.core.pool.submit(work)
        return False


async def run_job(
    argv: Sequence[str | bytes],
    *,
    timeout: float,
    cap: int = 65536,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    fds: Mapping[int, int] | None = None,
    trace: bool = False,
) -> JobResult:
    """Run a program as a job of the core and wait for its end; see Core.job. OSError when it can't be started.

    trace: have the trace of the call that is handled in its environment; see trace.environ."""
    if trace:
        from .trace import environ

        env = environ(env)
    result: JobResult = await _RunJob((argv,), {"timeout": timeout, "cap": cap, "env": env, "cwd": cwd, "fds": fds})
    return result


async def in_pool(fn: Callable[..., T], *args: Any) -> T:
    """Run a function that may block on the small pool and wait for its result."""
    result: T = await _InPool((fn, args))
    return result


async def sleep(seconds: float) -> None:
    """Wait without holding a thread."""
    await _Sleep(seconds)


class Event(Op):
    """A one-shot event that coroutines wait for; set() resumes them, in order. RPC thread only."""

    __slots__ = ("_set", "_waiting")

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Task | _Gate] = []

    def begin(self, task: Task) -> bool:
        if not self._set:
            self._waiting.append(task)
        return self._set

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.core.post(task.step)


    async def within(self, seconds: float) -> bool:
        """Wait for it, at most so long; whether it was set."""
        return self._set or bool(await _Within(self, seconds))


class _Within(Op):
    __slots__ = ("_event", "_seconds")

    def __init__(self, event: Event, seconds: float) -> None:
        self._event = event
        self._seconds = seconds

    def begin(self, task: Task) -> bool:
        gate = _Gate(self._event, task)
        self._event._waiting.append(gate)
        task.core.timer(self._seconds, gate)
        return False


class _Gate:
    """Stepped by the event or by the timer; the first of them resumes the task."""

    __slots__ = ("_event", "_task", "core")

    def __init__(self, event: Event, task: Task) -> None:
        self.core = task.core
        self._event = event
        self._task: Task | None = task

    def step(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            if self in self._event._waiting:
                self._event._waiting.remove(self)
            task.step(self._event.is_set())


class _Acquire(Op):
    __slots__ = ("_lock",)

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    def begin(self, task: Task) -> bool:
        lock = self._lock
        if lock.locked:
            lock.waiting.append(task)
            return False
        lock.locked = True
        return True


class Lock:
    """A first-come lock between coroutines (`async with lock:`), for instance one for each container."""

    __slots__ = ("locked", "waiting")

    def __init__(self) -> None:
        self.locked = False
        self.waiting: list[Task] = []

    async def __aenter__(self) -> Lock:
        await _Acquire(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.waiting:
            task = self.waiting.pop(0)
            task.core.post(task.step)
        else:
            self.locked = False
