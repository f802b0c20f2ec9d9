"""shimcore.aio: processes and exits, and the life of the loop, in real daemons."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shimcore import _reaper, aio, errors
from shimcore.protos import task_pb2
from shimcore.rig import Events, Rig
from shimcore.rig.templates import end_templates
from shimcore.ttrpc import Client
from tests.aio_authors import ENDED, EXITS, INSIDE, Shims, create, gone, shim
from tests.authors import HANG, TASK, Make, author, log_of, until
from tests.upgrades import command
from tests.upgrades import until as soon

__all__ = ["author", "shim"]

ROOT = Path(__file__).resolve().parent.parent


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
    with pytest.raises(RuntimeError, match="on its loop"):
        aio.spawn(["true"])


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
        soon("acknowledged", lambda: made.look(address, "shim.core.stats()['acknowledged'] == 4"))


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
        soon("acknowledged", lambda: made.look(address, "shim.core.stats()['acknowledged'] == 1"))


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
            async def on_exit(self, slot):
                pass
        class Author(Author):
            def create_task_service(self, publisher):
                return Service()
    """).run("start")
    assert done.returncode == 1
    assert "Service is a Task of shimcore.aio" in done.stderr


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


def test_a_daemon_of_the_template(shim: Shims, tmp_path: Path) -> None:
    """It is a fork of what has asyncio already, and makes its loop itself."""
    made = shim("""
        class Service(Service):
            async def create(self, request, context):
                await asyncio.sleep(0)
                raise errors.NotFound("by the loop")
    """)
    trace = tmp_path / "trace"
    templates = str(tmp_path / "t")
    env = {"SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": templates, "SHIMCORE_TEMPLATE_TRACE": str(trace)}

    def warm() -> str:
        address = made.start(env=env)
        if trace.read_text().splitlines()[-1].strip() == "warm":
            return address
        made.stop(address)
        return ""

    try:
        address = soon("template", warm)
        with Client(address) as client, pytest.raises(errors.NotFound, match="by the loop"):
            create(client, "a")
        made.stop(address)
    finally:
        end_templates(templates)


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
