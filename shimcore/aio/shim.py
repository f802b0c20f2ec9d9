"""The Shim whose daemon has an asyncio loop."""

from __future__ import annotations

from .. import shim, task
from ..errors import InvalidArgument
from .task import Task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..publisher import RemotePublisher
    from .loop import Loop


class Shim(shim.Shim):
    """As shimcore.Shim; its daemon runs an asyncio loop in a thread of its own, on which coroutines of its Task run.

    create_task_service is called on that loop, before anything is served, so it may make what wants a running loop. It is no
    coroutine itself: what has to be awaited goes into `setup`.
    """

    stop_timeout = 2.0  # seconds at the daemon's end for `cleanup`, and as many for tasks of the loop to heed their cancellation

    _loop: Loop | None = None

    async def setup(self) -> None:
        """Called once in the daemon, after create_task_service and before `start` is answered: what it raises fails the start."""

    async def cleanup(self) -> None:
        """Called once when no call is served any more, before the tasks of the loop are cancelled."""

    @classmethod
    def preload(cls) -> None:
        """Imports asyncio. Who overrides it calls it."""
        import asyncio  # noqa: F401

    def _make_task(self, publisher: RemotePublisher, trial: bool) -> task.Task:
        from .loop import Loop

        loop = self._loop = Loop(publisher.core)

        async def make() -> task.Task:
            made = self.create_task_service(publisher)
            if not isinstance(made, task.Task):
                raise InvalidArgument(f"create_task_service returns {made!r}, no Task: what is to be awaited goes into setup")
            if isinstance(made, Task):
                made._loop = loop
            if not trial:
                await self.setup()
            return made

        return loop.run(make())

    def _end(self) -> None:
        if self._loop is not None:
            self._loop.end(self.cleanup, self.stop_timeout)
