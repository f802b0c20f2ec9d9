"""Containers that Start makes from a checkpoint, and what that has in common with a Create.

Until Start such a container has no process, and its pid is 0, as in containerd's own shim. Its slot is reserved, like an exec's.
"""

from __future__ import annotations

from .. import jobs, logger
from .._reaper import RUNNING
from ..errors import Canceled, Unknown
from ..publisher import TOPIC_CREATE, TOPIC_START
from . import runc
from .aborted import clear_half_made, clear_mounts
from .control import Control

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._ttrpc import Context
    from ..protos import events_pb2, task_pb2
    from .container import Container
else:
    from ..protos.lazy import events_pb2


class Restore(Control):
    """The part of the task service for what is said above."""

    def created(self, container: Container, request: task_pb2.CreateTaskRequest, context: Context) -> int:
        """Create of a container with a checkpoint, all but its process."""
        if context.cancelled:
            raise Canceled("the caller of Create has gone")
        container.checkpoint = request.checkpoint
        container.ready = True
        self.publisher.publish(TOPIC_CREATE, create_event(request, 0), container.id)
        return 0

    async def restore(self, container: Container, context: Context) -> int:
        """Its Start. When it fails the container has stopped, and can only be deleted."""
        from . import checkpoint

        slot, init, options = container.init.slot, container.init, container.options
        work = checkpoint.work_folder(container.bundle, options.criu_work_path)
        argv = checkpoint.restore_argv(
            container.runtime, options, container.id, container.bundle, container.pid_file, container.checkpoint, work,
            init.console_path,
        )  # fmt: skip
        slot.open()
        bound = False
        try:
            what = "OCI runtime restore failed"
            try:
                await self.call(container, context, what, checkpoint.TIMEOUT, argv, init.child_fds())
            except Unknown as error:
                raise await jobs.in_pool(checkpoint.explain, error, work, "restore.log", container.bundle) from None
            pid: int = await jobs.in_pool(container.collect)
            slot.bind(pid)
            bound = True
        except Exception:
            await self.delete_by_force(container)
            raise
        finally:
            if not options.criu_work_path:
                await jobs.in_pool(checkpoint.clear, work)
            if not bound:
                slot.drop()
                init.told.set()
        self.begun(container)
        slot.set_status(RUNNING)
        event = events_pb2.TaskStart(container_id=container.id, pid=pid)
        slot.announce(TOPIC_START, event.DESCRIPTOR.full_name, event.SerializeToString())
        return pid

    # --- with Create

    def begun(self, container: Container) -> None:
        """Init is bound."""
        container.init.io_started(self.core, container.policy, container.lost, container.spill_folder)
        if not container.private_pids and container.cgroup:
            container.init.slot.set_kill_rest(container.cgroup + "/cgroup.procs")

    async def delete_by_force(self, container: Container) -> None:
        """Whatever a runtime that has failed has left of a container."""
        await jobs.in_pool(clear_mounts, container.runtime.state_dir(container.id))
        await jobs.in_pool(clear_half_made, container.runtime.state_dir(container.id), container.bundle)
        try:
            argv = container.runtime.delete(container.id, force=True)
            await jobs.run_job(argv, timeout=runc.DELETE_TIMEOUT, cap=runc.OUTPUT_CAP)
        except OSError as error:
            logger.warn("the runtime can't be started", id=container.id, error=error)


def create_event(request: task_pb2.CreateTaskRequest, pid: int) -> events_pb2.TaskCreate:
    io = events_pb2.TaskIO(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal)
    return events_pb2.TaskCreate(
        container_id=request.id, bundle=request.bundle, rootfs=request.rootfs, io=io, checkpoint=request.checkpoint, pid=pid
    )
