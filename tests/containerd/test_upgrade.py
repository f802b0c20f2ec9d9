"""Our shim gets new code under a containerd that runs: containerd's one connection to it stays, and so does the task."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.containerd.conftest import OURS, TRAPPED, Box
from tests.containerd.daemon import Containerd, alive, wait_for
from tests.containerd.test_run import trapped
from tests.upgrades import Copy, command, parent

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def runtime(shim_dir: Path) -> str:
    return OURS


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def upgrade(daemon: Containerd, shim: int, copy: Copy) -> None:
    version = copy.change()
    done = command(str(shim), "--to", str(copy.binary))
    assert done.returncode == 0 and done.stdout.split("\n")[1].split()[4] == version, done


def test_containerd_notices_nothing(box: Box, copy: Copy) -> None:
    daemon = box.daemon
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    wait_for("trap", lambda: trapped(pid))
    shim = daemon.shim_pid(name)
    ctr = ["ctr", "--address", str(daemon.address), "--namespace", daemon.namespace, "task", "exec", "--exec-id", "long"]
    ctr += ["--fifo-dir", str(daemon.fifos), name, "/bin/sh", "-c", "echo begun; read x; echo $x; exit 9"]
    with daemon.events() as events, subprocess.Popen(ctr, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin and client.stdout and client.stdout.readline() == "begun\n"
        for _ in range(3):
            upgrade(daemon, shim, copy)
            assert daemon.tasks()[name] == (pid, "RUNNING")
            assert box.exec(name, "/bin/echo", "here").stdout == "here\n"
        assert daemon.shim_pid(name) == shim and parent(pid) == shim
        client.stdin.write("read\n")
        client.stdin.flush()
        assert client.stdout.readline() == "read\n" and client.wait(60) == 9
        daemon.ctr("task", "kill", "-s", "SIGTERM", name)
        ended = events.wait(name, "/tasks/exit")
        box.wait_status(name, "STOPPED")
        assert box.rm(name) == 7
        events.wait(name, "/tasks/delete")
        of_init = [one for one in events.of(name) if one.topic == "/tasks/exit" and one.body["pid"] == pid]
        assert len(of_init) == 1 and ended.body["container_id"] == name
    wait_for("end of the shim", lambda: not alive(shim))


def test_containerd_restarts_after_it(box: Box, copy: Copy) -> None:
    daemon = box.daemon
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    wait_for("trap", lambda: trapped(pid))
    shim = daemon.shim_pid(name)
    daemon.kill9()
    upgrade(daemon, shim, copy)  # while containerd is away
    daemon.start()
    assert daemon.tasks()[name] == (pid, "RUNNING")
    upgrade(daemon, shim, copy)
    assert box.exec(name, "/bin/echo", "here").stdout == "here\n"
    daemon.ctr("task", "kill", "-s", signal.Signals(signal.SIGTERM).name, name)
    box.wait_status(name, "STOPPED")
    assert box.rm(name) == 7
    wait_for("end of the shim", lambda: not alive(shim))
