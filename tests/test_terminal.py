"""Terminals of real containers, under the stock shim and under ours by the same tests; then what only ours promises."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore import logger
from shimcore.errors import InvalidArgument, ShimError
from shimcore.oci.relay import carry
from shimcore.rig import Rig

STOCK = Path("/usr/bin/containerd-shim-runc-v2")
OURS = "containerd-shim-runc-v2-py"
HANG = 60.0


def until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module", params=["stock", "ours"])
def shim(request: pytest.FixtureRequest, shim_dir: Path) -> Path:
    if request.param == "ours":
        return shim_dir / OURS
    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    return STOCK


@pytest.fixture
def rig(shim: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim, rootfs=rootfs) as rig:
        yield rig


@pytest.fixture
def ours(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / OURS, rootfs=rootfs) as rig:
        yield rig


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def is_terminal(pid: int, fd: str) -> bool:
    try:
        return "ptmx" in os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return False


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_shell_is_typed_at(rig: Rig) -> None:
    container = rig.container(["sh"], terminal=True, stdin=True)
    container.create()
    container.start()
    container.stdio.write(b"tty; echo $((6 * 7)); exit 3\r")
    assert container.wait() == 3
    assert container.stdio.drain(HANG)
    said = container.output
    assert "/dev/pts/" in said and "42\r\n" in said
    container.delete()


def test_an_exec_has_a_terminal_of_its_own(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    shell = container.exec(["sh"], terminal=True, stdin=True)
    shell.stdio.write(b"tty; exit 5\r")
    assert container.task.wait(shell.id).exit_status == 5
    assert shell.stdio.drain(HANG)
    assert b"/dev/pts/" in shell.stdio.output()
    container.task.delete(shell.id)
    container.task.kill(9)
    assert container.wait() == 137
    container.delete()


def test_its_size(rig: Rig) -> None:
    container = rig.container(["sh", "-c", "read x; stty size; read y; stty size"], terminal=True, stdin=True)
    container.create()
    container.task.resize_pty(101, 33)
    container.start()
    container.stdio.write(b"\r")
    until(lambda: "33 101" in container.output)
    container.task.resize_pty(77, 22)
    container.stdio.write(b"\r")
    assert container.wait() == 0
    assert container.stdio.drain(HANG)
    assert "22 77" in container.output
    container.delete()


def test_a_resize_tells_the_program(rig: Rig) -> None:
    program = "trap 'echo winch; exit 6' WINCH; echo up; while :; do sleep 0.1; done"
    container = rig.container(["sh", "-c", program], terminal=True)
    container.create()
    container.start()
    until(lambda: "up" in container.output)
    container.task.resize_pty(50, 20)
    assert container.wait() == 6
    container.delete()


def test_ctrl_c(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    program = container.exec(["sh", "-c", "echo up; exec sleep 1000"], terminal=True, stdin=True)
    until(lambda: b"up" in program.stdio.output())
    program.stdio.write(b"\x03")
    assert container.task.wait(program.id).exit_status == 130
    container.task.delete(program.id)
    container.task.kill(9)
    container.wait()
    container.delete()


def test_large_output(rig: Rig) -> None:
    size = 8_000_000
    container = rig.container(["sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x"], terminal=True)
    assert container.run(timeout=HANG) == 0
    assert container.stdio.drain(HANG)
    assert container.stdio.output() == b"x" * size
    container.delete()


def test_a_failed_exec_leaves_nothing(rig: Rig) -> None:
    container = rig.container(["sleep", "1000"])
    container.create()
    container.start()
    before = fds(container.shim_pid)
    for number in range(5):
        with pytest.raises(ShimError):
            container.exec(["/no/such/program"], id=f"bad{number}", terminal=True, stdin=True)
        container.task.delete(f"bad{number}")
    until(lambda: fds(container.shim_pid) <= before)
    assert not [name for name in os.listdir(container.bundle.path) if "console" in name]
    container.task.kill(9)
    container.wait()
    container.delete()


# ---- ours ----


def test_output_waits_for_a_late_reader(ours: Rig) -> None:
    container = ours.container(["sh", "-c", "seq 1 5000; exit 4"], terminal=True, read=False)
    container.create()
    container.start()
    assert container.wait() == 4
    container.stdio.open_readers()
    assert container.stdio.drain(HANG)
    assert re.findall(r"\d+", container.output) == [str(n) for n in range(1, 5001)]
    container.delete()


def test_a_reader_that_has_stopped_delays_no_other(ours: Rig) -> None:
    container = ours.container(["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x"], terminal=True, read=False)
    container.create()
    container.start()
    before = threads(container.shim_pid)
    shells = [container.exec(["sh"], terminal=True, stdin=True) for _ in range(5)]
    for number, shell in enumerate(shells):
        shell.stdio.write(b"echo said-$((%d + 1000)); exit %d\r" % (number, number))
    for number, shell in enumerate(shells):
        assert container.task.wait(shell.id).exit_status == number
        assert shell.stdio.drain(HANG)
        assert b"said-%d" % (number + 1000) in shell.stdio.output()
        container.task.delete(shell.id)
    assert threads(container.shim_pid) <= before + 1  # one carries them all; the pool may have grown by one
    container.stdio.open_readers()
    assert container.wait() == 0
    assert container.stdio.drain(HANG)
    assert container.stdio.output() == b"x" * 1_000_000
    container.delete()


def test_closing_stdin_hangs_nothing_up(ours: Rig) -> None:
    container = ours.container(["sh", "-c", "echo up; read x; echo $?; sleep 1000"], terminal=True, stdin=True)
    container.create()
    container.start()
    until(lambda: "up" in container.output)
    container.close_stdin()
    container.task.resize_pty(10, 10)
    assert container.task.state().status == 2  # RUNNING
    container.task.kill(9)
    assert container.wait() == 137
    container.delete()


def test_delete_hangs_up(ours: Rig) -> None:
    """A program that an exec has left behind delays its Delete no longer than it has to."""
    container = ours.container(["sleep", "1000"])
    container.create()
    container.start()
    left = "trap '' HUP; sleep 1000 & exit 7"
    program = container.exec(["sh", "-c", left], terminal=True)
    assert container.task.wait(program.id).exit_status == 7
    assert len(container.task.pids()) == 2
    assert container.task.delete(program.id).exit_status == 7
    assert not [name for name in os.listdir(f"/proc/{container.shim_pid}/fd") if is_terminal(container.shim_pid, name)]
    container.task.kill(9)
    container.wait()
    container.delete()


def test_no_output_and_no_input(ours: Rig) -> None:
    container = ours.container(["sh", "-c", "tty; exit 2"], terminal=True)
    container.stdio.stdout, kept = "", container.stdio.stdout
    assert container.create()
    container.start()
    assert container.wait() == 2
    container.stdio.stdout = kept
    container.delete()


def test_output_to_a_file(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sh", "-c", "seq 1 20000"], terminal=True)
    container.stdio.stdout, kept = f"file://{tmp_path}/log", container.stdio.stdout
    container.create()
    container.start()
    assert container.wait() == 0
    container.stdio.stdout = kept
    container.delete()
    assert (tmp_path / "log").read_bytes() == b"".join(b"%d\r\n" % n for n in range(1, 20001))


def test_output_to_another_terminal(ours: Rig) -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    try:
        container = ours.container(["sh", "-c", "echo here; exit 2"], terminal=True)
        container.stdio.stdout, kept = os.ttyname(slave), container.stdio.stdout
        container.create()
        container.start()
        assert container.wait() == 2
        container.stdio.stdout = kept
        container.delete()
        assert os.read(master, 100).startswith(b"here")
    finally:
        os.close(master)
        os.close(slave)


def test_input_from_a_file_is_refused(ours: Rig, tmp_path: Path) -> None:
    container = ours.container(["sh"], terminal=True)
    (tmp_path / "in").write_text("exit\n")
    container.stdio.stdin = str(tmp_path / "in")
    with pytest.raises(InvalidArgument, match="neither a FIFO nor empty"):
        container.create()
    container.stdio.stdin = ""
    container.end()


def test_output_that_can_not_be_written_is_counted_and_logged(tmp_path: Path) -> None:
    """A full disk. The program goes on, and the log says what became of its output."""
    (tmp_path / "log").write_text("")
    before = logger.set_logger(logger.Logger(str(tmp_path / "log")))
    master, slave = os.openpty()
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        console = carry(master, -1, full)
        for _ in range(3):
            os.write(slave, b"x" * 1000)
        until(lambda: console.lost == 3000)
        os.close(slave)
        until(lambda: console.drained)
        console.close()
    finally:
        logger.set_logger(before)
        os.close(full)
    first, last = (tmp_path / "log").read_text().splitlines()
    assert 'msg="output of a terminal is lost"' in first and "No space left on device" in first
    assert "bytes=" in last and "3000" in last
