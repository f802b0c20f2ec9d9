"""What the shimcore command shows of a daemon that is a pod's sandbox, with no container in it yet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore.cli import checks, nodes
from shimcore.oci.sandbox import NOT_READY, READY
from tests.containerd.daemon import alive, wait_for
from tests.test_oci_sandbox import Shim, shim

__all__ = ["shim"]


def cli(*args: str, before: tuple[str, ...] = ()) -> str:
    command = [*before, sys.executable, "-m", "shimcore.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(pid: int, *before: str) -> dict[str, Any]:
    (found,) = [one for one in json.loads(cli("ps", "--json", before=before)) if one["pid"] == pid]
    return dict(found)


def cells(pid: int) -> dict[str, str]:
    head, *rows = (line.split() for line in cli("ps").splitlines())
    (found,) = [one for one in rows if one[0] == str(pid)]
    return dict(zip(head, found, strict=True))


# red: no word of the sandbox in the dump
def test_a_pods_daemon_is_shown_with_its_sandbox(shim: Shim) -> None:
    assert (row(shim.pid)["containers"], row(shim.pid)["sandbox"], cells(shim.pid)["SANDBOX"]) == (0, None, "-")
    assert json.loads(cli("inspect", shim.id, "--json"))["sandbox"] is None
    shim.create()
    assert (row(shim.pid)["sandbox"], cells(shim.pid)["SANDBOX"]) == (NOT_READY, "notready")
    pause = shim.call("StartSandbox").pid
    assert (row(shim.pid)["sandbox"], cells(shim.pid)["SANDBOX"]) == (READY, "ready")
    assert f"sandbox {shim.id}, ready, pid {pause}\n" in cli("inspect", shim.id)
    told = json.loads(cli("inspect", shim.id, "--json"))["sandbox"]
    assert told == json.loads(cli("dump", shim.id))["task"]["sandbox"]
    assert (told["id"], told["state"], told["pid"], told["bundle"]) == (shim.id, READY, pause, str(shim.bundle))
    assert "exit_status" not in told
    shim.call("StopSandbox")
    assert (row(shim.pid)["sandbox"], cells(shim.pid)["SANDBOX"]) == (NOT_READY, "notready")
    assert json.loads(cli("inspect", shim.id, "--json"))["sandbox"]["exit_status"] == 137


# red: /proc/net/unix, which is of the reader's own network namespace: every column was "-"
def test_a_shim_in_another_network_namespace_is_asked_too(shim: Shim) -> None:
    shim.create()
    shim.call("StartSandbox")
    found = row(shim.pid, "unshare", "--net")
    assert (found["sandbox"], found["containers"], bool(found["debug"])) == (READY, 0, True)


# red: the same: doctor told to remove the socket of a shim that lives
def test_doctor_knows_listeners_of_other_network_namespaces(tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    assert elsewhere.stdout is not None and elsewhere.stdout.readline() == "listening\n"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    advice = [one.advice for one in checks.examine([], str(tmp_path), tmp_path / "none")]
    assert f"rm {tmp_path}/dead" in advice and f"rm {tmp_path}/alive" not in advice


# red: one read, of which the kernel had left out a line: a shim without a debug socket, now and then
def test_a_listener_that_one_read_misses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    head, line = "Num RefCount Protocol Flags Type St Inode Path\n", "0: 2 0 00010000 0001 01 {} /s/{}\n"
    reads = [head + line.format(1, "a"), head + line.format(2, "b"), head + line.format(1, "a") + line.format(2, "b")]
    monkeypatch.setattr(nodes, "_unix_sockets", lambda name: reads.pop(0) if len(reads) > 1 else reads[0])
    assert nodes.listeners() == {"/s/a": "1", "/s/b": "2"}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Who listens on tmp_path/alive in a network namespace of its own."""
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); "
    code += "print('listening', flush=True); sys.stdin.read()"
    command = ["unshare", "--net", sys.executable, "-c", code, str(tmp_path / "alive")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
    wait_for("end of it", lambda: not alive(process.pid))
