"""shimcore.aio: calls of shims written with asyncio, in real daemons."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper, errors, jobs
from shimcore.aio.loop import Call, Loop
from shimcore.protos import task_pb2
from shimcore.rig import Rig
from shimcore.ttrpc import Client
from tests.aio_authors import ENDED, INSIDE, Shims, create, shim
from tests.authors import HANG, TASK, author

__all__ = ["author", "shim"]


# ---- a whole life ----

WHOLE = """
    from shimcore import publisher as topics, util
    from shimcore.protos import events_pb2 as events, task_pb2 as api

    class Service(Service):
        async def create(self, request, context):
            await asyncio.sleep(0)
            slot = self.core.open(request.id, api.StateResponse(id=request.id, bundle=request.bundle).SerializeToString())
            slot.cookie = request
            event = events.TaskCreate(container_id=request.id, bundle=request.bundle)
            self.shim.publisher.publish(topics.TOPIC_CREATE, event)
            return api.CreateTaskResponse()
        async def start(self, request, context):
            slot = self.core.find(request.id)
            spec = await asyncio.to_thread(util.read_spec, slot.cookie.bundle)
            out = os.open(slot.cookie.stdout, os.O_RDWR | os.O_CLOEXEC)
            try:
                pid = aio.spawn_in(slot, spec["process"]["args"], fds={1: out})
            finally:
                os.close(out)
            slot.set_status(_reaper.RUNNING)
            slot.cookie = asyncio.create_task(aio.exited(slot))
            started = events.TaskStart(container_id=request.id, pid=pid)
            slot.announce(topics.TOPIC_START, "containerd.events.TaskStart", started.SerializeToString())
            return api.StartResponse(pid=pid)
        async def kill(self, request, context):
            self.core.find(request.id).kill(request.signal)
            return Empty()
        async def delete(self, request, context):
            slot = self.core.find(request.id)
            status = await slot.cookie
            event = events.TaskDelete(container_id=request.id, pid=slot.pid, exit_status=status)
            self.shim.publisher.publish(topics.TOPIC_DELETE, event)
            slot.forget()
            return api.DeleteResponse(pid=slot.pid, exit_status=status)

    class Author(Author):
        def create_task_service(self, publisher):
            self.publisher = publisher
            return super().create_task_service(publisher)
"""


@pytest.fixture
def rig(shim: Shims, namespace: str, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim(WHOLE).binary, namespace=f"{namespace}-aio", rootfs=rootfs) as made:
        yield made


def test_a_container_from_create_to_delete(rig: Rig) -> None:
    session = rig.container(["sh", "-c", "echo hello; exit 42"])
    assert session.run() == 42
    assert session.output == "hello\n"
    pidfd = os.pidfd_open(session.shim_pid)
    assert session.delete().exit_status == 42
    rig.events.wait("/tasks/delete", container=session.id)
    topics = [event.topic for event in rig.events.of(session.id)]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert select.select([pidfd], [], [], HANG)[0]
    os.close(pidfd)


def test_a_container_is_killed(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    pid = session.start()
    assert (session.task.state().status, session.task.state().pid) == (_reaper.RUNNING, pid)
    session.task.kill(signal.SIGKILL)
    assert session.wait() == 137
    assert session.delete().exit_status == 137


# ---- calls ----


def test_two_creates_that_wait_for_each_other(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def create(self, request, context):
                from shimcore.protos import task_pb2
                here, other = ("a", "b") if request.id == "a" else ("b", "a")
                met = self.__dict__.setdefault("met", {"a": asyncio.Event(), "b": asyncio.Event()})
                met[here].set()
                await met[other].wait()
                return task_pb2.CreateTaskResponse(pid=ord(here))
    """)
    with Client(made.start()) as client:
        requests = [task_pb2.CreateTaskRequest(id=id) for id in "ab"]
        calls = [client.start(TASK, "Create", request, task_pb2.CreateTaskResponse, timeout=HANG) for request in requests]
        assert [call.result().pid for call in calls] == [97, 98]


HANGS = """
    class Service(Service):
        async def {name}(self, request, context):
            await self.hang()
"""


def test_a_caller_that_goes_cancels_its_call(shim: Shims) -> None:
    made = shim(HANGS.format(name="create"))
    address = made.start()
    with Client(address) as client:
        client.start(TASK, "Create", task_pb2.CreateTaskRequest(id="a"), task_pb2.CreateTaskResponse)
        assert made.look(address, INSIDE)
    assert made.look(address, ENDED)
    assert made.look(address, "task.said") == [("cancelled", "the caller has gone")]


def test_a_deadline_that_passes_cancels_the_call(shim: Shims) -> None:
    made = shim(HANGS.format(name="create"))
    address = made.start()
    with Client(address) as client:
        with pytest.raises(errors.DeadlineExceeded):
            create(client, "a", timeout=0.1)
        assert made.look(address, ENDED)
    assert made.look(address, "task.said") == [("cancelled", "the caller's deadline has passed")]


@pytest.mark.parametrize(
    ("name", "rpc", "mark"),
    [("start", "Start", ""), ("kill", "Kill", ""), ("delete", "Delete", ""), ("pause", "Pause", "@aio.shielded")],
)
def test_what_is_not_cut(shim: Shims, name: str, rpc: str, mark: str) -> None:
    made = shim(f"""
        class Service(Service):
            {mark}
            async def {name}(self, request, context):
                context.on_cancel(self.shim.go.set)
                await self.until_told()
                return Empty()
    """)
    address = made.start()
    with Client(address) as client:
        client.start(TASK, rpc, task_pb2.PauseRequest(id="a"), task_pb2.DeleteResponse)
        assert made.look(address, INSIDE)
    assert made.look(address, ENDED)
    assert made.look(address, "task.said") == ["done"]


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("raise errors.NotFound('no such thing')", errors.NotFound, "no such thing"),
        ("raise ValueError('of mine')", errors.Unknown, "ValueError: of mine"),
        ("open('/nonexistent')", errors.Unknown, "/nonexistent: No such file"),
        ("raise NotImplementedError", errors.Unimplemented, "not implemented"),
        ("raise SystemExit(3)", errors.Unknown, "SystemExit: 3"),
        ("raise asyncio.CancelledError", errors.Canceled, "cancelled"),
        ("async with asyncio.timeout(0): await asyncio.Event().wait()", errors.Unknown, "TimeoutError"),
        ("return 3", errors.Unknown, "returned int, not a message"),
        ("await aio.exited(None)", errors.Unknown, "AttributeError"),
    ],
)
def test_errors_are_as_in_other_tasks(shim: Shims, code: str, error: type[errors.ShimError], text: str) -> None:
    made = shim(f"""
        class Service(Service):
            async def create(self, request, context):
                await asyncio.sleep(0)
                {code}
    """)
    with Client(made.start()) as client:
        for _ in range(2):  # and it serves on
            with pytest.raises(error, match=text):
                create(client, "a")


def test_plain_methods_run_on_the_pool(shim: Shims) -> None:
    made = shim("""
        from shimcore import inline
        class Service(Service):
            def create(self, request, context):
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.shim._loop.loop).result()  # not on the loop's thread
                raise errors.NotFound("plain")
            @inline
            def pids(self, request, context):
                raise errors.NotFound("inline")
    """)
    with Client(made.start()) as client:
        with pytest.raises(errors.NotFound, match="plain"):
            create(client, "a")
        with pytest.raises(errors.NotFound, match="inline"):
            client.call(TASK, "Pids", task_pb2.PidsRequest(id="a"), task_pb2.PidsResponse, timeout=HANG)


@pytest.mark.parametrize("mark", ["", "@aio.shielded"])
def test_a_call_has_its_trace(shim: Shims, mark: str) -> None:
    made = shim(f"""
        from shimcore import trace
        class Service(Service):
            def note(self):
                found = trace.current()
                self.said.append(found and found.trace_id)
            {mark}
            async def create(self, request, context):
                await asyncio.sleep(0)
                self.note()
                await asyncio.to_thread(self.note)
                job = await aio.run_job(["sh", "-c", "echo $TRACEPARENT"], timeout=60, trace=True)
                self.said.append(job.output.decode().strip())
                raise errors.NotFound
    """)
    id = "0af7651916cd43dd8448eb211c80319c"
    parent = f"00-{id}-b7ad6b7169203331-01"
    address = made.start()
    with Client(address) as client:
        for metadata in {"traceparent": parent}, {}:
            with pytest.raises(errors.NotFound):
                client.call(TASK, "Create", task_pb2.CreateTaskRequest(id="a"), metadata=metadata, timeout=HANG)
    assert made.look(address, "task.said") == [id, id, parent, None, None, ""]


# ---- one call, by itself ----


class Caller:
    """A call's context."""

    def __init__(self, remaining: float | None = None) -> None:
        self.remaining = remaining
        self.trace = None
        self.gone: list[Callable[[], None]] = []

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self.gone.append(callback)


@contextlib.contextmanager
def looping() -> Iterator[Loop]:
    async def nothing() -> None: ...

    loop = Loop(_reaper.Core())
    yield loop
    loop.end(nothing, HANG)


def awaited(loop: Loop, make: Callable[[], Any], caller: Caller | None = None, act: Callable[[], None] = bool) -> Any:
    """What awaits a Call is told, stepped by this thread as by the RPC thread."""
    ended: list[tuple[Any, BaseException | None]] = []

    async def call() -> Any:
        return await Call(loop, make, caller)  # type: ignore[arg-type]

    jobs.Task(loop.core, call(), lambda value, error: ended.append((value, error))).step()
    act()
    while not ended:
        notes = loop.core.notes(HANG)
        assert notes and all(jobs.resume(note) for note in notes)
    value, error = ended.pop()
    try:
        if error is not None:
            raise error
    finally:
        error = None  # this frame is in its traceback
    return value


def test_why_a_call_was_cancelled() -> None:
    with looping() as loop:
        with pytest.raises(errors.DeadlineExceeded):
            awaited(loop, asyncio.Event().wait, Caller(remaining=0.0))
        caller = Caller()
        with pytest.raises(errors.Canceled, match="the caller has gone"):
            awaited(loop, asyncio.Event().wait, caller, lambda: caller.gone[0]())
        assert awaited(loop, lambda: asyncio.sleep(0, "in time"), Caller(remaining=HANG)) == "in time"


def test_a_call_after_the_loops_end() -> None:
    with looping() as loop:
        pass
    with pytest.raises(errors.Unavailable):
        awaited(loop, lambda: asyncio.sleep(0))


def test_an_error_is_not_held_by_what_its_traceback_holds() -> None:
    """Else it, the request and the connection would live until a collection."""
    class Request:
        pass

    async def fails(request: Request) -> None:
        raise ValueError

    seen: list[weakref.ref[Request]] = []

    def make() -> Any:
        request = Request()
        seen.append(weakref.ref(request))
        return fails(request)

    gc.disable()
    try:
        with looping() as loop:
            with contextlib.suppress(ValueError):
                awaited(loop, make, Caller())
            # The loop lets go of its last handle with the next one.
            awaited(loop, lambda: asyncio.sleep(0))
            assert seen[0]() is None
    finally:
        gc.enable()
