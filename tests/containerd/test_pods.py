"""Containers that share one shim, grouped as CRI groups a pod's; and a terminal, as a person at one sees it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess

import pytest

from tests.containerd.conftest import TRAPPED, Box
from tests.containerd.cri import containerd_version
from tests.containerd.daemon import alive, wait_for
from tests.containerd.test_run import trapped

pytestmark = pytest.mark.usefixtures("nothing_left")

GROUP = "io.kubernetes.cri.sandbox-id"


def member(box: Box, group: str, *namespaces: str) -> tuple[str, int]:
    """A container of a group, which joins the given namespaces; its id and init's pid."""
    name = box.name() if group in box.ids else group
    box.ids.append(name)
    flags = [word for one in namespaces for word in ("--with-ns", one)]
    box.run(name, "/bin/sh", "-c", TRAPPED, flags=("-d", "--annotation", f"{GROUP}={group}", *flags))
    return name, box.daemon.tasks()[name][0]


def end(box: Box, name: str, pid: int) -> int:
    wait_for("trap", lambda: trapped(pid))
    box.daemon.ctr("task", "kill", "-s", "SIGTERM", name)
    box.wait_status(name, "STOPPED")
    return box.rm(name)


def test_a_pod_has_one_shim(box: Box) -> None:
    group = f"pod{os.getpid()}x{len(box.runtime)}"
    _, pause = member(box, group)
    shim = box.daemon.shim_pid(group)
    members = [member(box, group, f"network:/proc/{pause}/ns/net", f"ipc:/proc/{pause}/ns/ipc") for _ in range(3)]
    for _, pid in members:
        assert os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{pause}/ns/net")
    for name, _ in members:
        assert box.daemon.shim_socket(name) == box.daemon.shim_socket(group)
    # Each ends by itself, with its own code, and the rest live on.
    assert [end(box, name, pid) for name, pid in members] == [7, 7, 7]
    assert box.status(group) == "RUNNING" and alive(shim)
    assert end(box, group, pause) == 7
    wait_for("end of the shim", lambda: not alive(shim))


def test_the_version_of_the_task_api(box: Box) -> None:
    """Of what `start` has answered, as containerd keeps it. 1.6 keeps the plain address alone, which is version 2."""
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    kept = box.daemon.bundle(name) / "bootstrap.json"
    version = json.loads(kept.read_text())["version"] if kept.exists() else 2
    since = (2, 3) if box.ours else (2, 0)
    assert version == (3 if containerd_version() >= since else 2)
    assert end(box, name, pid) == 7


def test_a_pod_outlives_containerd(box: Box) -> None:
    group = f"pod{os.getpid()}y{len(box.runtime)}"
    _, pause = member(box, group)
    name, pid = member(box, group)
    box.daemon.restart()
    assert box.daemon.tasks() == {group: (pause, "RUNNING"), name: (pid, "RUNNING")}
    assert box.exec(name, "/bin/echo", "still here").stdout == "still here\n"
    assert end(box, name, pid) == 7
    assert end(box, group, pause) == 7


def test_a_killed_pod_shim_takes_its_containers_along(box: Box) -> None:
    group = f"pod{os.getpid()}z{len(box.runtime)}"
    _, pause = member(box, group)
    name, pid = member(box, group)
    socket = box.daemon.shim_socket(group)
    with box.daemon.events() as events:
        os.kill(box.daemon.shim_pid(group), signal.SIGKILL)
        for one in (group, name):
            assert events.wait(one, "/tasks/exit").body["exit_status"] == 137
    wait_for("end of the containers", lambda: not alive(pause) and not alive(pid))
    wait_for("end of the tasks", lambda: box.daemon.tasks() == {})
    wait_for("end of the bundles", lambda: not any(box.daemon.bundle(one).exists() for one in (group, name)))
    for one in (group, name):
        box.daemon.ctr("container", "rm", one)
    if not box.ours:
        socket.unlink(missing_ok=True)  # 1.6's stock shim leaves it
    assert not socket.exists()


def test_a_terminal(box: Box) -> None:
    name = box.name()
    master, slave = pty.openpty()
    command = ["ctr", "--address", str(box.daemon.address), "--namespace", box.daemon.namespace, "run", "--rm", "-t"]
    command += ["--runtime", box.runtime, "--fifo-dir", str(box.daemon.fifos), "--rootfs", str(box.rootfs), name]
    # ctr may end before it has shown everything: what is looked for comes while the command still waits.
    script = 'test -t 0 && test -t 1 && read one && echo "got $one" && read two && exit 6'
    process = subprocess.Popen([*command, "/bin/sh", "-c", script], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        os.write(master, b"hello\n")
        shown = b""
        while b"got hello\r" not in shown:
            shown += os.read(master, 4096)  # EIO once ctr has gone
        os.write(master, b"bye\n")
        assert process.wait(30) == 6, shown
    finally:
        os.close(master)
        process.kill()
        process.wait()
