"""Authors of shims written with asyncio, for the tests of shimcore.aio."""

from __future__ import annotations

import contextlib
import os
import select
import textwrap
from collections.abc import Callable

import pytest

from shimcore import errors
from shimcore.protos import task_pb2
from shimcore.ttrpc import Client
from tests.authors import HANG, TASK, Installed, Make, author

__all__ = ["author"]

# What tests of one method need besides it. `inside`, `ended` and `go` are between a coroutine and the test.
ASYNCIO = """
import asyncio
from shimcore import aio, errors

class Service(aio.Task):
    native = True
    def __init__(self, shim):
        self.shim = shim
        self.core = shim.core
        self.said = []
    async def shutdown(self, request, context):
        self.shim.exit.signal()
        return Empty()
    async def hang(self):
        self.shim.inside.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            self.said.append(("cancelled", *error.args))
            raise
        finally:
            self.shim.ended.set()
    async def until_told(self):
        self.shim.inside.set()
        while not self.shim.go.is_set():
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # in which a cancellation that was asked for before would come
        await asyncio.sleep(0)
        self.said.append("done")
        self.shim.ended.set()

class Author(aio.Shim):
    stop_timeout = 60.0
    def create_task_service(self, publisher):
        self.core = publisher.core
        self.inside, self.ended, self.go = threading.Event(), threading.Event(), threading.Event()
        self.task = Service(self)
        return self.task
    def register_services(self, server, publisher):
        server.add_service("test.Look", {"Eval": (POOL, self.look, BytesValue)})
    def look(self, request, context):
        value = eval(request.value.decode(), globals(), {"shim": self, "task": self.task})
        return BytesValue(value=repr(value).encode())
"""
INSIDE = f"shim.inside.wait({HANG})"
ENDED = f"shim.ended.wait({HANG})"

# For a Service that has processes.
EXITS = """
    class Service(Service):
        def make(self, id, exec_id=""):
            slot = self.core.reserve(id, exec_id) if exec_id else self.core.open(id)
            if exec_id:
                slot.open()
            pid, pidfd = _reaper.spawn(["sleep", "1000"], new_session=True)
            os.close(pidfd)
            slot.bind(pid)
            slot.announce()
            return pid
        def exit(self, pid):
            os.kill(pid, 9)
"""

Shims = Callable[..., Installed]


@pytest.fixture
def shim(author: Make) -> Shims:
    """Installs the common module with what is given besides."""
    return lambda source="": author(ASYNCIO + textwrap.dedent(source))


def create(client: Client, id: str, timeout: float = HANG) -> task_pb2.CreateTaskResponse:
    request = task_pb2.CreateTaskRequest(id=id)
    return client.call(TASK, "Create", request, task_pb2.CreateTaskResponse, timeout=timeout)


def gone(made: Installed, address: str) -> None:
    """Shutdown has ended the daemon."""
    pidfd = os.pidfd_open(made.look(address, "os.getpid()"))
    made.started.remove(address)
    with contextlib.suppress(errors.Closed), Client(address) as client:
        client.call(TASK, "Shutdown", task_pb2.ShutdownRequest(id="c1"), timeout=HANG)
    assert select.select([pidfd], [], [], HANG)[0], "the daemon does not end"
    os.close(pidfd)
