"""The guard of the session sees each kind of thing that a test can leave: with one there it says so."""

from __future__ import annotations

import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.testing.leaks import CGROUPS, MARKER, Guard


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """One of the test's own, which the session's does not answer for."""
    sockets = tmp_path / "s"
    sockets.mkdir()
    (sockets / "from-before").touch()
    marker = uuid.uuid4().hex
    made = Guard(marker, f"leak-{marker[:8]}", [tmp_path], sockets)
    assert made.find() == []
    yield made
    made.clean()
    assert made.settle() == []


def test_a_process_with_our_marker(guard: Guard) -> None:
    # Its parent ends at once, so that nothing but the marker ties it to us.
    script = "sleep 100 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.check_output(["sh", "-c", script], env={**os.environ, MARKER: guard.marker}))
    assert guard.find() == [f"process {pid}: sleep 100"]


def test_a_child_without_it(guard: Guard) -> None:
    child = subprocess.Popen(["sleep", "100"], env={"PATH": os.environ["PATH"]})
    assert guard.find() == [f"process {child.pid}: sleep 100"]
    child.kill()
    child.wait()


def test_another_sessions_process_is_not_ours(guard: Guard) -> None:
    env = {**os.environ, MARKER: "other"}
    pid = int(subprocess.check_output(["sh", "-c", "sleep 100 >/dev/null 2>&1 & echo $!"], env=env))
    assert guard.find() == []
    os.kill(pid, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_mount(guard: Guard) -> None:
    point = guard.roots[0] / "a place"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    assert guard.find() == [f"mount {point}"]


def test_a_socket_that_nobody_serves(guard: Guard) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guard.sockets / "stale"))
        listener.listen()
    assert guard.find() == [f"socket {guard.sockets / 'stale'}"]


def test_a_socket_that_a_stranger_serves_is_not_ours(guard: Guard) -> None:
    # We listen, but without the marker: as a shim of another session would.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guard.sockets / "theirs"))
        listener.listen()
        assert guard.find() == []
    (guard.sockets / "theirs").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")
def test_a_cgroup_and_what_runs_in_it(guard: Guard) -> None:
    hierarchy = next(one for one in (CGROUPS / "pids", CGROUPS / "unified", CGROUPS) if one.is_dir())
    group = hierarchy / guard.prefix / "container"
    group.mkdir(parents=True)
    assert guard.find() == [f"cgroup {group}"]
    script = f"sleep 100 >/dev/null 2>&1 & echo $! >{group}/cgroup.procs; echo $!"
    pid = int(subprocess.check_output(["sh", "-c", script], env={"PATH": os.environ["PATH"]}))
    assert guard.find() == [f"process {pid}: sleep 100", f"cgroup {group}"]
