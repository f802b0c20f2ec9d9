"""A shim that uses all that shimcore.aio offers: mypy --strict takes it, and no public name may be left out."""

from __future__ import annotations

import asyncio

from google.protobuf.empty_pb2 import Empty

from shimcore import Context, Core, ExitSignal, RemotePublisher, Slot, errors, run
from shimcore.aio import Process, Shim, Task, exited, run_job, shielded, spawn, spawn_in
from shimcore.protos import task_pb2


class Service(Task):
    native = True

    def __init__(self, publisher: RemotePublisher, exit: ExitSignal) -> None:
        self.core: Core = publisher.core
        self.exit = exit
        self.idle = asyncio.Event()

    def slot(self, id: str) -> Slot:
        found = self.core.find(id)
        if found is None:
            raise errors.NotFound(f"container {id} not found")
        return found

    async def create(self, request: task_pb2.CreateTaskRequest, context: Context) -> task_pb2.CreateTaskResponse:
        async with asyncio.timeout(context.remaining):
            done = await run_job(["mkfs.ext4", "disk"], timeout=10, cwd=request.bundle)
        if done.status:
            raise errors.Unknown(done.output.decode())
        self.core.open(request.id)
        return task_pb2.CreateTaskResponse()

    async def start(self, request: task_pb2.StartRequest, context: Context) -> task_pb2.StartResponse:
        return task_pb2.StartResponse(pid=spawn_in(self.slot(request.id), ["sleep", "1"], env={"A": "b"}, fds={1: 1}))

    @shielded
    async def pause(self, request: task_pb2.PauseRequest, context: Context) -> Empty:
        process: Process = spawn(["true"], new_group=True)
        process.kill()
        if await process.wait() != 0:
            raise errors.Unknown(f"{process.pid}")
        return Empty()

    async def delete(self, request: task_pb2.DeleteRequest, context: Context) -> task_pb2.DeleteResponse:
        return task_pb2.DeleteResponse(exit_status=await exited(self.slot(request.id)))

    def shutdown(self, request: task_pb2.ShutdownRequest, context: Context) -> Empty:
        self.exit.signal()
        return Empty()

    async def teardown(self, slot: Slot) -> None:
        await self.idle.wait()

    async def on_exit(self, slot: Slot) -> None:
        await asyncio.to_thread(print, slot.exit_status)

    async def on_pid(self, pid: int, status: int) -> None:
        self.idle.set()

    def on_signal(self, signum: int) -> None:
        self.exit.signal()


class Author(Shim):
    stop_timeout = 1.5

    def create_task_service(self, publisher: RemotePublisher) -> Service:
        self.running = asyncio.get_running_loop().create_task(asyncio.sleep(1))
        return Service(publisher, self.exit)

    async def setup(self) -> None:
        await self.running

    async def cleanup(self) -> None:
        await super().cleanup()

    @classmethod
    def preload(cls) -> None:
        super().preload()


def main() -> None:
    run("io.containerd.author.v1", Author)
