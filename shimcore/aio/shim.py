"""The Shim whose daemon has an asyncio loop."""

from __future__ import annotations

from .. import shim, task
from ..errors import InvalidArgument
from .task import Task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..publisher import RemotePublisher
    from .loop import Loop, Take


class Shim(shim.Shim):
    """As shimcore.Shim; its daemon runs an asyncio loop in a thread of its own, on which coroutines of its Task run.

    create_task_service is called on that loop, before anything is served, so it may make what wants a running loop. It is no
    coroutine itself: what has to be awaited goes into `setup`.
    """

    # Seconds at the daemon's end for hooks that are under way, as many for `cleanup`, and for tasks to heed their cancellation.
    stop_timeout = 2.0

    _loop: Loop | None = None

    async def setup(self) -> None:
        """Called once in the daemon, after create_task_service and before `start` is answered: what it raises fails the start."""

    async def cleanup(self) -> None:
        """Called once when no call is served any more and hooks have ended, before the tasks of the loop are cancelled."""

    @classmethod
    def preload(cls) -> None:
        """Imports asyncio. Who overrides it calls it."""
        import asyncio  # noqa: F401

    def _make_task(self, publisher: RemotePublisher) -> task.Task:
        from .loop import Loop

        loop = self._loop = Loop(publisher.core)

        async def make() -> task.Task:
            made = self.create_task_service(publisher)
            if not isinstance(made, task.Task):
                raise InvalidArgument(f"create_task_service returns {made!r}, no Task: what is to be awaited goes into setup")
            if isinstance(made, Task):
                made._loop = loop
            return made

        return loop.run(make())

    def _set_up(self, take: Take) -> None:
        assert self._loop is not None
        self._loop.run(self.setup(), take)

    def _end(self, take: Take | None) -> None:
        if self._loop is not None:
            self._loop.end(self.cleanup, self.stop_timeout, take)

    def _unfinished(self) -> str | None:
        return None if self._loop is None or self._loop.in_order_ended else "a hook is under way"
