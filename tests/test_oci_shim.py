"""RuncShim: grouping, and what `delete` finds out about a container whose shim has died."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.address import known_address, somebody_answers
from shimcore.bootstrap import Config, StartOpts, parse_flags
from shimcore.errors import NotFound
from shimcore.oci import shim
from shimcore.oci.options import Options
from shimcore.rig import Rig as RealRig
from shimcore.util import write_options


@pytest.mark.parametrize(
    ("annotations", "group"),
    [
        (None, "c1"),
        ({}, "c1"),
        ({"other": "x"}, "c1"),
        ({"io.kubernetes.cri.sandbox-id": "pod"}, "pod"),
        ({"io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "g"}, "g"),
        ({"io.containerd.runc.v2.group": 1}, "c1"),
    ],
)
def test_grouping(annotations: object, group: str) -> None:
    assert shim.grouping({"annotations": annotations}, "c1") == group


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "1000"])
    yield child
    child.kill()
    child.wait()


def delete(tmp_path: Path, address: str = "") -> tuple[int, int]:
    """Runs `delete` for c1 with a runtime that notes its calls; (pid, exit status) as told."""
    bundle = tmp_path / "c1"
    bundle.mkdir(exist_ok=True)
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    runtime.chmod(0o755)
    options = Options()
    options.root = str(tmp_path / "state")
    write_options(str(bundle), options.values())
    (bundle / "runtime").write_text(str(runtime))
    flags = parse_flags(["-namespace", "ns", "-id", "c1", "-address", address, "-bundle", str(bundle), "delete"])
    result = shim.RuncShim("io.containerd.runc.v2-py", flags, Config()).delete_shim()
    return result.pid, result.exit_status


def calls(tmp_path: Path) -> str:
    path = tmp_path / "calls"
    return path.read_text() if path.exists() else ""


def state(tmp_path: Path, text: str) -> None:
    directory = tmp_path / "state" / "ns" / "c1"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "state.json").write_text(text)


def start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_delete_kills_what_still_lives(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    start = start_time(process.pid)
    state(tmp_path, f'{{"init_process_pid":{process.pid},"init_process_start":{start}}}')
    assert delete(tmp_path) == (process.pid, 137)
    assert process.wait(5) == -signal.SIGKILL
    root, log = tmp_path / "state/ns", tmp_path / "c1/log.json"
    assert calls(tmp_path) == f"--root {root} --log {log} --log-format json delete --force c1\n"


def test_delete_never_hits_a_reused_pid(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    state(tmp_path, f'{{"init_process_pid":{process.pid},"init_process_start":{start_time(process.pid) + 1}}}')
    assert delete(tmp_path) == (process.pid, 137)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"init_process_pid":"1","init_process_start":2}'])
def test_delete_with_a_state_that_says_nothing(tmp_path: Path, text: str) -> None:
    state(tmp_path, text)
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/init.pid").write_text("4242")
    assert delete(tmp_path) == (4242, 137)
    assert "delete --force c1" in calls(tmp_path)


def test_delete_does_not_ask_a_runtime_that_has_no_state(tmp_path: Path) -> None:
    assert delete(tmp_path) == (0, 137)
    assert calls(tmp_path) == ""


def test_delete_without_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    flags = parse_flags(["-namespace", "ns", "-id", "c1", "delete"])
    assert shim.RuncShim("x", flags, Config()).delete_shim().exit_status == 137
    os.chdir("/")


def listener(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_delete_removes_a_dead_shims_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = listener(path)
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/address").write_text(f"unix://{path}")
    delete(tmp_path)
    assert path.exists()  # its group's shim lives
    server.close()
    delete(tmp_path)
    assert not path.exists()


# red: a connection that was taken was proof enough, and the sockets stayed
def test_a_shim_that_is_just_dying_is_a_dead_one(tmp_path: Path) -> None:
    """What is left of it holds the listener when `delete` connects, and no longer."""
    path = tmp_path / "s"
    server = listener(path)
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/address").write_text(f"unix://{path}")
    last = os.fork()
    if not last:
        select.select([server], [], [])  # somebody connects: and that was its last moment
        os._exit(0)
    server.close()
    delete(tmp_path)
    os.waitpid(last, 0)
    assert not path.exists()


def test_somebody_answers(tmp_path: Path, shim_dir: Path) -> None:
    with RealRig(shim_dir / "containerd-shim-runc-v2-py") as rig:
        box = rig.container(["true"])
        assert somebody_answers(box.started.address)
        assert not somebody_answers(f"unix://{tmp_path}/nobody")
        box.end()


# red: the address looked for in the shim's own file alone
def test_delete_removes_the_dead_socket_of_a_pod_that_was_joined_without_a_start(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener(path).close()
    (tmp_path / "c1").mkdir()
    written = {"version": 3, "address": f"unix://{path}", "protocol": "ttrpc"}  # by containerd 2.3
    (tmp_path / "c1/bootstrap.json").write_text(json.dumps(written))
    delete(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"address": 7}', '{"address": ""}'])
def test_delete_takes_no_address_from_a_file_that_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/bootstrap.json").write_text(text)
    with pytest.raises(NotFound):
        known_address(str(tmp_path / "c1"))
    assert delete(tmp_path)[1] == 137


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A socket's path is at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="s") as folder:
        yield Path(folder)


# red: the folder of the socket taken for /run/containerd/s wherever containerd has it
@pytest.mark.parametrize("group", ["c1", "pod"])
def test_delete_finds_the_socket_of_a_killed_start_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path, group: str
) -> None:
    bundle = tmp_path / "c1"
    bundle.mkdir()
    if group == "pod":
        spec = {"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}
        (bundle / "config.json").write_text(json.dumps(spec))
    bound = []

    def killed(address: str) -> None:
        bound.append(Path(address.removeprefix("unix://")))
        listener(bound[0]).close()
        raise KeyboardInterrupt

    monkeypatch.chdir(bundle)
    monkeypatch.setattr("shimcore.address.bind_or_reuse", killed)
    opts = StartOpts("c1", address="/containerd", namespace="ns", socket_dir=str(short_folder))
    flags = parse_flags(["-namespace", "ns", "-id", "c1", "-address", "/containerd", "start"])
    with pytest.raises(KeyboardInterrupt):
        shim.RuncShim("io.containerd.runc.v2-py", flags, Config()).start_shim(opts)
    assert bound[0].parent == short_folder and bound[0].exists() and not (bundle / "address").exists()
    delete(tmp_path, "/containerd")
    assert not bound[0].exists()
