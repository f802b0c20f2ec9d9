"""shimcore.aio: shims written with asyncio, in real daemons."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper, errors, jobs
from shimcore.aio.loop import Call, Loop
from shimcore.protos import task_pb2
from shimcore.rig import Events, Rig
from shimcore.ttrpc import Client
from tests.authors import HANG, TASK, Installed, Make, author, log_of, until
from tests.upgrades import command
from tests.upgrades import until as soon

__all__ = ["author"]

ROOT = Path(__file__).resolve().parent.parent

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


@pytest.fixture
def shim(author: Make) -> Callable[[str], Installed]:
    import textwrap

    return lambda source="": author(ASYNCIO + textwrap.dedent(source))


Shims = Callable[..., Installed]


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


def create(client: Client, id: str, timeout: float = HANG) -> task_pb2.CreateTaskResponse:
    request = task_pb2.CreateTaskRequest(id=id)
    return client.call(TASK, "Create", request, task_pb2.CreateTaskResponse, timeout=timeout)


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


# ---- one call, by itself ----


class Caller:
    """A call's context."""

    def __init__(self, remaining: float | None = None) -> None:
        self.remaining = remaining
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
    import asyncio

    with looping() as loop:
        with pytest.raises(errors.DeadlineExceeded):
            awaited(loop, asyncio.Event().wait, Caller(remaining=0.0))
        caller = Caller()
        with pytest.raises(errors.Canceled, match="the caller has gone"):
            awaited(loop, asyncio.Event().wait, caller, lambda: caller.gone[0]())
        assert awaited(loop, lambda: asyncio.sleep(0, "in time"), Caller(remaining=HANG)) == "in time"


def test_a_call_after_the_loops_end() -> None:
    import asyncio

    with looping() as loop:
        pass
    with pytest.raises(errors.Unavailable):
        awaited(loop, lambda: asyncio.sleep(0))


def test_an_error_is_not_held_by_what_its_traceback_holds() -> None:
    """Else it, the request and the connection would live until a collection."""
    import gc
    import weakref

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
            awaited(loop, lambda: __import__("asyncio").sleep(0))
            assert seen[0]() is None
    finally:
        gc.enable()


# ---- processes and exits ----


def test_processes_of_coroutines(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def pids(self, request, context):
                one, other = aio.spawn(["sh", "-c", "exit 7"]), aio.spawn(["sleep", "1000"])
                self.said.append(await one.wait())
                self.said.append(await one.wait())
                one.kill()  # has no effect
                other.kill(15)
                self.said.append(await other.wait())
                done = await aio.run_job(["echo", "hello"], timeout=60)
                self.said.append((done.status, done.output))
                try:
                    aio.spawn(["/nonexistent"])
                except FileNotFoundError:
                    self.said.append("not found")
                child = await asyncio.create_subprocess_exec("sh", "-c", "cat; exit 3", stdin=-1, stdout=-1)
                self.said.append(((await child.communicate(b"piped"))[0], child.returncode))
                raise errors.NotFound
    """)
    address = made.start()
    with Client(address) as client, pytest.raises(errors.NotFound):
        client.call(TASK, "Pids", task_pb2.PidsRequest(id="a"), task_pb2.PidsResponse, timeout=HANG)
    assert made.look(address, "task.said") == [7, 7, 143, (0, b"hello\n"), "not found", (b"piped", 3)]


def test_a_slot_that_takes_no_process(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def pids(self, request, context):
                slot = self.core.open("a")
                slot.drop()
                self.said.append(await aio.exited(slot))  # at once
                try:
                    aio.spawn_in(slot, ["sleep", "1000"])
                finally:
                    self.said.append(open("/proc/thread-self/children").read())
    """)
    address = made.start()
    with Client(address) as client, pytest.raises(errors.Unknown, match="Invalid argument"):
        client.call(TASK, "Pids", task_pb2.PidsRequest(id="a"), task_pb2.PidsResponse, timeout=HANG)
    status, child = made.look(address, "task.said")
    assert status == 255
    with contextlib.suppress(ProcessLookupError):  # it was killed, and is reaped
        pidfd = os.pidfd_open(int(child))
        assert select.select([pidfd], [], [], HANG)[0]
        os.close(pidfd)


def test_what_belongs_on_the_loop() -> None:
    from shimcore import aio

    with pytest.raises(RuntimeError, match="on its loop"):
        aio.spawn(["true"])


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


def test_exits_of_a_container_are_told_in_order(shim: Shims) -> None:
    made = shim(
        EXITS
        + """
        async def on_exit(self, slot):
            self.said.append(slot.exec_id or slot.container_id)
            if slot.exec_id == "one":
                await self.until_told()
            if slot.container_id == "other" or slot.exec_id == "two":
                self.shim.__dict__.setdefault(f"of_{slot.container_id}", threading.Event()).set()
    class Author(Author):
        def __init__(self, *args):
            super().__init__(*args)
            self.of_c1, self.of_other = threading.Event(), threading.Event()
    """
    )
    with Events(Path(made.ttrpc)):
        address = made.start()
        made.look(address, "[task.make('c1'), task.make('other')]")
        one, two = made.look(address, "[task.make('c1', 'one'), task.make('c1', 'two')]")
        made.look(address, f"task.exit({one})")
        assert made.look(address, INSIDE)  # and stays there
        made.look(address, f"task.exit({two})")
        made.look(address, "task.exit(shim.core.find('other').pid)")
        assert made.look(address, f"shim.of_other.wait({HANG})")  # which nothing has kept waiting
        assert made.look(address, "task.said") == ["one", "other"]
        made.look(address, "shim.go.set()")
        assert made.look(address, f"shim.of_c1.wait({HANG})")
        assert made.look(address, "task.said") == ["one", "other", "done", "two"]
        made.look(address, "task.exit(shim.core.find('c1').pid)")


def test_teardown_comes_before_the_exit_is_told(shim: Shims) -> None:
    made = shim(
        EXITS
        + """
        teardown_timeout = 60.0
        async def teardown(self, slot):
            await self.until_told()
        async def on_exit(self, slot):
            self.said.append("told")
            self.shim.told.set()
    class Author(Author):
        def __init__(self, *args):
            super().__init__(*args)
            self.told = threading.Event()
    """
    )
    with Events(Path(made.ttrpc)):
        address = made.start()
        made.look(address, "task.exit(task.make('c1'))")
        assert made.look(address, INSIDE)
        assert made.look(address, "shim.core.find('c1').phase") == _reaper.EXITED
        made.look(address, "shim.go.set()")
        assert made.look(address, f"shim.told.wait({HANG})")
        assert made.look(address, "task.said") == ["done", "told"]


def test_a_hook_that_fails_does_not_end_the_others(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def on_signal(self, signum):
                if signum == 2:
                    raise SystemExit(1)
                self.shim.ended.set()
    """)
    with log_of(made) as log:
        address = made.start("-debug")
        pid = made.look(address, "os.getpid()")
        for signum in (signal.SIGINT, signal.SIGPIPE):
            os.kill(pid, signum)
        until(log, b"SystemExit")
        assert made.look(address, ENDED)


# ---- the loop's life ----


def test_a_running_loop_from_the_first(shim: Shims) -> None:
    made = shim("""
        class Author(Author):
            def create_task_service(self, publisher):
                self.began = asyncio.get_running_loop().create_task(asyncio.sleep(0))
                return super().create_task_service(publisher)
            async def setup(self):
                await self.began
                self.task.said.append("set up")
    """)
    assert made.look(made.start(), "task.said") == ["set up"]


@pytest.mark.parametrize("what", ["raise ValueError('in setup')", "raise SystemExit(3)"])
def test_a_setup_that_fails(shim: Shims, what: str) -> None:
    done = shim(f"""
        class Author(Author):
            async def setup(self):
                {what}
    """).run("start")
    assert (done.returncode, done.stdout) == (1, "")
    assert "ValueError: in setup" in done.stderr or "exit(3)" in done.stderr


def test_a_create_task_service_that_is_a_coroutine(shim: Shims) -> None:
    done = shim("""
        class Author(Author):
            async def create_task_service(self, publisher):
                return Service(self)
    """).run("start")
    assert done.returncode == 1
    assert "setup" in done.stderr


def test_a_task_of_asyncio_in_another_shim(author: Make) -> None:
    done = author("""
        from shimcore import aio
        class Service(aio.Task):
            async def create(self, request, context):
                pass
        class Author(Author):
            def create_task_service(self, publisher):
                return Service()
    """).run("start")
    assert done.returncode == 1
    assert "Service is a Task of shimcore.aio" in done.stderr


def gone(made: Installed, address: str) -> None:
    """Shutdown has ended the daemon."""
    pidfd = os.pidfd_open(made.look(address, "os.getpid()"))
    made.started.remove(address)
    with contextlib.suppress(errors.Closed), Client(address) as client:
        client.call(TASK, "Shutdown", task_pb2.ShutdownRequest(id="c1"), timeout=HANG)
    assert select.select([pidfd], [], [], HANG)[0], "the daemon does not end"
    os.close(pidfd)


def test_the_end_of_a_loop(shim: Shims) -> None:
    made = shim("""
        class Author(Author):
            async def background(self):
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0)
                    self.say("ended")
            def say(self, word):
                with open("said", "a") as file:
                    file.write(word + " ")
            async def setup(self):
                self.running = asyncio.create_task(self.background())
            async def cleanup(self):
                self.say("cleanup")
                raise ValueError("in cleanup")
    """)
    with log_of(made) as log:
        gone(made, made.start())
        until(log, b"in cleanup")
    assert (made.bundle / "said").read_text() == "cleanup ended "


@pytest.mark.parametrize(
    ("code", "logged"),
    [
        ("while True: await self.heedless()", b"a task does not end"),
        ("threading.Event().wait()", b"blocks its thread"),
    ],
    ids=["a task", "a thread"],
)
def test_a_task_that_refuses_to_end(shim: Shims, code: str, logged: bytes) -> None:
    made = shim(f"""
        import contextlib
        class Author(Author):
            stop_timeout = 0.1
            async def heedless(self):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            async def refuse(self):
                while not self.go.is_set():
                    await asyncio.sleep(0)
                self.inside.set()
                {code}
            async def setup(self):
                self.refusing = asyncio.create_task(self.refuse())
    """)
    with log_of(made) as log:
        address = made.start()
        assert made.look(address, f"shim.go.set() or {INSIDE}")
        pidfd = os.pidfd_open(made.look(address, "os.getpid()"))
        made.look(address, "shim.exit.signal()")
        made.started.remove(address)
        assert select.select([pidfd], [], [], HANG)[0], "the daemon does not end"
        os.close(pidfd)
        until(log, logged)


def test_an_upgrade_in_place(shim: Shims) -> None:
    made = shim("""
        class Service(Service):
            async def create(self, request, context):
                self.said.append(request.id)
                raise errors.NotFound
            def hand_over(self, trial):
                return {"said": self.said}
            def take_over(self, state):
                self.said += state["said"]
        class Author(Author):
            async def setup(self):
                with open("setups", "a") as file:
                    file.write("x")
    """)
    address = made.start()
    pid = made.look(address, "os.getpid()")
    with Client(address) as client:
        with pytest.raises(errors.NotFound):
            create(client, "before")
        done = command(str(pid))
        assert done.returncode == 0, done.stderr
        with pytest.raises(errors.NotFound):
            create(client, "after")
    assert made.look(address, "os.getpid(), task.said") == (pid, ["before", "after"])
    assert (made.bundle / "setups").read_text() == "xx"  # the trial has none


# ---- the page ----


def test_the_pages_shim(author: Make, namespace: str, rootfs: Path) -> None:
    page = (ROOT / "docs" / "asyncio.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```\n", page, re.MULTILINE | re.DOTALL)
    made = author(program + "\nAuthor = Patient\n")
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; exec sleep 1000"]
    with Rig(made.binary, namespace=f"{namespace}-page", rootfs=rootfs, timeout=HANG) as rig:
        for argv, ends in (["sh", "-c", "exit 3"], 3), (["sleep", "1000"], 143), (stubborn, 137):
            session = rig.container(argv)
            session.create()
            session.start()
            if ends > 128:
                if argv is stubborn:
                    soon("ready", lambda session=session: "ready" in session.output)
                session.task.kill(signal.SIGTERM)
            assert session.wait() == ends
            assert session.delete().exit_status == ends


# ---- what it costs others ----


def test_other_shims_have_no_asyncio(author: Make) -> None:
    made = author()
    names = made.look(made.start(), "[name for name in sys.modules if 'asyncio' in name or 'aio' in name]")
    assert names == []


def test_asyncio_is_imported_by_the_daemon_alone() -> None:
    program = "import sys, shimcore.aio; from shimcore.aio import Shim, Task; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=HANG).returncode == 0
