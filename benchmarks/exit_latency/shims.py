"""Shims of the benchmark's own: one of whose handlers spins, and one that takes any processes into its exit table."""

from __future__ import annotations

import os

from shimcore import jobs
from shimcore.errors import FailedPrecondition
from shimcore.oci.shim import RuncShim
from shimcore.protos import task_pb2
from shimcore.shim import Shim
from shimcore.task import Task, inline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from shimcore._ttrpc import Context
    from shimcore.publisher import RemotePublisher

RUNNING = 2
SIGKILL = 9


def _empty() -> Empty:
    from google.protobuf.empty_pb2 import Empty

    return Empty()


class SpinShim(RuncShim):
    """RuncShim, but Stats spins until a ResizePty of width 0 ends it; one of any other width fails until it has begun."""

    def create_task_service(self, publisher: RemotePublisher) -> Task:
        from shimcore.oci.service import RuncTask

        class SpinTask(RuncTask):
            spinning = False
            over = False

            def stats(self, request: task_pb2.StatsRequest, context: Context) -> task_pb2.StatsResponse:
                self.over = False
                self.spinning = True
                while not self.over:
                    pass
                self.spinning = False
                return task_pb2.StatsResponse()

            @inline
            def resize_pty(self, request: task_pb2.ResizePtyRequest, context: Context) -> Empty:  # type: ignore[override]
                if not request.width:
                    self.over = True
                elif not self.spinning:
                    raise FailedPrecondition("not spinning yet")
                return _empty()

        return SpinTask(publisher, self.exit)


class BurstShim(Shim):
    """Checkpoint runs a spawner, whose orphans become execs of the container, slot by slot. Its path is the command, words
    parted by tabs: the spawner's arguments, of which the third is the first slot and the last the file of pids."""

    def create_task_service(self, publisher: RemotePublisher) -> Task:
        return BurstTask(publisher, self)


class BurstTask(Task):
    native = True

    def __init__(self, publisher: RemotePublisher, shim: BurstShim) -> None:
        self.core = publisher.core
        self.exit = shim.exit

    async def create(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        from shimcore import _reaper

        slot = self.core.open(request.id)
        pid, pidfd = _reaper.spawn(["/bin/sleep", "100000"])
        os.close(pidfd)
        slot.bind(pid)
        slot.announce()
        return task_pb2.CreateTaskResponse(pid=pid)

    @inline
    def start(self, request: task_pb2.StartRequest, context: Context) -> task_pb2.StartResponse:
        return task_pb2.StartResponse(pid=self.core.find(request.id).pid)  # type: ignore[union-attr]

    async def checkpoint(self, request: task_pb2.CheckpointTaskRequest, context: Context) -> Empty:
        argv = request.path.split("\t")
        result = await jobs.run_job(argv, timeout=120)
        if result.status:
            raise FailedPrecondition(f"the spawner exited with {result.status}: {result.output!r}")
        with open(argv[-1], encoding="ascii") as pids:
            for number, pid in enumerate(pids, int(argv[2])):
                slot = self.core.reserve(request.id, f"e{number}")
                slot.open()
                slot.bind(int(pid))
                slot.announce()
        return _empty()

    @inline
    def kill(self, request: task_pb2.KillRequest, context: Context) -> Empty:
        self.core.find(request.id).kill(SIGKILL)  # type: ignore[union-attr]
        return _empty()

    @inline
    def delete(self, request: task_pb2.DeleteRequest, context: Context) -> task_pb2.DeleteResponse:
        slot = self.core.find(request.id)
        assert slot is not None
        slot.forget()
        return task_pb2.DeleteResponse(pid=slot.pid, exit_status=slot.exit_status)

    @inline
    def shutdown(self, request: task_pb2.ShutdownRequest, context: Context) -> Empty:
        self.exit.signal()
        return _empty()
