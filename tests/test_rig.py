"""The rig: real containers under the stock shim and under ours by the same tests, and the rig's own
honesty."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shimcore.errors import Closed, DeadlineExceeded, NotFound, ShimError, Unknown
from shimcore.protos import types_pb2
from shimcore.rig import DOWN, UP, ActivationError, LeakError, Rig
from shimcore.rig.activate import GENERATIONS
from shimcore.rig.leaks import MARKER, alive

STOCK = Path("/usr/bin/containerd-shim-runc-v2")
OURS = "containerd-shim-runc-v2-py"
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=["stock", "ours"])
def shim(request: pytest.FixtureRequest) -> Path:
    if request.param == "stock":
        if not STOCK.exists():
            pytest.skip(f"{STOCK} is not installed")
        return STOCK
    if not (REPO / "shimcore/shim.py").exists() or not list((REPO / "shimcore").glob("_ttrpc*.so")):
        pytest.skip("our shim is not built (make build)")
    directory: Path = request.getfixturevalue("shim_dir")
    return directory / OURS


@pytest.fixture
def rig(shim: Path, rootfs: Path) -> Iterator[Rig]:
    """Leaving it checks that nothing is left behind."""
    with Rig(shim, rootfs=rootfs) as rig:
        yield rig


@pytest.fixture
def stock(rootfs: Path) -> Iterator[Rig]:
    """For tests of the rig itself, which one shim is enough for."""
    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    with Rig(STOCK, rootfs=rootfs, strict=False) as rig:
        yield rig


# ---- containers --------------------------------------------------------------------------------------------


def test_a_whole_life(rig: Rig) -> None:
    container = rig.container(["sh", "-c", "echo out; echo err >&2; exit 42"])
    assert container.run() == 42
    assert (container.output, container.errors) == ("out\n", "err\n")
    rig.events.wait("/tasks/exit", container=container.id)
    before = time.time_ns()
    answer = container.delete()
    rig.events.wait("/tasks/delete", container=container.id)

    assert rig.events.topics(container.id) == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    create, start, exit, delete = (event.message for event in container.events)
    assert create.bundle == str(container.bundle.path)
    assert (create.io.stdout, create.io.stderr) == (container.stdio.stdout, container.stdio.stderr)
    assert {create.pid, start.pid, exit.pid, delete.pid, answer.pid} == {container.pid}
    assert exit.id == container.id
    assert exit.exit_status == delete.exit_status == answer.exit_status == 42
    assert 0 < exit.exited_at.ToNanoseconds() == answer.exited_at.ToNanoseconds() <= before
    assert all(event.namespace == rig.namespace and event.answered for event in container.events)
    assert container.deleted is not None and not container.bundle.path.exists()
    socket = container.started.address.removeprefix("unix://")
    until = time.monotonic() + 30.0
    while os.path.exists(socket):  # the shim removes it once it has answered Shutdown
        assert time.monotonic() < until
        time.sleep(0.005)


def test_execs(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    first = container.exec(["sh", "-c", "echo $WHO; pwd; exit 7"], env=["PATH=/bin", "WHO=me"], cwd="/tmp")
    assert first.wait() == 7
    exit = rig.events.wait("/tasks/exit", container=container.id, process=first.id)
    assert (exit.message.pid, exit.message.exit_status) == (first.pid, 7)
    assert first.delete() == 7
    assert first.stdio.output() == b"me\n/tmp\n"

    second = container.exec(["sleep", "1000"])
    assert container.task.state(second.id).status == 2
    container.task.kill(signal.SIGTERM, second.id)
    assert second.wait() == 128 + signal.SIGTERM
    rig.events.wait("/tasks/exit", container=container.id, process=second.id)
    container.task.kill(signal.SIGKILL)
    assert container.wait() == 137
    rig.events.wait("/tasks/exit", container=container.id, process="")
    second.delete()
    container.delete()

    for process in (first, second):
        topics = [event.topic for event in container.events if event.process == process.id]
        assert topics[:3] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    exits = [event.process for event in container.events if event.topic == "/tasks/exit"]
    assert exits == [first.id, second.id, ""]


def test_kill_and_states(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    assert container.task.state().status == 1
    container.start()
    state = container.task.state()
    assert (state.status, state.pid) == (2, container.pid)
    assert container.pid in container.task.pids()
    with pytest.raises(ShimError):
        container.task.delete()
    container.task.kill(signal.SIGKILL)
    assert container.wait() == 137
    rig.events.wait("/tasks/exit", container=container.id)
    assert container.task.state().status == 3
    with pytest.raises(NotFound):
        container.task.kill(signal.SIGKILL)
    assert container.wait() == 137
    container.delete()
    assert len([event for event in container.events if event.topic == "/tasks/exit"]) == 1


def test_stdin_until_close_io(rig: Rig) -> None:
    container = rig.container(["cat"], stdin=True)
    container.create()
    container.start()
    container.stdio.write(b"one\n")
    container.stdio.write(b"two\n")
    with pytest.raises(DeadlineExceeded):
        container.wait(timeout=0.2)
    container.close_stdin()
    assert container.wait() == 0
    container.stdio.drain()
    assert container.output == "one\ntwo\n"
    container.delete()


def test_mounts_are_the_shims(rig: Rig) -> None:
    spec = json.loads((rig.container(["true"]).bundle.path / "config.json").read_text())
    spec["root"]["path"] = "rootfs"
    spec["linux"]["cgroupsPath"] = f"/{rig.namespace}/m"
    spec["process"]["args"] = ["ls", "/bin/busybox"]
    container = rig.container(id="m", spec=spec)
    mount = types_pb2.Mount(type="bind", source=str(rig.rootfs), options=["rbind", "rw"])
    container.create(rootfs=[mount])
    assert rig.leaks.mounts() == [str(container.bundle.path / "rootfs")]
    # A bind mount on the same filesystem is one that os.path.ismount denies; its source must live.
    with pytest.raises(OSError, match="still mounted"):
        container.bundle.remove()
    assert (rig.rootfs / "bin/busybox").exists()
    container.start()
    assert container.wait() == 0
    container.stdio.drain()
    assert container.output == "/bin/busybox\n"
    container.delete()
    assert not rig.leaks.mounts()


def test_create_that_fails(rig: Rig) -> None:
    container = rig.container(["/no/such/program"])
    with pytest.raises(Unknown, match=r"OCI runtime create failed.*no such file"):
        container.create()
    with pytest.raises(NotFound):
        container.task.delete()
    container.end()
    assert "/tasks/exit" not in rig.events.topics(container.id)


def test_shim_killed_under_a_running_container(shim: Path, rootfs: Path) -> None:
    with Rig(shim, rootfs=rootfs, strict=False) as rig:
        container = rig.container(["sleep", "1000"])
        container.create()
        container.start()
        closed = threading.Event()
        container.client.on_close(lambda error: closed.set())
        container.kill_shim()
        assert closed.wait(5)
        with pytest.raises(Closed):
            container.task.state()
        assert alive(container.pid)
        deleted = container.cleanup()
        assert (deleted.pid, deleted.exit_status) == (container.pid, 137)
        assert not alive(container.pid)
    socket = container.started.address.removeprefix("unix://")
    # C6: the stock shim's delete leaves the socket file of the shim that was killed.
    assert rig.left == ([f"socket {socket}"] if shim == STOCK else [])


def test_a_restarted_containerd_finds_the_shim_again(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    rig.events.wait("/tasks/start", container=container.id)
    rig.events.set_mode(DOWN)
    container.reconnect()
    assert container.task.state().status == 2
    rig.events.set_mode(UP)
    container.task.kill()
    assert container.wait() == 137
    exit = rig.events.wait("/tasks/exit", container=container.id, timeout=20)
    assert exit.connection > 1
    container.delete()


def test_containers_side_by_side(rig: Rig) -> None:
    def life(number: int) -> tuple[int, str]:
        container = rig.container(["sh", "-c", f"echo {number}; exit {number}"])
        status = container.run(timeout=60)
        rig.events.wait("/tasks/exit", container=container.id)
        container.delete()
        return status, container.output

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(life, range(8))) == [(number, f"{number}\n") for number in range(8)]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_containerd(shim: Path, rootfs: Path, generation: str) -> None:
    with Rig(shim, rootfs=rootfs, generation=generation) as rig:
        if (shim, generation) == (STOCK, "2.3"):
            with pytest.raises(ActivationError, match="type with url"):
                rig.container(["true"])
            return
        container = rig.container(["sh", "-c", "exit 5"])
        assert container.run() == 5
        container.delete()


def test_terminal(rig: Rig) -> None:
    container = rig.container(["sh", "-c", "tty; exit 4"], terminal=True)
    container.create()
    container.task.resize_pty(80, 25)
    container.start()
    assert container.wait() == 4
    container.stdio.drain()
    assert container.output.startswith("/dev/pts/")
    container.delete()


def test_leaving_ends_what_still_runs(shim: Path, rootfs: Path) -> None:
    with Rig(shim, rootfs=rootfs) as rig:
        running = rig.container(["sleep", "1000"])
        running.create()
        running.start()
        rig.container(["sleep", "1000"]).create()
        rig.container(["sleep", "1000"])
    assert rig.left == []
    assert not alive(running.pid) and not alive(running.shim_pid)
    assert not rig.root.exists()


# ---- the command line --------------------------------------------------------------------------------------


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shimcore.rig", "run", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_line(shim: Path) -> None:
    done = _run("--shim", str(shim), "--json", "--env", "WHO=me", "--", "sh", "-c", "echo $WHO; exit 42")
    assert done.returncode == 42, done.stderr
    report = json.loads(done.stdout)
    assert (report["exit_code"], report["stdout"], report["left"], report["error"]) == (42, "me\n", [], "")
    events = [step["what"] for step in report["steps"] if step["kind"] == "event"]
    assert events == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    times = [step["at"] for step in report["steps"]]
    assert times == sorted(times) and times[0] > 0


def test_command_line_by_default_and_when_it_fails(shim: Path) -> None:
    done = _run("--shim", str(shim))
    assert done.returncode == 0 and "Hello from a container" in done.stdout
    assert "nothing left behind" in done.stdout
    done = _run("--shim", str(shim), "--", "/no/such/program")
    assert done.returncode == 125 and "no such file" in done.stdout
    assert _run("--shim", "/no/such/shim").returncode == 125


# ---- the rig does not say "nothing left" when something is -------------------------------------------------


def test_a_stray_process_is_found_and_ended(stock: Rig) -> None:
    stray = subprocess.Popen(["sleep", "1000"], env={**os.environ, MARKER: stock.leaks.marker})
    other = subprocess.Popen(["sleep", "1000"], env={**os.environ, MARKER: "another"})
    try:
        left = stock.close()
        assert left == [f"process {stray.pid}: sleep 1000"]
        assert stray.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        stray.kill()
        stray.wait()


def test_stray_socket_mount_and_cgroup_are_found_and_removed(stock: Rig) -> None:
    container = stock.container(["true"])
    container.kill_shim()
    container.client.close()
    stock.forget(container)
    container.bundle.close()
    container.stdio.close()
    group = Path("/sys/fs/cgroup/pids") / stock.namespace / "stray"
    if not group.parents[1].is_dir():
        group = Path("/sys/fs/cgroup") / stock.namespace / "stray"
    group.mkdir(parents=True)
    point = stock.root / "stray mount"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    socket = container.started.address.removeprefix("unix://")
    left = stock.close()
    assert left == [f"mount {point}", f"socket {socket}", f"cgroup {group}"]
    assert not any(os.path.exists(path) for path in (point, socket, group, group.parent, stock.root))


def test_a_strict_rig_raises(rootfs: Path) -> None:
    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    with pytest.raises(LeakError) as caught, Rig(STOCK, rootfs=rootfs) as rig:
        stray = subprocess.Popen(["sleep", "1000"], env={**os.environ, MARKER: rig.leaks.marker})
    stray.wait(5)
    assert caught.value.left == [f"process {stray.pid}: sleep 1000"]


def test_no_such_shim() -> None:
    with pytest.raises(FileNotFoundError):
        Rig("containerd-shim-of-nobody-v9")


def test_the_rigs_own_threads_and_fds_do_not_add_up(rootfs: Path) -> None:
    def life() -> tuple[int, int]:
        with Rig(STOCK, rootfs=rootfs) as rig:
            container = rig.container(["true"])
            assert container.run() == 0
            container.delete()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    before = life()
    for _ in range(3):
        after = life()
    assert after == before
