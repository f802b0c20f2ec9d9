"""jobs.py: coroutines over a core, stepped by whoever consumes its notes, which here is the test."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper, jobs

HANG = 60.0  # seconds after which a test that should have ended has hung


class Loop:
    """A core with its exit thread, and the thread of the test as the one that steps coroutines."""

    def __init__(self) -> None:
        self.core = _reaper.Core("ns", "")
        self.core.pool = jobs.Pool(2)
        self.thread = threading.Thread(target=self.core.run)
        self.thread.start()

    def start(self, coro: Coroutine[Any, Any, Any]) -> list[Any]:
        """Steps it until it first waits; the list gets (value, error) at its end."""
        ended: list[Any] = []
        jobs.Task(self.core, coro, lambda value, error: ended.append((value, error))).step()
        return ended

    def turn(self) -> None:
        for note in self.core.notes(HANG):
            assert jobs.resume(note), note

    def run(self, *coros: Coroutine[Any, Any, Any]) -> list[Any]:
        """Runs them side by side; their values in order, or the first error."""
        all_ended = [self.start(coro) for coro in coros]
        until = time.monotonic() + HANG
        while not all(all_ended):
            assert time.monotonic() < until, "a coroutine was never resumed"
            self.turn()
        for ((_, error),) in all_ended:
            if error is not None:
                raise error
        return [value for ((value, _),) in all_ended]

    def one(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return self.run(coro)[0]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.core.stop()
    made.thread.join(HANG)
    assert not made.thread.is_alive()


def test_a_coroutine_that_awaits_nothing(loop: Loop) -> None:
    async def seven() -> int:
        return 7

    assert loop.start(seven()) == [(7, None)]


def test_run_job(loop: Loop, tmp_path: Path) -> None:
    result = loop.one(
        jobs.run_job(["/bin/sh", "-c", "echo $A; pwd; exit 3"], timeout=HANG, env={"A": "b"}, cwd=str(tmp_path))
    )
    assert (result.status, result.output) == (3, f"b\n{tmp_path}\n".encode())
    assert isinstance(result, _reaper.JobResult)


def test_run_job_that_cannot_be_started_raises_where_it_is_awaited(loop: Loop) -> None:
    async def body() -> str:
        try:
            await jobs.run_job(["/nonexistent"], timeout=1)
        except FileNotFoundError as error:
            return str(error.filename)
        return ""

    assert loop.one(body()) == "/nonexistent"


def test_run_job_timeout_and_cap(loop: Loop) -> None:
    late, large = loop.run(
        jobs.run_job(["sleep", "1000"], timeout=0.02), jobs.run_job(["head", "-c", "5000", "/dev/zero"], timeout=HANG, cap=10)
    )
    assert late.timed_out and late.status == 137
    assert large.truncated and large.output == bytes(10) and large.status == 0


def test_fifty_jobs_side_by_side_need_no_thread(loop: Loop) -> None:
    reader, writer = os.pipe()
    threads = threading.active_count()
    ended = [loop.start(jobs.run_job(["sh", "-c", f"read x; exit {n}"], timeout=HANG, fds={0: reader})) for n in range(50)]
    os.close(reader)
    assert threading.active_count() == threads
    assert not any(ended)
    os.write(writer, b"go\n" * 50)
    os.close(writer)
    while not all(ended):
        loop.turn()
    assert [one[0][0].status for one in ended] == list(range(50))


def test_sleep(loop: Loop) -> None:
    order: list[float] = []

    async def nap(seconds: float) -> None:
        began = time.monotonic()
        await jobs.sleep(seconds)
        assert time.monotonic() - began >= seconds
        order.append(seconds)

    loop.run(nap(0.03), nap(0), nap(0.015))
    assert order == [0, 0.015, 0.03]


def test_in_pool(loop: Loop) -> None:
    where: list[int] = []

    def work(a: int, b: int) -> int:
        where.append(threading.get_ident())
        return a + b

    assert loop.one(jobs.in_pool(work, 3, 4)) == 7
    assert where[0] not in (threading.get_ident(), loop.thread.ident)


class Held:
    """Something that a handler has, as its context."""


async def _caught(held: Held) -> None:
    try:
        await jobs.in_pool(os.stat, "/nonexistent")
    except FileNotFoundError:
        pass


async def _raised(held: Held) -> None:
    await jobs.in_pool(os.stat, "/nonexistent")


async def _not_started(held: Held) -> None:
    try:
        await jobs.run_job(["/nonexistent"], timeout=1)
    except OSError:
        pass


# red: `step` keeps the error that it has thrown, or `in_pool` the one that it has got, in a frame of its traceback
@pytest.mark.parametrize("body", [_caught, _raised, _not_started])
def test_an_error_keeps_nothing_until_a_collection(loop: Loop, body: Callable[[Held], Coroutine[Any, Any, None]]) -> None:
    gc.collect()
    gc.disable()
    try:
        held = Held()
        gone = weakref.ref(held)
        ended: list[bool] = []
        jobs.Task(loop.core, body(held), lambda value, error: ended.append(True)).step()
        del held
        while not ended:
            loop.turn()
        loop.one(jobs.in_pool(int, "5"))  # the pool's thread has done with what came before
        assert gone() is None
    finally:
        gc.enable()


def test_in_pool_raises_where_it_is_awaited(loop: Loop) -> None:
    async def body() -> str:
        try:
            await jobs.in_pool(os.stat, "/nonexistent")
        except FileNotFoundError as error:
            return str(error.filename)
        return ""

    assert loop.one(body()) == "/nonexistent"
    with pytest.raises(SystemExit):
        loop.one(jobs.in_pool(os.sys.exit, 3))  # type: ignore[attr-defined]
    assert loop.one(jobs.in_pool(int, "5")) == 5  # the pool's thread lives


def test_an_event_resumes_all_in_order(loop: Loop) -> None:
    event, order = jobs.Event(), []

    async def wait(number: int) -> None:
        await event
        order.append(number)

    ended = [loop.start(wait(number)) for number in range(10)]
    assert not event.is_set() and not any(ended)
    event.set()
    assert order == []  # they are resumed by the loop, not within set()
    while not all(ended):
        loop.turn()
    assert order == list(range(10))
    assert loop.start(wait(10)) and order[-1] == 10  # set already: at once


# ---- Lock ----


def test_a_lock_is_first_come(loop: Loop) -> None:
    lock, order, inside = jobs.Lock(), [], []

    async def work(number: int) -> None:
        async with lock:
            assert not inside
            inside.append(number)
            await jobs.sleep(0.001)
            inside.remove(number)
            order.append(number)

    loop.run(*(work(number) for number in range(20)))
    assert order == list(range(20))
    assert not lock.locked and not lock.waiting


def test_nobody_overtakes_at_the_handing_over(loop: Loop) -> None:
    """Between the release and the moment the next one runs, the lock is not free."""
    lock, order = jobs.Lock(), []
    let_go = jobs.Event()

    async def holder() -> None:
        async with lock:
            await let_go

    async def work(number: int) -> None:
        async with lock:
            order.append(number)
            await jobs.sleep(0)

    first, second = loop.start(holder()), loop.start(work(1))
    let_go.set()
    while not first:
        loop.turn()
    third = loop.start(work(2))
    while not (second and third):
        loop.turn()
    assert order == [1, 2]


def test_a_lock_is_let_go_of_by_an_error(loop: Loop) -> None:
    lock = jobs.Lock()

    async def fail() -> None:
        async with lock:
            await jobs.sleep(0)
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        loop.one(fail())
    assert not lock.locked


def test_a_long_way_without_waiting_does_not_grow_the_stack(loop: Loop) -> None:
    lock, event = jobs.Lock(), jobs.Event()
    event.set()

    async def body() -> int:
        for _ in range(5000):
            async with lock:
                await event
        return 5

    assert loop.start(body()) == [(5, None)]


# ---- Task ----


@pytest.mark.parametrize("raised", [ValueError("x"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_coroutine_raises_goes_to_its_end(loop: Loop, raised: BaseException) -> None:
    async def fail() -> None:
        await jobs.sleep(0)
        raise raised

    ended = loop.start(fail())
    while not ended:
        loop.turn()
    assert ended == [(None, raised)]


def test_awaiting_what_is_not_ours_is_an_error(loop: Loop) -> None:
    class Foreign(Awaitable[None]):
        def __await__(self) -> Generator[Any, Any, None]:
            yield "not an Op"

    async def body() -> None:
        await Foreign()

    ended = loop.start(body())
    assert isinstance(ended[0][1], AttributeError)


def test_a_background_task_that_fails_is_logged(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    from shimcore import logger

    said: list[Any] = []
    monkeypatch.setattr(logger, "error", lambda text, **fields: said.append((text, fields)))

    async def fail() -> None:
        raise ValueError("x")

    jobs.Task(loop.core, fail()).step()
    assert said == [("a background task failed", {"error": "ValueError('x')"})]


# ---- Pool ----


def test_a_pool_makes_no_more_threads_than_its_size() -> None:
    pool, seen, let_go = jobs.Pool(3), set(), threading.Event()
    done = threading.Semaphore(0)

    def work() -> None:
        seen.add(threading.get_ident())
        assert let_go.wait(HANG)
        done.release()

    for _ in range(20):
        pool.submit(work)
    let_go.set()
    for _ in range(20):
        assert done.acquire(timeout=HANG)
    assert 1 <= len(seen) <= 3


def test_a_pool_uses_as_many_threads_as_it_needs() -> None:
    """Calls that wait for each other: with fewer threads than its size it would hang."""
    pool, together = jobs.Pool(4), threading.Barrier(5)
    for _ in range(4):
        pool.submit(lambda: together.wait(HANG))  # type: ignore[arg-type, return-value]
    together.wait(HANG)


def test_a_pool_keeps_one_thread_when_nothing_is_left_to_do() -> None:
    pool, together, kept = jobs.Pool(4), threading.Barrier(5), threading.Event()
    for _ in range(3):  # it makes them again
        for _ in range(4):
            pool.submit(lambda: together.wait(HANG))  # type: ignore[arg-type, return-value]
        together.wait(HANG)
        deadline = time.monotonic() + HANG
        while pool._started != 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    pool.submit(kept.set)
    assert kept.wait(HANG)


def test_a_pool_outlives_what_its_calls_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    from shimcore import logger

    said: list[str] = []
    monkeypatch.setattr(logger, "error", lambda text, **fields: said.append(text))
    pool, done = jobs.Pool(1), threading.Event()
    pool.submit(lambda: os._exit if 1 / 0 else None)
    pool.submit(done.set)
    assert done.wait(HANG)
    assert said == ["a pool job failed"]
