"""Output whose reader has gone: block, drop and spill, on real FIFOs with a process that writes more than they hold."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper
from shimcore.dump import metrics
from shimcore.errors import InvalidArgument
from shimcore.oci.readers import ANNOTATION, VARIABLE, Spill, parse, policy_of
from shimcore.oci.stdio import open_stdio
from tests.test_oci_service import Rig, open_fds, rig, wait_for

__all__ = ["rig"]

# The process writes numbered lines to its stdout, as many as the file `lines` says, then `done`, and lives on.
WRITER = """
create) mkdir -p "$root/$id"
    leave sh -c 'seq -f "line %09.0f" 1 $(cat {here}/lines); touch {here}/done; exec sleep 1000' ;;
"""
LINES = 40000
BYTES = LINES * 15


class Box:
    """A container whose init writes BYTES to the FIFO `out`."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig = rig
        self.root = root
        self.out = root / "out"
        os.mkfifo(self.out, 0o600)
        text = rig.runtime.read_text()
        rig.runtime.write_text(text.replace("case $command in\n", "case $command in" + WRITER.format(here=root)))
        (root / "lines").write_text(str(LINES))
        self.fds: list[int] = []

    def create(self, policy: str, *, env: bool = False) -> None:
        bundle = self.rig.bundle("c1")
        spec: dict[str, Any] = {"linux": {"namespaces": [{"type": "pid"}]}}
        if not env:
            spec["annotations"] = {ANNOTATION: policy}
        (bundle / "config.json").write_text(json.dumps(spec))
        (bundle / "work").mkdir()
        self.rig.create("c1", stdout=str(self.out))

    def reader(self) -> int:
        self.fds.append(os.open(self.out, os.O_RDONLY | os.O_NONBLOCK))
        return self.fds[-1]

    def done(self) -> bool:
        return (self.root / "done").exists()

    def output(self) -> dict[str, Any]:
        container = self.rig.task.describe()["containers"]["c1"]  # type: ignore[index]
        found: dict[str, Any] = container["output"]
        return found

    def spilt(self) -> bytes:
        folder = self.rig.bundle("c1") / "work"
        return b"".join(path.read_bytes() for path in (folder / "stdout.spill.1", folder / "stdout.spill") if path.exists())

    def end(self) -> None:
        self.rig.kill()
        self.rig.told()
        self.rig.delete()


@pytest.fixture
def box(rig: Rig, tmp_path: Path) -> Iterator[Box]:
    box = Box(rig, tmp_path)
    before = open_fds()
    yield box
    for fd in box.fds:
        os.close(fd)
    if rig.task.containers:
        box.end()
    wait_for(lambda: open_fds() <= before)


def drained(fd: int) -> bytes:
    """What is there now."""
    data = b""
    while select.select([fd], [], [], 0)[0]:
        piece = os.read(fd, 65536)
        if not piece:
            break
        data += piece
    return data


def lines(count: int) -> bytes:
    return b"".join(b"line %09d\n" % number for number in range(1, count + 1))


def test_block_waits_for_ever(box: Box) -> None:
    box.create("block,after=0.1")
    fd = box.reader()
    poller = select.poll()
    wait_for(lambda: full(box.out))
    assert box.output() == {"policy": "block", "dropped_bytes": 0, "spilled_bytes": 0, "unread": {}}
    assert not box.done()
    got = b""
    poller.register(fd, select.POLLIN)
    while len(got) < BYTES:
        assert poller.poll(10000)
        got += os.read(fd, 65536)
    assert got == lines(LINES)


def full(path: str | Path) -> bool:
    """Whether who writes to a FIFO has to wait."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    try:
        return not poller.poll(0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("env", [False, True])
def test_drop_lets_the_process_go_on(box: Box, env: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if env:
        monkeypatch.setenv(VARIABLE, "drop,after=0.1")
    box.create("drop,after=0.1", env=env)
    wait_for(box.done)
    wait_for(lambda: box.output()["unread"] == {"": ["stdout"]})
    # The newest is there for a reader that comes, whole and in order.
    rest = drained(box.reader())
    wait_for(lambda: box.output()["unread"] == {})
    dropped = box.output()["dropped_bytes"]  # only now: until there was a reader more may have gone
    assert dropped > 0 and box.output()["spilled_bytes"] == 0 and box.spilt() == b""
    assert len(rest) == BYTES - dropped
    assert lines(LINES).endswith(rest)


def test_spill_keeps_what_the_reader_has_not_got(box: Box) -> None:
    box.create("spill,after=0.1")
    wait_for(box.done)
    spilled = box.output()["spilled_bytes"]
    assert spilled > 0 and box.output()["dropped_bytes"] == 0
    rest = drained(box.reader())  # first: from then on nothing is moved
    wait_for(lambda: box.spilt() + rest == lines(LINES))  # a piece may still be on its way to the disk
    assert os.stat(box.rig.bundle("c1") / "work" / "stdout.spill").st_mode & 0o777 == 0o600


def test_spill_keeps_the_last_words_of_a_process_that_ends(box: Box) -> None:
    box.create("spill,after=0.1")
    wait_for(box.done)
    box.end()
    assert box.spilt() == lines(LINES)


def test_spill_has_a_cap_and_keeps_the_newest(box: Box) -> None:
    box.create("spill,after=0.1,max=131072")
    wait_for(box.done)
    box.end()
    kept = box.spilt()
    assert 65536 <= len(kept) <= 131072
    assert lines(LINES).endswith(kept)
    assert box.rig.task.lost.dropped == BYTES - len(kept)


def test_a_reader_that_is_slow_loses_nothing(box: Box) -> None:
    """It takes a few bytes now and then, so the FIFO is full whenever it is looked at."""
    (box.root / "lines").write_text("20000")
    fd = box.reader()
    box.create("drop,after=1")
    wait_for(lambda: full(box.out))
    got = b""
    stop = threading.Event()
    while not box.done():
        got += os.read(fd, 4096)
        stop.wait(0.05)
    got += drained(fd)
    assert got == lines(20000)
    assert box.output()["dropped_bytes"] == 0


def test_a_reader_that_comes_back_gets_all_that_follows(box: Box) -> None:
    (box.root / "lines").write_text("100000000")
    box.create("drop,after=0.1")
    wait_for(lambda: box.output()["dropped_bytes"] > 0)
    fd = box.reader()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    got = b""
    while box.output()["unread"]:
        assert poller.poll(10000)
        got = os.read(fd, 65536)
    dropped = box.output()["dropped_bytes"]
    while len(got) < 1 << 20:
        assert poller.poll(10000)
        got += os.read(fd, 65536)
    assert box.output()["dropped_bytes"] == dropped
    numbers = [int(line.split()[1]) for line in got.split(b"\n")[1:-1]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_an_execs_output_is_dropped_where_inits_is_kept(box: Box) -> None:
    (box.root / "lines").write_text("1")
    box.create("spill,after=0.1")
    box.rig.start()
    box.rig.do("exec", f"leave sh -c 'seq 1 100000; touch {box.root}/exec-done; exec sleep 1000'; exit 0\n")
    err = box.root / "err"
    os.mkfifo(err)
    box.rig.exec("e", stdout=str(err))
    box.rig.start(exec_id="e")
    wait_for(lambda: (box.root / "exec-done").exists())
    assert box.output()["unread"] == {"e": ["stdout"]}
    assert box.output()["dropped_bytes"] > 0 and box.output()["spilled_bytes"] == 0
    box.rig.kill(exec_id="e")
    box.rig.told(exec_id="e")
    box.rig.delete(exec_id="e")


def test_a_spill_that_cannot_be_written_counts_as_dropped(box: Box) -> None:
    box.create("spill,after=0.1")
    (box.rig.bundle("c1") / "work" / "stdout.spill").symlink_to(box.root / "elsewhere")
    wait_for(box.done)
    assert box.output()["dropped_bytes"] > 0 and box.output()["spilled_bytes"] == 0
    assert not (box.root / "elsewhere").exists()


def test_the_counters_are_in_the_metrics(box: Box) -> None:
    box.create("drop,after=0.1")
    wait_for(box.done)

    class Server:
        def stats(self) -> Any:
            return dict.fromkeys(("calls", "failures", "stood_in", "in_flight", "connections"), 0)

    class About:
        core, server, task = box.rig.core, Server(), box.rig.task
        namespace, id, runtime_id, started = "ns", "c1", "r", 0.0

    text = metrics(About).decode()  # type: ignore[arg-type]
    dropped = box.rig.task.lost.dropped
    assert f'shimcore_stdio_dropped_bytes_total{{namespace="ns",id="c1",runtime="r"}} {dropped}\n' in text
    assert "# TYPE shimcore_stdio_spilled_bytes counter\n" in text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ("block", 10.0, 16 << 20)),
        ("block", ("block", 10.0, 16 << 20)),
        ("drop,after=2.5", ("drop", 2.5, 16 << 20)),
        ("spill,max=4096,after=1", ("spill", 1.0, 4096)),
    ],
)
def test_policies(text: str, want: tuple[str, float, int]) -> None:
    policy = parse(text, "x")
    assert (policy.action, policy.after, policy.max) == want


@pytest.mark.parametrize(
    "text", ["Drop", "drop,", "drop,after", "drop,after=0", "drop,after=nan", "spill,max=1", "spill,size=9", "copy=1"]
)
def test_what_is_no_policy_fails_create(box: Box, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"annotation io\.shimcore\.stdio: .* is not block, drop, spill or copy"):
        box.create(text)
    assert not box.rig.task.containers


def test_an_author_does_not_get_more_of_the_disk_than_the_node_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "spill,max=8192,after=3")
    assert policy_of({}).max == 8192
    assert policy_of({"annotations": {ANNOTATION: "spill,max=9999999"}}).max == 8192
    assert policy_of({"annotations": {ANNOTATION: "block"}}).action == "block"
    monkeypatch.setenv(VARIABLE, "spoil")
    with pytest.raises(InvalidArgument, match=VARIABLE):
        policy_of({})


def test_a_spill_bigger_than_its_cap_keeps_its_end(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path / "s"), 8192)
    assert spill.write(b"a" * 5000 + b"b" * 4096) == (5000, 4096)
    assert (tmp_path / "s").read_bytes() == b"b" * 4096
    assert spill.write(b"c") == (0, 1)
    assert spill.write(b"d" * 4096) == (4096, 4096)
    assert (tmp_path / "s.1").read_bytes() == b"c"


def test_it_can_be_told_who_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    io = open_stdio("", str(tmp_path / "f"), "")
    os.write(io.child_fds()[1], b"abc")
    fd = _reaper.watch_readers(io.streams[0].read_fd)
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    other = os.open(tmp_path / "f", os.O_RDONLY)
    assert os.read(fd, 100)
    os.write(io.child_fds()[1], b"abc")
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    os.read(other, 1)
    assert os.read(fd, 100)
    for one in (fd, other):
        os.close(one)
    io.close()
