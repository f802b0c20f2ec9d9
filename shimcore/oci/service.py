"""The task service over an OCI runtime: the life of containers and execs. What is done to those that live is
in control.

Handlers are coroutines on the RPC thread: they never block, runtime calls are jobs, files and mounts go to
the pool. Whatever a handler raises, the slot that it opened is bound or dropped when its reply goes out. No
exit is published here: the core does that, and calls on_exit when it has.
"""

from __future__ import annotations

from _thread import allocate_lock

from .. import jobs, state
from .._reaper import DROPPED, RESERVED, RUNNING, TOLD
from ..errors import Canceled, FailedPrecondition, InvalidArgument, NotFound, ShimError
from ..publisher import TOPIC_CREATE, TOPIC_DELETE, TOPIC_EXEC_ADDED, TOPIC_EXEC_STARTED, TOPIC_START
from . import handover, runc, stdio
from .container import SIGKILL, Container
from .control import empty, state_of
from .forgotten import Forgotten
from .process import ExecFiles, Process, check_id, exec_spec
from .restore import Restore, create_event
from .sandbox import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from google.protobuf.empty_pb2 import Empty

    from .._reaper import ExitSignal, Slot
    from .._ttrpc import Context
    from ..protos import events_pb2, task_pb2
    from ..publisher import RemotePublisher
    from ..wire import Raw
    from .streaming import Streams
else:
    from ..protos.lazy import events_pb2, task_pb2

# Seconds that Delete of a container that was never started waits for the exit of the init it has killed.
KILLED_INIT_TIMEOUT = 10.0
# Seconds that Delete waits for a terminal's last output to be taken.
DRAIN_TIMEOUT = 10.0
# Seconds after which a shim ends that has nothing left, and has been asked for nothing new: whoever gave up a
# Create or Delete says no Shutdown, and ttrpc does not tell of a call that was given up.
ORPHAN_TIMEOUT = 10.0


class RuncTask(Restore):
    """containerd.task.v2.Task and v3 for the containers of one shim, which may be one container or a pod."""

    def __init__(self, publisher: RemotePublisher, exit: ExitSignal) -> None:
        super().__init__(publisher, exit)
        self.sandbox = Sandbox(self.core, exit, self.let_go)
        self._forgotten = Forgotten(self.core, self.containers, self._end_soon)
        self._restored = False
        self._creates = 0  # Creates so far
        self._streams: Streams | None = None
        self._streams_lock = allocate_lock()

    def the_streams(self) -> Streams:
        """containerd's streams for stdio, whose module is imported with the first of them. On any thread."""
        with self._streams_lock:
            if self._streams is None:
                from .streaming import Streams

                self._streams = Streams(self.core)
            return self._streams

    def stream(self, requests: object, context: Context) -> AsyncIterator[Raw]:
        """containerd.services.streaming.v1.Streaming/Stream."""
        return self.the_streams().stream(requests, context)

    def holds(self) -> bool:
        return self.sandbox.running

    def unused(self) -> bool:
        return not self.containers and not self.sandbox.alive

    def on_exit(self, slot: Slot) -> None:
        if isinstance(slot.cookie, Process):
            slot.cookie.ended(self.core)
        if not slot.exec_id:
            self._forgotten.ended()

    def describe(self) -> dict[str, object]:
        """The sandbox that this shim may be, the containers, and which of them wait for the runtime."""
        return {
            "sandbox": self.sandbox.describe(),
            "containers": {
                container.id: {
                    "bundle": container.bundle,
                    "runtime": container.runtime.binary,
                    "cgroup": container.cgroup,
                    "private_pids": container.private_pids,
                    "created": container.ready,
                    "being_changed": container.lock.locked,
                    "waiting_for_that": len(container.lock.waiting),
                    "execs": list(container.execs),
                    "output": _output(container),
                }
                for container in list(self.containers.values())
            },
        }

    def counters(self) -> dict[str, tuple[str, int]]:
        return {
            "stdio_dropped_bytes": ("Bytes of output that nobody read, thrown away.", self.lost.dropped),
            "stdio_spilled_bytes": ("Bytes of output that nobody read, kept on disk.", self.lost.spilled),
        }

    # --- an upgrade in place

    def hand_over(self, trial: bool) -> dict[str, Any]:
        for cls in type(self).__mro__:
            if "hand_over" in cls.__dict__:
                break
            if "__init__" in cls.__dict__:
                raise FailedPrecondition(f"{cls.__name__} has an __init__ of its own, and no hand_over() and take_over()")
        return handover.save(self, trial)

    def take_over(self, state: dict[str, Any]) -> None:
        handover.restore(self, state)
        self._restored = True

    def go_on(self) -> None:
        handover.resume(self, self._restored)
        self._restored = False
        self._forgotten.ended()

    # --- Create

    async def create(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        check_id(request.id, "container id")
        if not request.bundle.startswith("/"):
            raise InvalidArgument(f"bundle {request.bundle!r} is not an absolute path")
        if request.checkpoint and not request.checkpoint.startswith("/"):
            raise InvalidArgument(f"checkpoint {request.checkpoint!r} is not an absolute path")
        stdio.check(request.stdin, request.stdout, request.stderr, self.the_streams)
        if context.cancelled:  # it had to wait for us: who has given up may be clearing the bundle away by now
            self._end_soon()
            raise Canceled("the caller of Create has gone")
        constant = _constant_state(request, request.bundle)
        slot = self.core.reserve(request.id, "", constant) if request.checkpoint else self.core.open(request.id, constant)
        init = Process(
            slot, request.bundle, request.stdin, request.stdout, request.stderr, terminal=request.terminal,
            streams=self.the_streams,
        )  # fmt: skip
        container = Container(request.id, self.namespace, request.bundle, init, self.lost)
        slot.cookie = init
        self.containers[request.id] = container
        self._creates += 1
        try:
            async with container.lock:
                pid = await self._create(container, request, context)
        finally:
            if not container.ready:
                # In this order a Wait that is parked is answered before the container is unknown.
                slot.drop()
                init.forget()
                del self.containers[request.id]
                if context.cancelled:
                    self._end_soon()
        return task_pb2.CreateTaskResponse(pid=pid)

    async def _create(self, container: Container, request: task_pb2.CreateTaskRequest, context: Context) -> int:
        slot = container.init.slot
        called = False
        try:
            if self.sandbox.alive:
                await jobs.in_pool(self.sandbox.add_mounts, container.bundle)
            options = request.options
            await jobs.in_pool(container.prepare, options.type_url, options.value, request.rootfs)
            if request.checkpoint:
                return self.created(container, request, context)
            called = True
            argv = container.runtime.create(
                container.id,
                container.bundle,
                container.pid_file,
                no_pivot=container.options.no_pivot_root,
                no_new_keyring=container.options.no_new_keyring,
                console=container.init.console_path,
            )
            result = await self.run(context, runc.CREATE_TIMEOUT, argv, container.init.child_fds())
            if result.status != 0:
                raise await self.failure(container, "OCI runtime create failed", result)
            pid = await jobs.in_pool(container.collect)
            if context.cancelled:
                # Nobody would ever ask for this container again: it would run for a containerd that doesn't
                # know it.
                raise Canceled("the caller of Create has gone")
            slot.bind(pid)
        except Exception:
            await self._uncreate(container, called)
            raise
        # From here on there is a process, whose exit will be told: nothing below may fail.
        container.ready = True
        self.begun(container)
        event = create_event(request, pid)
        slot.announce(TOPIC_CREATE, event.DESCRIPTOR.full_name, event.SerializeToString())
        return pid

    async def _uncreate(self, container: Container, called: bool) -> None:
        if called:
            await self.delete_by_force(container)
        await jobs.in_pool(container.unprepare)

    def _end_soon(self) -> None:
        if self.unused():
            jobs.Task(self.core, self._end_if_unused()).step()

    async def _end_if_unused(self) -> None:
        """For a shim that has just become unused; one that has been used since is somebody's."""
        creates = self._creates
        await jobs.sleep(ORPHAN_TIMEOUT)
        if creates == self._creates and self.unused():
            self.exit.signal()

    # --- Start

    async def start(self, request: task_pb2.StartRequest, context: Context) -> task_pb2.StartResponse:
        container = self.container(request.id)
        if request.exec_id:
            pid = await self._start_exec(container, container.process(request.exec_id), context)
        else:
            async with container.lock:
                pid = await self._start_init(container, context)
        return task_pb2.StartResponse(pid=pid)

    async def _start_init(self, container: Container, context: Context) -> int:
        self.check(container, state.START)
        slot = container.init.slot
        if slot.phase == RESERVED:
            return await self.restore(container, context)
        topic = type_url = ""
        payload = b""
        # Held, the exit of an init that dies at once is told after TaskStart, or after it is known that there
        # is none.
        slot.hold()
        try:
            argv = container.runtime.start(container.id)
            await self.call(container, context, "OCI runtime start failed", runc.START_TIMEOUT, argv)
            slot.set_status(RUNNING)
            event = events_pb2.TaskStart(container_id=container.id, pid=slot.pid)
            topic, type_url, payload = TOPIC_START, event.DESCRIPTOR.full_name, event.SerializeToString()
        finally:
            slot.release(topic, type_url, payload)
        return slot.pid

    async def _start_exec(self, container: Container, process: Process, context: Context) -> int:
        # Execs of a container start side by side: opening the slot is what lets one Start in, and none after
        # init's exit.
        slot = process.slot
        init = state_of(container.init.slot)
        state.check_exec_start(state_of(slot), init, init == state.STOPPED)
        slot.open()
        files = ExecFiles(container.bundle, process.exec_id)
        owner = (container.options.io_uid, container.options.io_gid)
        bound = False
        try:
            await jobs.in_pool(_prepare_exec, files, process, owner, self.namespace)
            argv = container.runtime.exec(container.id, files.spec, files.pid, files.log, process.console_path)
            result = await self.run(context, runc.EXEC_TIMEOUT, argv, process.child_fds())
            if result.status != 0:
                log = await jobs.in_pool(files.read_log)
                raise runc.failure("OCI runtime exec failed", result, log)
            pid = await jobs.in_pool(_collect_exec, files, process)
            slot.bind(pid)
            bound = True
        except Exception:
            await jobs.in_pool(_undo_exec, files, container)
            raise
        finally:
            if not bound:
                slot.drop()
                process.close_io()
        process.spec = b""
        process.io_started(self.core, container.policy, container.lost)
        slot.set_status(RUNNING)
        event = events_pb2.TaskExecStarted(container_id=container.id, exec_id=process.exec_id, pid=pid)
        slot.announce(TOPIC_EXEC_STARTED, event.DESCRIPTOR.full_name, event.SerializeToString())
        return pid

    # --- Exec

    async def exec(self, request: task_pb2.ExecProcessRequest, context: Context) -> Empty:
        container = self.container(request.id)
        check_id(request.exec_id, "exec id")
        stdio.check(request.stdin, request.stdout, request.stderr, self.the_streams)
        self.check(container, state.ADD_EXEC)
        spec = exec_spec(request.spec.value, request.terminal)
        slot = self.core.reserve(request.id, request.exec_id, _constant_state(request, container.bundle))
        process = Process(
            slot, container.bundle, request.stdin, request.stdout, request.stderr, spec, terminal=request.terminal,
            streams=self.the_streams,
        )  # fmt: skip
        slot.cookie = process
        container.execs[request.exec_id] = process
        event = events_pb2.TaskExecAdded(container_id=container.id, exec_id=request.exec_id)
        self.publisher.publish(TOPIC_EXEC_ADDED, event, container.id, request.exec_id)
        return empty()

    # --- Delete

    async def delete(self, request: task_pb2.DeleteRequest, context: Context) -> task_pb2.DeleteResponse:
        container = self.container(request.id)
        if request.exec_id:
            return await self._delete_exec(container, container.process(request.exec_id))
        async with container.lock:
            # A Delete whose caller gave up goes on all the same; who asked again meanwhile gets its answer.
            if container.deleted is None:
                container.deleted = await self._delete_init(container, context)
            return container.deleted

    async def _delete_exec(self, container: Container, process: Process) -> task_pb2.DeleteResponse:
        slot = process.slot
        state.check(state.EXEC, state_of(slot), state.DELETE)
        response = _exit_of(slot)
        await process.drained(DRAIN_TIMEOUT)
        process.forget()
        container.execs.pop(process.exec_id, None)
        process.close_io()
        await jobs.in_pool(ExecFiles(container.bundle, process.exec_id).remove)
        return response

    async def _delete_init(self, container: Container, context: Context) -> task_pb2.DeleteResponse:
        slot = container.init.slot
        self.check(container, state.DELETE)
        if slot.phase not in (TOLD, RESERVED, DROPPED):
            await self._kill_unstarted(container)
        result = await self.run(context, runc.DELETE_TIMEOUT, container.runtime.delete(container.id))
        if result.status != 0:
            # A container that the runtime has forgotten is fine: our own earlier Delete may have failed at
            # the rootfs.
            error = await self.failure(container, "failed to delete task", result)
            if not runc.is_missing(str(error)):
                argv = container.runtime.delete(container.id, force=True)
                result = await self.run(context, runc.DELETE_TIMEOUT, argv)
                if result.status != 0:
                    try:
                        raise error
                    finally:
                        del error  # its traceback holds this frame
        await jobs.in_pool(container.unmount)
        await container.init.drained(DRAIN_TIMEOUT)
        container.close_io()
        response = _exit_of(slot)
        event = events_pb2.TaskDelete(
            container_id=container.id,
            pid=response.pid,
            exit_status=response.exit_status,
            exited_at=response.exited_at,
        )
        self.publisher.publish(TOPIC_DELETE, event, container.id)
        container.forget()
        del self.containers[container.id]
        self._end_soon()
        return response

    async def _kill_unstarted(self, container: Container) -> None:
        try:
            container.init.slot.kill(SIGKILL)
        except NotFound:  # it has died, and its exit is about to be told
            pass
        if not await container.init.wait_told(KILLED_INIT_TIMEOUT):
            raise FailedPrecondition("cannot delete a running process")

    # --- Shutdown

    async def shutdown(self, request: task_pb2.ShutdownRequest, context: Context) -> Empty:
        """Nothing while a container or the sandbox remains, or comes to be, whatever `now` says; it may come many times."""
        if self.unused():
            self.exit.signal()
        return empty()


def _output(container: Container) -> dict[str, object]:
    """What becomes, and has become, of output that nobody reads; for the pool."""
    watches = {process.exec_id: process.watch for process in [container.init, *list(container.execs.values())]}
    return {
        "policy": str(container.policy),
        "dropped_bytes": container.lost.dropped,
        "spilled_bytes": container.lost.spilled,
        "unread": {id: gone for id, watch in watches.items() if watch is not None and (gone := watch.gone())},
    }


def _constant_state(request: task_pb2.CreateTaskRequest | task_pb2.ExecProcessRequest, bundle: str) -> bytes:
    """The fields of StateResponse that never change. Its id is the exec's own for an exec, as in Go's
    shim."""
    exec_id = request.exec_id if isinstance(request, task_pb2.ExecProcessRequest) else ""
    message = task_pb2.StateResponse(
        id=exec_id or request.id,
        bundle=bundle,
        stdin=request.stdin,
        stdout=request.stdout,
        stderr=request.stderr,
        terminal=request.terminal,
        exec_id=exec_id,
    )
    return message.SerializeToString()


def _exit_of(slot: Slot) -> task_pb2.DeleteResponse:
    response = task_pb2.DeleteResponse(pid=slot.pid, exit_status=slot.exit_status)
    if slot.exited_at:
        response.exited_at.FromNanoseconds(slot.exited_at)
    return response


def _prepare_exec(files: ExecFiles, process: Process, owner: tuple[int, int], namespace: str) -> None:
    files.write_spec(process.spec)
    process.open_io(owner, namespace)


def _collect_exec(files: ExecFiles, process: Process) -> int:
    process.take_terminal()  # first: who fails here still finds the pid file
    return files.collect()


def _undo_exec(files: ExecFiles, container: Container) -> None:
    """A runtime that was killed may have made the process before: nobody would wait for it."""
    try:
        pid = files.collect()
    except (OSError, ShimError):
        pid = 0
    if pid:
        container.signal_one(pid, SIGKILL)
    files.remove()
