"""Trials E: stdio and logs. Each says what would turn it red. E8 stands in tests/test_oci_binlog.py."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.errors import Unknown
from shimcore.rig import DOWN, UP, Rig, Session
from tests.faults import FULL, Lab, Later, scale, until


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def fifos(folder: Path) -> tuple[str, str, str]:
    paths = []
    for name in ("in", "out", "err"):
        os.mkfifo(folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1], paths[2]


def create(session: Session, paths: tuple[str, str, str]) -> None:
    stdin, stdout, stderr = paths
    session.pid = session.task.create(
        str(session.bundle.path), stdin=stdin, stdout=stdout, stderr=stderr, options=session.rig.options, timeout=20
    )


def end(session: Session) -> None:
    session.task.kill(9)
    session.wait()
    session.delete()


# red: the write end opened before a read end: both wait for the client
def test_E1_a_client_that_opens_no_fifo(rig: Rig, tmp_path: Path) -> None:
    container = rig.container(["sh", "-c", "echo said; sleep 100"])
    create(container, fifos(tmp_path))
    container.start(timeout=20)
    end(container)


# red: our write end closed at the exit although bytes are unread
def test_E2_a_reader_that_comes_late(rig: Rig, tmp_path: Path) -> None:
    container = rig.container(["sh", "-c", "seq 1 5000; exit 4"])
    paths = fifos(tmp_path)
    create(container, paths)
    container.start()
    assert container.wait() == 4
    time.sleep(scale(0, 25))
    with open(paths[1]) as reader:
        assert reader.read().split() == [str(number) for number in range(1, 5001)]
    container.delete()


# red: block: our read end left out: the container gets SIGPIPE; drop, spill: readers not watched: Wait does not answer
@pytest.mark.parametrize("policy", ["block", "drop", "spill"])
def test_E3_output_while_containerd_is_away(rig: Rig, tmp_path: Path, policy: str) -> None:
    """Megabytes to nobody: the policy holds, the shim's memory stays, and the exit is told on containerd's return."""
    count = scale(600_000, 6_000_000)
    wanted = "".join(f"{number}\n" for number in range(1, count + 1)).encode()
    annotation = {} if policy == "block" else {"io.shimcore.stdio": f"{policy},after=0.2,max={1 << 28}"}
    container = rig.container(["sh", "-c", f"seq 1 {count}; exit 9"], annotations=annotation)
    paths = fifos(tmp_path)
    create(container, paths)
    first = os.open(paths[1], os.O_RDONLY | os.O_NONBLOCK)
    container.start()
    pieces: list[bytes] = []
    until(lambda: pieces.append(_read(first)) or pieces[-1])
    os.close(first)
    read = sum(map(len, pieces))
    rig.events.set_mode(DOWN)
    container.reconnect()
    before = private(container.shim_pid)
    if policy == "block":
        # It waits in its write, and a reader that comes gets all that follows.
        assert container.task.state().status == 2  # RUNNING
        reading = Later(lambda: Path(paths[1]).read_bytes())
        assert container.wait(timeout=120) == 9
        rest = reading.result(60)
        assert len(rest) == len(wanted) - read and wanted.endswith(rest)
    else:
        assert container.wait(timeout=120) == 9
    assert private(container.shim_pid) - before < 2048
    if policy == "spill":
        kept = container.bundle.work / "stdout.spill"
        # What is in the FIFO at the end follows when it has been looked at.
        until(lambda: kept.stat().st_size == len(wanted) - read)
        assert wanted.endswith(kept.read_bytes())
    rig.events.set_mode(UP)
    assert rig.events.wait("/tasks/exit", container=container.id, timeout=60).message.exit_status == 9
    container.delete(timeout=60)


def private(pid: int) -> int:
    """kB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


# red: our read end left out: the container gets SIGPIPE
def test_E4_a_reader_that_leaves_while_the_container_writes(rig: Rig, tmp_path: Path) -> None:
    container = rig.container(["sh", "-c", "while :; do echo line || exit 7; done"])
    paths = fifos(tmp_path)
    create(container, paths)
    for _ in range(3):
        fd = os.open(paths[1], os.O_RDONLY | os.O_NONBLOCK)
        if not container.task.state().pid or container.task.state().status == 1:
            container.start()
        until(lambda: _read(fd))  # noqa: B023
        os.close(fd)
    time.sleep(0.05)
    assert container.task.state().status == 2  # RUNNING
    end(container)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


# red: a log line written by a blocking write: the first RPC that logs hangs
@pytest.mark.parametrize("kind", ["no reader", "full"])
def test_E5_a_log_that_nobody_reads_blocks_nothing(lab: Lab, tmp_path: Path, kind: str) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    mute = os.open(fifo, os.O_RDWR | os.O_NONBLOCK) if kind == "full" else -1
    if mute >= 0:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(mute, b"x" * 4096)
    lab.call("log_to", path=str(fifo))
    before = lab.process()["cpu"]
    for _ in range(50):
        with pytest.raises(Unknown, match="ZeroDivisionError"):
            lab.call("divide")
    dropped = lab.call("log_to", path=str(lab.session.bundle.path / "log"))
    assert dropped >= 49  # the last one is logged after its answer
    assert lab.process()["cpu"] - before < 5
    if mute >= 0:
        os.close(mute)


# red: the exit held back until the output's end has been read
def test_E6_a_process_left_behind_delays_no_exit(rig: Rig, tmp_path: Path) -> None:
    """The child keeps stdout open, and dies with its pid namespace; an exec's lives on."""
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    paths = fifos(tmp_path)
    process = {"args": ["sh", "-c", "sleep 900 & exit 6"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    container.task.exec("parent", process, stdin=paths[0], stdout=paths[1], stderr=paths[2])
    began = time.monotonic()
    container.task.start("parent")
    event = rig.events.wait("/tasks/exit", container=container.id, process="parent")
    took = time.monotonic() - began
    assert event.message.exit_status == 6
    assert took < (0.5 if FULL else 20), f"{took:.3f} s from Start"
    assert container.task.delete("parent", timeout=20).exit_status == 6
    end(container)


# red: OUTPUT_CAP left out: the whole MiB is in the error
def test_E7_a_runtime_that_says_too_much(rig: Rig, tmp_path: Path) -> None:
    loud = tmp_path / "loud-runtime"
    fails = 'case "$*" in *" start "*) yes "the runtime says" | head -c 1048576 >&2; exit 1;; esac'
    loud.write_text(f'#!/bin/sh\n{fails}\nexec runc "$@"\n')
    loud.chmod(0o755)
    container = rig.container(["true"])
    options = type(rig.options)()
    options.CopyFrom(rig.options)
    options.binary_name = str(loud)
    container.task.create(str(container.bundle.path), options=options)
    with pytest.raises(Unknown, match="OCI runtime start failed") as failed:
        container.start()
    assert "the runtime says" in str(failed.value) and len(str(failed.value)) < 10_000
    end(container)
