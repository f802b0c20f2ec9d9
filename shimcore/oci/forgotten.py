"""Containers that containerd has forgotten, and so will never ask to be deleted.

When a container's connection breaks in the middle of a call, containerd takes the shim for dead: it runs `delete`, which clears
all away, and removes the bundle. A shim that serves other containers lives on, with an entry in the exit table, FIFOs and a
ledger for the one that is gone. So, from the end of a container on, its bundle is looked at once in a while.
"""

from __future__ import annotations

import os

from .. import logger
from .._reaper import TOLD
from ..errors import FailedPrecondition
from ..jobs import Task, in_pool, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .._reaper import Core
    from .container import Container

# Seconds before a bundle is looked at, and between two looks at the most: twice as long each time.
FIRST, LONGEST = 10.0, 300.0


class Forgotten:
    """containers: those of the shim. gone: called when one was taken out of them. RPC thread only."""

    __slots__ = ("_containers", "_core", "_gone", "_looking")

    def __init__(self, core: Core, containers: dict[str, Container], gone: Callable[[], None]) -> None:
        self._core = core
        self._containers = containers
        self._gone = gone
        self._looking = False

    def ended(self) -> None:
        """A container's exit was told."""
        if not self._looking and self._over():
            self._looking = True
            Task(self._core, self._look()).step()

    def _over(self) -> list[Container]:
        return [container for container in self._containers.values() if container.init.slot.phase == TOLD]

    async def _look(self) -> None:
        pause = FIRST
        try:
            while self._over():
                await sleep(pause)
                for container in await in_pool(_without_bundle, self._over()):
                    async with container.lock:
                        if self._containers.get(container.id) is container:
                            self._forget(container)
                pause = min(2 * pause, LONGEST)
        finally:
            self._looking = False

    def _forget(self, container: Container) -> None:
        try:
            container.forget()
        except FailedPrecondition:  # an exec's exit is still to be told
            return
        container.close_io()
        del self._containers[container.id]
        logger.warn("a container's bundle has gone without Delete", id=container.id)
        self._gone()


def _without_bundle(containers: list[Container]) -> list[Container]:
    return [container for container in containers if not os.path.isdir(container.bundle)]
