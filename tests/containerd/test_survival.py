"""containerd dies and comes back; the shim dies and does not."""

from __future__ import annotations

import os
import signal

import pytest

from tests.containerd.conftest import TRAPPED, Box
from tests.containerd.daemon import alive, wait_for
from tests.containerd.test_run import trapped

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_container_outlives_containerd(box: Box) -> None:
    daemon = box.daemon
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    shim = daemon.shim_pid(name)
    daemon.kill9()
    assert alive(pid) and alive(shim)
    daemon.start()
    assert daemon.tasks()[name] == (pid, "RUNNING")
    assert daemon.shim_pid(name) == shim
    assert box.exec(name, "/bin/echo", "still here").stdout == "still here\n"
    wait_for("trap", lambda: trapped(pid))
    daemon.ctr("task", "kill", "-s", "SIGTERM", name)
    box.wait_status(name, "STOPPED")
    assert box.rm(name) == 7
    wait_for("end of the shim", lambda: not alive(shim))


def test_an_exit_while_containerd_is_away_keeps_its_code(box: Box) -> None:
    daemon = box.daemon
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    wait_for("trap", lambda: trapped(pid))
    daemon.kill9()
    os.kill(pid, signal.SIGTERM)
    wait_for("end of the container", lambda: not alive(pid))
    daemon.start()
    assert box.status(name) == "STOPPED"
    assert box.rm(name) == 7


def test_a_shim_killed_is_cleaned_up_after(box: Box) -> None:
    daemon = box.daemon
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    socket = daemon.shim_socket(name)
    with daemon.events() as events:
        os.kill(daemon.shim_pid(name), signal.SIGKILL)
        ended = events.wait(name, "/tasks/exit")
        events.wait(name, "/tasks/delete")
    assert ended.body["pid"] == pid and ended.body["exit_status"] == 137
    wait_for("end of the container", lambda: not alive(pid))
    wait_for("end of the task", lambda: box.status(name) == "GONE")
    wait_for("end of the bundle", lambda: not daemon.bundle(name).exists())
    daemon.ctr("container", "rm", name)
    if box.ours:
        assert not socket.exists()
    else:
        # 1.6's stock shim leaves the socket of a killed daemon where it was.
        socket.unlink(missing_ok=True)
