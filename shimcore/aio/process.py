"""Processes and their exits, for coroutines on a shim's loop.

The loop's thread makes them and lives as long as the shim, so they are nobody else's children (core/children.c).
"""

from __future__ import annotations

import os

from .. import _reaper
from .._reaper import DROPPED, TOLD
from ..trace import environ
from .loop import here

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from .._reaper import JobResult, Slot
    from .loop import Loop

_SIGKILL = 9


class Process:
    """A program that spawn() has started. It is reaped when it ends, whether or not somebody waits for it."""

    def __init__(self, loop: Loop, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._exit: asyncio.Future[int] = loop.loop.create_future()
        loop.loop.add_reader(pidfd, self._ended, loop)

    def _ended(self, loop: Loop) -> None:
        try:
            status = _reaper.wait_pidfd(self._pidfd)
        except OSError:  # somebody else's wait
            status = 255
        if status is None:
            return
        loop.loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._exit.set_result(status)

    async def wait(self) -> int:
        """Wait for its end; its exit status, 128 + signal for one that a signal has ended. Any number of tasks may."""
        import asyncio

        return await asyncio.shield(self._exit)

    def kill(self, signum: int = _SIGKILL) -> None:
        """Send it a signal, unless it has ended. Raises OSError."""
        if self._pidfd >= 0:
            _reaper.pidfd_send_signal(self._pidfd, signum)


def spawn(
    argv: Sequence[str | bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    fds: Mapping[int, int] | None = None,
    new_session: bool = False,
    new_group: bool = False,
) -> Process:
    """Start a program that is no container's process. See _reaper.spawn for the arguments, and the OSError that it raises.

    It returns when the program has been executed, a millisecond in which the loop stands still, and awaits nothing: whoever is
    cancelled either has the process or has made none."""
    return Process(here(), *_reaper.spawn(argv, env=env, cwd=cwd, fds=fds, new_session=new_session, new_group=new_group))


def spawn_in(
    slot: Slot,
    argv: Sequence[str | bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    fds: Mapping[int, int] | None = None,
    new_session: bool = True,
) -> int:
    """Start the process of a container or exec and give it to its slot, which has to be opened; returns its pid.

    As spawn, without an await between the two. Its exit is the exit table's: see `exited`, Slot.kill and Task.on_exit."""
    loop = here()
    pid, pidfd = _reaper.spawn(argv, env=env, cwd=cwd, fds=fds, new_session=new_session)
    try:
        slot.bind(pid)
    except BaseException:
        Process(loop, pid, pidfd).kill()
        raise
    os.close(pidfd)
    return pid


async def exited(slot: Slot) -> int:
    """Wait until a slot's exit was told; its exit status. At once for one that was told or dropped before."""
    loop = here()
    future: asyncio.Future[None] = loop.loop.create_future()
    # First the entry, then the look: Task's on_exit looks for entries after the phase is TOLD.
    loop.waiting.setdefault(slot, []).append(future)
    try:
        if slot.phase not in (TOLD, DROPPED):
            await future
    finally:
        loop.waiting[slot].remove(future)
        if not loop.waiting[slot]:
            del loop.waiting[slot]
    return slot.exit_status


class _Ended:
    """A job's cookie: NOTE_JOB steps it on the RPC thread."""

    def __init__(self, loop: Loop, future: asyncio.Future[JobResult]) -> None:
        self._loop = loop
        self._future = future

    def step(self, result: JobResult) -> None:
        self._loop.call(self._set, result)

    def _set(self, result: JobResult) -> None:
        if not self._future.done():  # cancelled
            self._future.set_result(result)


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
    """As shimcore.run_job: run a program, wait for its end and have what it has written; see Core.job.

    Whoever is cancelled stops waiting; the program goes on, at most until its timeout. OSError when it can't be started."""
    loop = here()
    if trace:
        env = environ(env)
    future: asyncio.Future[JobResult] = loop.loop.create_future()
    cookie = _Ended(loop, future)
    loop.core.job(argv, timeout=timeout, cap=cap, env=env, cwd=cwd, fds=fds, cookie=cookie, dies_with_thread=True)
    return await future
