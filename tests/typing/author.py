"""A shim whose author uses all that shimcore offers: mypy --strict takes it, and no public name may be left out."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

import shimcore
from shimcore import (
    Config,
    Context,
    Core,
    DeleteResult,
    ExitSignal,
    Flags,
    Lock,
    RemotePublisher,
    Shim,
    Slot,
    StartOpts,
    Task,
    address,
    cgroup,
    debug,
    error,
    errors,
    in_pool,
    info,
    inline,
    jobs,
    logger,
    monitor,
    mount,
    publisher,
    run,
    run_job,
    sleep,
    spawn,
    state,
    trace,
    ttrpc,
    util,
    warn,
)
from shimcore._ttrpc import CLIENT_STREAM, POOL, SERVER_STREAM, Server
from shimcore.bootstrap import Invocation
from shimcore.protos import events_pb2, task_pb2


class Service(Task):
    native = True
    teardown_timeout = 2.5

    def __init__(self, publisher: RemotePublisher, exit: ExitSignal) -> None:
        self.publisher = publisher
        self.core: Core = publisher.core
        self.exit = exit
        self.lock = Lock()

    def slot(self, id: str, exec_id: str = "") -> Slot:
        found = self.core.find(id, exec_id)
        if found is None:
            raise errors.NotFound(f"container {id} not found")
        return found

    async def create(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        slot = self.core.open(request.id, b"")
        async with self.lock:
            await in_pool(mount.mount_all, request.rootfs, f"{request.bundle}/rootfs")
            done = await run_job(["runc", "create", request.id], timeout=10, env={"A": "b"}, fds={0: 0}, trace=True)
            if done.status or done.timed_out:
                raise errors.Unknown(done.output.decode())
            await sleep(0.1)
        pid = util.read_pid_from_file(f"{request.bundle}/init.pid")
        slot.bind(pid)
        created = events_pb2.TaskCreate(container_id=request.id, pid=pid)
        self.publisher.publish(publisher.topic_of(created), created, container_id=request.id)
        about = context.trace or trace.current()
        spent = about.metadata if about is not None and about.sampled else []
        info("created", id=request.id, trace=spent, left=context.remaining, user=context.get("user", "nobody"))
        return task_pb2.CreateTaskResponse(pid=pid)

    @inline
    def pids(self, request: task_pb2.PidsRequest, context: Context) -> task_pb2.PidsResponse:
        processes = cgroup.list_pids(cgroup.procs_path(self.slot(request.id).pid))
        debug("pids", count=len(processes), peer=context.peer)
        return task_pb2.PidsResponse()

    def kill(self, request: task_pb2.KillRequest, context: Context) -> Empty:
        slot = self.slot(request.id, request.exec_id)
        state.check_kill("init", state.RUNNING, bool(slot.exited_at), request.all)
        context.on_cancel(lambda: warn("the caller has gone", method=f"{context.service}/{context.method}"))
        slot.kill(request.signal)
        return Empty()

    def shutdown(self, request: task_pb2.ShutdownRequest, context: Context) -> Empty:
        if request.now or not self.core.slots():
            self.exit.signal()
        return Empty()

    async def teardown(self, slot: Slot) -> None:
        await in_pool(mount.umount_all, slot.container_id)

    def on_exit(self, slot: Slot) -> None:
        logger.get_logger().info("exited", id=slot.container_id, status=slot.exit_status)

    def describe(self) -> dict[str, object]:
        return {"slots": len(self.core.slots())}

    def on_pid(self, pid: int, status: int) -> None:
        error("an orphan", pid=pid, status=status)

    def on_signal(self, signum: int) -> None:
        self.exit.signal()


class Blocking(Task):
    """The hooks that may be written either way."""

    def teardown(self, slot: Slot) -> None:
        util.write_str_to_file("done", slot.container_id)


def echo(requests: Iterator[Message], context: Context) -> Iterator[Message]:
    yield from requests


async def echo_later(requests: AsyncIterator[Message], context: Context) -> AsyncIterator[Message]:
    async for one in requests:
        yield one


class Author(Shim):
    def __init__(self, runtime_id: str, flags: Flags, config: Config) -> None:
        super().__init__(runtime_id, flags, config)
        config.no_reaper = flags.debug
        self.event = jobs.Event()

    def start_shim(self, opts: StartOpts) -> str:
        pid, where = spawn(opts, opts.id, [("KEY", "value")], ready_timeout=2)
        if not pid and not address.wait_socket_working(where):
            raise errors.Unavailable(where)
        return where

    def delete_shim(self) -> DeleteResult:
        return DeleteResult(pid=1, exit_status=137, exited_at_ns=util.now_ns())

    @classmethod
    def preload(cls) -> None:
        import shimcore.protos.runc_options_pb2  # noqa: F401

    def wait(self) -> None:
        while not self.exit.wait(timeout=1.5):
            os.sched_yield()

    def create_task_service(self, publisher: RemotePublisher) -> Task:
        return Service(publisher, self.exit) if publisher.flush(0.1) else Blocking()

    def register_services(self, server: Server, publisher: RemotePublisher) -> None:
        server.add_service("author.Echo", {"Echo": (POOL, echo, Empty, CLIENT_STREAM | SERVER_STREAM)})

    def shim_info(self, invocation: Invocation) -> bytes:
        return super().shim_info(invocation) + shimcore.__version__.encode()


class Other(Shim):
    def delete_shim(self) -> Message:
        return task_pb2.DeleteResponse(exit_status=1)


def wait_for(pid: int) -> int:
    with monitor.monitor_subscribe(monitor.Topic.PID) as subscription:
        with monitor.get_default().starting():
            monitor.monitor_notify_by_pid(pid, 3)
        code: int = monitor.wait_pid(pid, subscription, timeout=1)
        for event in subscription:
            code += event.exit_code + event.subject.pid
    return code


def connect(opts: StartOpts) -> int:
    request = task_pb2.ConnectRequest(id=opts.id)
    path = address.socket_address(opts.address, opts.namespace, opts.id)
    with ttrpc.Client(path, namespace=opts.namespace, interceptors=[trace.forward]) as client:
        return client.call("containerd.task.v2.Task", "Connect", request, task_pb2.ConnectResponse, timeout=1).shim_pid


def main() -> None:
    run("io.containerd.author.v1", Author, Config(default_log_level="debug"))
