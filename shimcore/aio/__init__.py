"""The asyncio flavour of Shim and Task: methods written as `async def` run on an asyncio loop, in a thread of the daemon's own.

    from shimcore import run
    from shimcore.aio import Shim, Task

    class Service(Task):
        async def create(self, request, context):
            async with asyncio.timeout(5):
                ...

    class Mine(Shim):
        def create_task_service(self, publisher):
            return Service()

Nothing else of shimcore imports it, and it imports asyncio only where a loop is made: in the daemon of such a shim. See
docs/asyncio.md.
"""

from __future__ import annotations

from .process import Process, exited, run_job, spawn, spawn_in
from .shim import Shim
from .task import Task, shielded

__all__ = ["Process", "Shim", "Task", "exited", "run_job", "shielded", "spawn", "spawn_in"]
