"""Reads files of the kernel that may hang, so that who asks is answered all the same.

Stats and Pids read a container's cgroups. A kernel that stalls there (a cgroup that is being frozen, a filesystem in trouble)
keeps the thread that reads; it must keep no more than that one, and no RPC longer than a moment.
"""

from __future__ import annotations

import time

from .. import jobs
from ..errors import Unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._reaper import Core

# Seconds that an RPC waits for a reading.
TIMEOUT = 0.5


class Readings:
    """What is known of one thing that is read over and over: the last reading, and the one under way. RPC thread only."""

    __slots__ = ("began", "error", "last", "under_way")

    def __init__(self) -> None:
        self.last: Any = None
        self.error = ""  # why the last reading failed
        self.under_way: jobs.Event | None = None
        self.began = 0.0


class Meter:
    """Reads in the pool, one at a time for the whole shim."""

    __slots__ = ("_core", "_lock")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = jobs.Lock()

    async def read(self, readings: Readings, remaining: float | None, fn: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
        """(what fn(*args) says, True), or (the last reading, or None, False) when it does not say it within TIMEOUT.

        A reading that is under way is waited for, not repeated; once it has stalled, nobody waits who has an earlier one.
        remaining: seconds that the caller has, if it is in a hurry. Raises Unknown when fn has raised."""
        seconds = TIMEOUT if remaining is None else min(max(remaining, 0.0), TIMEOUT)
        under_way = readings.under_way
        if under_way is None:
            under_way = readings.under_way = jobs.Event()
            readings.began = time.monotonic()
            jobs.Task(self._core, self._read(readings, under_way, fn, args)).step()
        elif readings.last is not None and time.monotonic() - readings.began > TIMEOUT:
            return readings.last, False
        if not await under_way.within(seconds):
            return readings.last, False
        if readings.error:
            raise Unknown(readings.error)
        return readings.last, True

    async def _read(self, readings: Readings, done: jobs.Event, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            async with self._lock:
                readings.last = await jobs.in_pool(fn, *args)
            readings.error = ""
        except Exception as error:  # kept as text: an error holds its frames, and they their connection
            readings.error = str(error) or type(error).__name__
        readings.under_way = None
        done.set()
