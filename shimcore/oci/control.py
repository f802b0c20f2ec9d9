"""The part of the task service that works on a container that is there: Kill, Pids, CloseIO, Pause, Resume,
Update, Stats, Checkpoint."""

from __future__ import annotations

import os

from .. import jobs, state
from .._reaper import DROPPED, OPENED, PAUSED, PAUSING, RESERVED, RUNNING, TOLD
from ..errors import DeadlineExceeded, InvalidArgument, NotFound, ShimError, Unknown
from ..protos import anys
from ..publisher import TOPIC_CHECKPOINTED, TOPIC_PAUSED, TOPIC_RESUMED
from ..task import Task
from . import runc
from .container import SIGKILL, Container
from .meter import Meter
from .readers import Lost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from .._reaper import ExitSignal, JobResult, Slot
    from .._ttrpc import Context
    from ..protos import events_pb2, runc_options_pb2, task_pb2
    from ..publisher import RemotePublisher
else:
    from ..protos.lazy import events_pb2, runc_options_pb2, task_pb2

SIGNAL_MAX = 64
TRACE_VARIABLE = "SHIMCORE_TRACE_ENV"  # 1: the runtime has its caller's trace in its environment
# Seconds in which one that was killed while it was frozen has died, where nothing had to be thawed.
FROZEN_DEATH_TIMEOUT = 1.0


def within(context: Context, seconds: float) -> float:
    """The deadline for a runtime call: ours, or the caller's when that is nearer."""
    remaining = context.remaining
    return seconds if remaining is None else max(0.001, min(seconds, remaining))


def empty() -> Empty:
    from google.protobuf.empty_pb2 import Empty

    return Empty()


def state_of(slot: Slot) -> int:
    """A process's state in state's table. While the runtime is making an exec it counts as running: it may
    not be deleted or started again. One whose start has failed has stopped."""
    phase = slot.phase
    if phase == RESERVED:
        return state.CREATED
    if phase == OPENED:
        return state.RUNNING
    if phase in (TOLD, DROPPED):
        return state.STOPPED
    return slot.status


class Control(Task):
    """State, Wait and Connect are answered by the core from its exit table."""

    native = True

    def __init__(self, publisher: RemotePublisher, exit: ExitSignal) -> None:
        super().__init__()
        self.exit = exit
        self.publisher = publisher
        self.core = publisher.core
        self.namespace = publisher.namespace
        self.containers: dict[str, Container] = {}  # those under creation too
        self.lost = Lost()
        self._meter = Meter(self.core)
        # systemd's for containerd. A runtime that finds it makes the container report its readiness, and
        # waits for it.
        os.environ.pop("NOTIFY_SOCKET", None)

    def container(self, id: str) -> Container:
        """Raises NotFound."""
        container = self.containers.get(id)
        if container is None or not container.ready:
            raise NotFound(f"container {id} is not there")
        return container

    def check(self, container: Container, operation: str) -> None:
        """Whether an operation on a container is legal now. Raises NotFound and FailedPrecondition."""
        if container.deleted is not None:
            raise NotFound(f"container {container.id} is not there")
        state.check(state.INIT, state_of(container.init.slot), operation)

    # --- signals, processes, stdin

    async def kill(self, request: task_pb2.KillRequest, context: Context) -> Empty:
        if not 0 <= request.signal <= SIGNAL_MAX:
            raise InvalidArgument(f"no signal has the number {request.signal}")
        container = self.container(request.id)
        process = container.process(request.exec_id)
        # Without a private pid namespace there may be some to kill when init has gone.
        everyone = request.all and not request.exec_id
        if not everyone or not await jobs.in_pool(container.signal_all, request.signal):
            process.slot.kill(request.signal)
        if request.signal == SIGKILL and container.init.slot.status in (PAUSING, PAUSED):
            # A frozen process dies when it is thawed, not before.
            async with container.lock:
                if container.init.slot.status == PAUSED:
                    try:
                        await self._thaw(container, context)
                    except ShimError:  # on v2 it is dead already, and nobody is left to thaw
                        if not await container.init.wait_told(FROZEN_DEATH_TIMEOUT):
                            raise
        return empty()

    async def pids(self, request: task_pb2.PidsRequest, context: Context) -> task_pb2.PidsResponse:
        container = self.container(request.id)
        listed, now = await self._meter.read(container.pid_readings, context.remaining, container.listed)
        # A list of before is no answer: its numbers may be others' by now. Nor is one that was begun before a Start all of it.
        pids = list(listed) if now else []
        pids += [pid for pid in container.known_pids() if pid not in pids]
        # Never none: containerd takes a shim without pids for a leaked one, and removes the task, exit status and all.
        pids = pids or [container.init.slot.pid]
        execs = {process.slot.pid: exec_id for exec_id, process in container.execs.items() if process.slot.pid > 0}
        response = task_pb2.PidsResponse()
        for pid in pids:
            info = response.processes.add(pid=pid)
            if pid in execs:
                anys.pack(info.info, runc_options_pb2.ProcessDetails(exec_id=execs[pid]))
        return response

    async def close_io(self, request: task_pb2.CloseIORequest, context: Context) -> Empty:
        self.container(request.id).process(request.exec_id).close_stdin()
        return empty()

    async def resize_pty(self, request: task_pb2.ResizePtyRequest, context: Context) -> Empty:
        """Resizing what has no terminal succeeds, and one that has not been started yet gets the size with its terminal."""
        process = self.container(request.id).process(request.exec_id)
        try:
            process.resize(request.width, request.height)
        except OSError as error:
            raise Unknown(f"the terminal can't be resized: {error.strerror}") from None
        return empty()

    # --- Pause, Resume, Update

    async def pause(self, request: task_pb2.PauseRequest, context: Context) -> Empty:
        container = self.container(request.id)
        async with container.lock:
            self.check(container, state.PAUSE)
            slot = container.init.slot
            slot.set_status(PAUSING)
            status = RUNNING
            try:
                await self.call(
                    container,
                    context,
                    "OCI runtime pause failed",
                    runc.PAUSE_TIMEOUT,
                    container.runtime.pause(container.id),
                )
                status = PAUSED
            finally:
                slot.set_status(status)
            self.publisher.publish(TOPIC_PAUSED, events_pb2.TaskPaused(container_id=container.id), container.id)
        return empty()

    async def resume(self, request: task_pb2.ResumeRequest, context: Context) -> Empty:
        container = self.container(request.id)
        async with container.lock:
            self.check(container, state.RESUME)
            await self._thaw(container, context)
            self.publisher.publish(TOPIC_RESUMED, events_pb2.TaskResumed(container_id=container.id), container.id)
        return empty()

    async def _thaw(self, container: Container, context: Context) -> None:
        argv = container.runtime.resume(container.id)
        await self.call(container, context, "OCI runtime resume failed", runc.PAUSE_TIMEOUT, argv)
        container.init.slot.set_status(RUNNING)

    async def update(self, request: task_pb2.UpdateTaskRequest, context: Context) -> Empty:
        container = self.container(request.id)
        async with container.lock:
            self.check(container, state.UPDATE)
            fd = memory_file(request.resources.value)
            try:
                argv = container.runtime.update(container.id)
                await self.call(container, context, "OCI runtime update failed", runc.UPDATE_TIMEOUT, argv, fds={0: fd})
            finally:
                os.close(fd)
        return empty()

    async def stats(self, request: task_pb2.StatsRequest, context: Context) -> task_pb2.StatsResponse:
        container = self.container(request.id)
        if not container.cgroups:
            raise NotFound(f"no cgroup of container {container.id} is known")
        from .stats import measure

        # What stalls is answered from the last reading.
        found, _ = await self._meter.read(container.readings, context.remaining, measure, container.cgroups)
        if found is None:
            raise DeadlineExceeded(f"the cgroup files of {container.id} could not be read in time")
        url, value = found
        response = task_pb2.StatsResponse()
        response.stats.type_url, response.stats.value = url, value
        return response

    async def checkpoint(self, request: task_pb2.CheckpointTaskRequest, context: Context) -> Empty:
        from . import checkpoint

        container = self.container(request.id)
        wanted = checkpoint.options_of(request.options.type_url, request.options.value)
        path = request.path or wanted.image_path or container.options.criu_image_path
        if not path.startswith("/"):
            raise InvalidArgument(f"checkpoint to {path!r}, which is not an absolute path")
        kept = wanted.work_path or container.options.criu_work_path
        async with container.lock:
            self.check(container, state.CHECKPOINT)
            work = checkpoint.work_folder(container.bundle, kept)
            argv = checkpoint.checkpoint_argv(container.runtime, container.options, wanted, container.id, path, work)
            try:
                await self.call(container, context, "OCI runtime checkpoint failed", checkpoint.TIMEOUT, argv)
            except Unknown as error:
                raise await jobs.in_pool(checkpoint.explain, error, work, "dump.log", container.bundle) from None
            finally:
                if not kept:
                    await jobs.in_pool(checkpoint.clear, work)
            event = events_pb2.TaskCheckpointed(container_id=container.id, checkpoint=path)
            self.publisher.publish(TOPIC_CHECKPOINTED, event, container.id)
        return empty()

    # --- runtime calls

    async def run(self, context: Context, seconds: float, argv: list[str], fds: dict[int, int] | None = None) -> JobResult:
        """One runtime call, at most `seconds` long. Raises Unknown when it can't be started."""
        traced = os.environ.get(TRACE_VARIABLE) == "1"
        try:
            return await jobs.run_job(argv, timeout=within(context, seconds), cap=runc.OUTPUT_CAP, fds=fds, trace=traced)
        except OSError as error:
            raise Unknown(f"OCI runtime {argv[0]!r} can't be started: {error.strerror}") from None

    async def call(
        self,
        container: Container,
        context: Context,
        what: str,
        seconds: float,
        argv: list[str],
        fds: dict[int, int] | None = None,
    ) -> None:
        """One runtime call that has to succeed. Raises Unknown and DeadlineExceeded: `what`, and the
        runtime's reason."""
        result = await self.run(context, seconds, argv, fds)
        if result.status != 0:
            raise await self.failure(container, what, result)

    async def failure(self, container: Container, what: str, result: JobResult) -> ShimError:
        return runc.failure(what, result, await jobs.in_pool(container.runtime_log))


def memory_file(data: bytes) -> int:
    """An fd to read `data` from, at its start; memory alone, so nothing blocks."""
    fd = os.memfd_create("resources", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
