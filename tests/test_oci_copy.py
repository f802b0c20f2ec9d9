"""stdio that is copied between pipes and the client's FIFOs: to who reads and writes it is as if it were not."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.oci.readers import parse
from shimcore.oci.relay import the_relay
from shimcore.oci.service import DRAIN_TIMEOUT
from shimcore.oci.stdio import open_stdio
from shimcore.protos import task_pb2
from shimcore.rig import Rig, Session
from tests.faults import until
from tests.test_oci_readers import full
from tests.test_oci_stdio import at_end, fifos, open_fds, reader
from tests.upgrades import Copy, copy, upgrade
from tests.upgrades import rig as changing

__all__ = ["changing", "copy", "fifos"]

COPY = {"io.shimcore.stdio": "copy"}
the_relay()  # here, so that its fd is not one of a test's
NUMBERS = b"".join(b"%d\n" % number for number in range(1, 60001))  # more than FIFO, pipe and what is held between


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def running(rig: Rig, command: str, **options: object) -> Session:
    one = rig.container(["sh", "-c", command], **{"annotations": COPY, **options})  # type: ignore[arg-type]
    one.create()
    one.start()
    return one


# --- what the words mean


@pytest.mark.parametrize(
    ("text", "want", "said"),
    [
        ("copy", ("block", True, 10.0), "block,copy"),
        ("block,copy", ("block", True, 10.0), "block,copy"),
        ("drop,after=2,copy", ("drop", True, 2.0), "drop,copy"),
        ("copy,after=2", ("block", True, 2.0), "block,copy"),
        ("drop", ("drop", False, 10.0), "drop"),
    ],
)
def test_copy_as_a_policy_and_as_a_setting(text: str, want: tuple[str, bool, float], said: str) -> None:
    policy = parse(text, "x")
    assert ((policy.action, policy.copy, policy.after), str(policy)) == (want, said)


# --- fds


def test_the_process_has_pipes(fifos: tuple[str, str, str]) -> None:
    io = open_stdio(*fifos, copy=True, owner=(1000, 1001))
    fds = io.child_fds()
    assert all(os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:") and os.get_blocking(fd) for fd in fds.values())
    assert [(os.fstat(fds[number]).st_uid, os.fstat(fds[number]).st_gid) for number in (1, 2)] == [(1000, 1001)] * 2
    assert io.copied and not io.streamed
    io.close()
    io.close()


def test_null_devices_and_terminals_are_not_copied(fifos: tuple[str, str, str]) -> None:
    for io in (open_stdio("", "", "/dev/null", copy=True), open_stdio(fifos[0], fifos[1], "", terminal=True, copy=True)):
        assert all(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in io.child_fds().values())
        assert not io.copied
        io.close()


# red: the FIFO's write end closed with the process, though something is in the pipe
def test_last_words_and_the_end(fifos: tuple[str, str, str]) -> None:
    io = open_stdio("", fifos[1], "", copy=True)
    child = os.dup(io.child_fds()[1])
    io.started()
    os.write(child, b"last words")
    assert not io.process_ended()  # somebody still has the pipe
    os.close(child)
    until(io.drained)
    assert not io.process_ended()
    fd = reader(fifos[1])
    assert os.read(fd, 99) == b"last words"
    with pytest.raises(BlockingIOError):
        os.read(fd, 1)
    assert io.process_ended() and at_end(fd)
    os.close(fd)
    io.close()


# red: nobody looks at who has the other end of stdin's pipe
def test_a_process_that_reads_no_more(fifos: tuple[str, str, str]) -> None:
    io = open_stdio(fifos[0], "", "", copy=True)
    client = os.open(fifos[0], os.O_WRONLY | os.O_NONBLOCK)
    io.started()  # nobody has the pipe now
    ask = select.poll()
    ask.register(client, 0)
    assert ask.poll(10000) == [(client, select.POLLERR)]
    with pytest.raises(BrokenPipeError):
        os.write(client, b"x")
    os.close(client)
    io.close()


def test_close_io_before_start(fifos: tuple[str, str, str]) -> None:
    io = open_stdio(fifos[0], "", "", copy=True, hold_stdin=False)
    child = os.dup(io.child_fds()[0])
    io.started()
    assert os.read(child, 1) == b""
    os.close(child)
    io.close()


def test_much_stdin_waits_for_a_process_that_does_not_read(fifos: tuple[str, str, str]) -> None:
    io = open_stdio(fifos[0], "", "", copy=True)
    child = os.dup(io.child_fds()[0])
    io.started()
    client = os.open(fifos[0], os.O_WRONLY)
    thread = threading.Thread(target=lambda: (os.write(client, NUMBERS), os.close(client)))
    thread.start()
    until(lambda: full(fifos[0]))
    io.close_stdin()
    got = b""
    while data := os.read(child, 65536):
        got += data
    thread.join()
    assert got == NUMBERS
    os.close(child)
    io.close()


def test_a_file_takes_all(tmp_path: Path) -> None:
    before = open_fds()
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    io = open_stdio("", f"file://{path}", str(path), copy=True)
    fds = [os.dup(fd) for number, fd in io.child_fds().items() if number]
    assert os.readlink(f"/proc/self/fd/{fds[0]}").startswith("pipe:")
    io.started()
    os.write(fds[0], NUMBERS)
    for fd in fds:
        os.close(fd)
    until(io.drained)
    assert path.read_bytes() == b"before\n" + NUMBERS
    assert io.process_ended()
    io.close()
    assert len(open_fds()) == len(before)


def test_a_full_disk_is_told_and_the_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    io = open_stdio("", str(path), "", copy=True)
    child = os.dup(io.child_fds()[1])
    io.started()
    stream = io.streams[0]
    null = os.open("/dev/full", os.O_WRONLY)
    os.dup2(null, stream.write_fd)
    os.close(null)
    os.write(child, NUMBERS)
    os.close(child)
    until(io.drained)
    assert stream.output.lost == len(NUMBERS)  # type: ignore[attr-defined]
    io.close()


# --- under runc


def test_output_and_its_end(rig: Rig) -> None:
    box = rig.container(["sh", "-c", "readlink /proc/self/fd/1; echo err >&2; seq 1 60000; exit 3"], annotations=COPY)
    assert box.run() == 3
    kind, rest = box.stdio.output().split(b"\n", 1)
    assert kind.startswith(b"pipe:") and rest == NUMBERS and box.stdio.errors() == b"err\n"
    box.delete()


def test_stdin_and_its_end(rig: Rig) -> None:
    box = running(rig, "cat", stdin=True)
    box.stdio.write(NUMBERS)
    box.close_stdin()
    assert box.wait() == 0
    assert box.stdio.drain() and box.stdio.output() == NUMBERS
    box.delete()


def test_an_exec_has_the_fifo_itself(rig: Rig) -> None:
    box = running(rig, "exec sleep 1000")
    process = box.exec(["readlink", "/proc/self/fd/1"])
    assert process.wait() == 0
    process.stdio.drain()
    assert process.stdio.output().decode().strip().endswith("-stdout")
    process.delete()
    box.task.kill(9)
    assert box.wait() == 137
    box.delete()


# red: the write to a FIFO without room made to wait in the relay's thread
def test_a_reader_that_has_stopped_delays_no_other(rig: Rig) -> None:
    group = {"io.kubernetes.cri.sandbox-id": "pod", **COPY}
    stopped = running(rig, "seq 1 60000", annotations=group, read=False)
    fd = reader(stopped.stdio.stdout)
    until(lambda: full(stopped.stdio.stdout))
    other = running(rig, "seq 1 60000 >&2; exit 4", annotations=group)
    assert other.shim_pid == stopped.shim_pid
    assert other.wait() == 4 and other.stdio.drain() and other.stdio.errors() == NUMBERS
    other.delete()
    assert stopped.task.state().status == 2  # it waits
    stopped.stdio.open_readers()
    os.close(fd)
    assert stopped.wait() == 0
    assert stopped.stdio.drain() and stopped.stdio.output() == NUMBERS
    stopped.delete()


def test_a_reader_that_goes_and_another(rig: Rig) -> None:
    """As containerd's restart."""
    box = running(rig, "i=0; while read x; do i=$((i+1)); echo $i; done", stdin=True, read=False)
    got = b""
    for number in (1, 2, 3):
        fd = os.open(box.stdio.stdout, os.O_RDONLY)
        box.stdio.write(b"go\n")
        got += os.read(fd, 100)
        os.close(fd)
        assert got.endswith(b"%d\n" % number)
    box.stdio.write(b"go\n")  # with nobody there
    box.close_stdin()
    assert box.wait() == 0
    fd = os.open(box.stdio.stdout, os.O_RDONLY)
    assert os.read(fd, 100) == b"4\n" and os.read(fd, 1) == b""
    os.close(fd)
    assert got == b"1\n2\n3\n"
    box.stdio.open_readers()
    box.delete()


# red: Delete does not wait
def test_delete_waits_for_a_reader_that_is_behind(rig: Rig) -> None:
    box = running(rig, "seq 1 20000", read=False)  # FIFO and pipe have it all: the process has ended
    assert box.wait() == 0
    request = task_pb2.DeleteRequest(id=box.id)
    service = f"containerd.task.v{box.started.version}.Task"
    deleted = box.client.start(service, "Delete", request, task_pb2.DeleteResponse, timeout=20.0)
    until(lambda: not (rig.root / "runc" / rig.namespace / box.id).exists())
    for _ in range(50):  # the runtime has done its part; what follows takes no longer than these
        box.task.state()
    assert not deleted.done()
    box.stdio.open_readers()
    assert deleted.result().exit_status == 0
    assert box.stdio.out is not None and box.stdio.out.wait(10)
    assert box.stdio.output() == b"".join(b"%d\n" % number for number in range(1, 20001))
    box.end()


def test_delete_does_not_wait_for_who_was_left_behind(rig: Rig) -> None:
    box = running(rig, "echo out; exec sleep 1000")
    until(lambda: box.stdio.output() == b"out\n")
    held = os.open(f"/proc/{box.pid}/fd/1", os.O_WRONLY)
    box.task.kill(9)
    assert box.wait() == 137
    box.task.delete(timeout=DRAIN_TIMEOUT - 1)
    assert box.stdio.drain()
    os.close(held)
    box.end()


# --- with the other policies


def test_drop_goes_on_and_leaves_the_newest(rig: Rig) -> None:
    box = running(rig, "seq 1 300000; exit 6", annotations={"io.shimcore.stdio": "drop,after=0.2,copy"}, read=False)
    fd = reader(box.stdio.stdout)
    assert box.wait() == 6
    box.task.delete(timeout=DRAIN_TIMEOUT - 1)  # which waits for nobody
    newest = b""
    while data := os.read(fd, 65536):
        newest += data
    os.close(fd)
    assert 0 < len(newest) <= 65536 and newest.endswith(b"299999\n300000\n")
    box.end()


def test_spill_keeps_every_byte(rig: Rig) -> None:
    box = running(rig, "seq 1 60000", annotations={"io.shimcore.stdio": "spill,after=0.2,copy"}, read=False)
    assert box.wait() == 0
    box.task.delete()
    assert (box.bundle.path / "work" / "stdout.spill").read_bytes() == NUMBERS
    box.end()


# --- an upgrade in place


def test_an_upgrade_takes_it_over(changing: Rig, copy: Copy) -> None:
    """With bytes in the FIFO, in the shim and in the pipe."""
    box = running(changing, "seq 1 60000; cat", stdin=True, read=False)
    fd = reader(box.stdio.stdout)
    until(lambda: full(box.stdio.stdout))
    for _ in range(2):
        upgrade(box)
    box.stdio.write(b"more\n")
    box.close_stdin()
    box.stdio.open_readers()
    os.close(fd)
    assert box.wait() == 0
    assert box.stdio.drain() and box.stdio.output() == NUMBERS + b"more\n"
    box.delete()


# red: the relay not held between the old and the new code
def test_nothing_is_lost_or_doubled_while_it_is_upgraded(changing: Rig, copy: Copy) -> None:
    box = running(changing, "i=0; while :; do i=$((i+1)); echo $i; done")
    for number in range(1, 5):
        until(lambda number=number: len(box.stdio.output()) > number * 100_000)  # type: ignore[misc]
        upgrade(box)
    box.task.kill(9)
    assert box.wait() == 137
    assert box.stdio.drain()
    lines = box.stdio.output().split()
    assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
    box.delete()
