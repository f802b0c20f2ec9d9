"""Trials A20 to A23; see test_a."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore import ledger
from shimcore.errors import FailedPrecondition, ShimError
from shimcore.rig import FROZEN, UP
from tests.faults import FULL, Box, Lab, Later, scale, until

RUNNING, STOPPED = 2, 3  # containerd.v1.types.Status
FREEZER = Path("/sys/fs/cgroup/freezer")


# red: bound_fire does not set `overdue`: no exit of init
def test_A20_an_exec_frozen_in_flight(lab: Lab) -> None:
    box = lab.box("a20-flight")
    lab.call("bound", id=box.id, seconds=0.3)
    box.task.exec("e", box.process(["@exit", "4"]))
    lab.runtime.rule("exec", "made hold", id=box.id)
    start = Later(lambda: box.task.start("e"))
    held = lab.runtime.wait("exec", "made", id=box.id)
    box.task.kill(9)
    event = box.told(timeout=5)  # the exec is in flight all the while
    assert event.message.exit_status == 137
    assert start.running or held.gone(0)
    assert lab.stats()["overdue"] >= 1
    held.release()
    with contextlib.suppress(ShimError):
        start.result()


@pytest.fixture
def freezer() -> Iterator[Path]:
    if not (FREEZER / "freezer.self_freezing").exists() and not (FREEZER / "tasks").exists():
        pytest.skip("no cgroup v1 freezer: a process can't be held against SIGKILL")
    group = FREEZER / f"sct-{os.getpid()}"
    group.mkdir()
    yield group
    (group / "freezer.state").write_text("THAWED")
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            os.kill(int(pid), 9)
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


# red: the same
def test_A20_an_exec_that_no_signal_ends(lab: Lab, freezer: Path) -> None:
    box = lab.box("a20-frozen")
    lab.call("bound", id=box.id, seconds=0.3)
    pid = box.exec("e")
    (freezer / "cgroup.procs").write_text(str(pid))
    (freezer / "freezer.state").write_text("FROZEN")
    until(lambda: (freezer / "freezer.state").read_text().strip() == "FROZEN")
    box.task.kill(9, "e")
    box.task.kill(9)
    assert box.told(timeout=5).message.exit_status == 137
    assert box.exits() == [("", 137)]
    assert box.delete() == 137
    (freezer / "freezer.state").write_text("THAWED")
    box.told("e")
    assert box.exits() == [("", 137), ("e", 137)]


# red: no kill_rest at the exit of init: the exec lives on
def test_A20_without_a_private_pid_namespace_the_rest_is_killed(lab: Lab) -> None:
    places = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))  # v1, v2
    hierarchy = next((path for path in places if (path / "cgroup.procs").exists()), None)
    if hierarchy is None:
        pytest.skip("no cgroups")
    group = hierarchy / lab.rig.namespace / "a20-rest"
    group.mkdir(parents=True)
    box = lab.box("a20-rest", create=False, private=False)
    for command in ("create", "exec"):
        lab.runtime.rule(command, "made hold", id=box.id)

    def into_the_group(command: str) -> None:
        with lab.runtime.wait(command, "made", id=box.id) as held:
            (group / "cgroup.procs").write_text(str(held.pid))

    create = Later(box.create)
    into_the_group("create")
    create.result()
    box.task.start()
    task = Later(lambda: box.exec("e"))
    into_the_group("exec")
    task.result()
    os.kill(box.pid, 15)
    box.told()
    assert box.exits() == [("e", 137), ("", 143)]
    assert box.delete() == 143
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


# --- A21, A22


# red: sc_slot_announce announces execs only: no exit
@pytest.mark.parametrize("how", ["killed", "deleted"])
def test_A21_created_and_never_started(lab: Lab, how: str) -> None:
    box = lab.box(f"a21-{how}", start=False)
    wait = Later(box.status)
    if how == "killed":
        box.task.kill(9)
        box.told()
    assert box.delete() == 137
    assert wait.result() == 137
    lab.events.wait("/tasks/delete", container=box.id)
    assert [event.topic for event in box.events] == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


# red: sc_slot_drop leaves `busy` alone: init is told after 10 s
@pytest.mark.parametrize("command", ["create", "exec"])
def test_A22_a_runtime_dead_before_its_pid_file(lab: Lab, command: str) -> None:
    box = lab.box(f"a22-{command}", create=False)
    lab.runtime.rule(command, "made kill 9", id=box.id)
    if command == "create":
        with pytest.raises(ShimError, match="signal 9"):
            box.create()
        box.deleted = True
        assert box.events == []
        lab.runtime.forget("create", id=box.id)
        again = lab.box("a22-again")  # the shim is as it was
        again.task.kill(9)
        assert again.status() == 137
        return
    box.create()
    box.task.start()
    with pytest.raises(ShimError, match="signal 9"):
        box.exec("e")
    assert box.status("e") == 255
    box.task.kill(9)
    assert box.told(timeout=5).message.exit_status == 137
    assert box.exits() == [("", 137)]
    lab.sweep()


# red: state_of takes OPENED for stopped, and sc_slot_forget never says EBUSY: the slot is deleted
def test_A22_delete_while_an_execs_exit_is_held(lab: Lab) -> None:
    box = lab.box("a22-held")
    box.task.exec("e", box.process(["@exit", "4"]))
    lab.runtime.rule("exec", "end dead", "end hold", id=box.id)
    start = Later(lambda: box.task.start("e"))
    with lab.runtime.wait("exec", "end", id=box.id):
        box.task.kill(9)
        for exec_id in ("e", ""):
            began = time.monotonic()
            with pytest.raises(FailedPrecondition):
                box.delete(exec_id)
            assert time.monotonic() - began < (1 if FULL else 10)
    start.result()
    box.told()
    assert (box.delete("e"), box.delete()) == (4, 137)


@pytest.fixture
def asleep(new_lab: Callable[..., Lab]) -> Iterator[Lab]:
    """A lab in which a teardown hook sleeps for 3 s and holds the GIL. Its client, `box`, has been killed."""
    lab = new_lab(LAB_TEARDOWN="0.3", LAB_HOLD_GIL="3")
    lab.box("a22-other", lab.runtime.gate().args(3))
    lab.box("a22-gil")
    yield lab
    lab.runtime.gate("last").close()


# red: the timer of the teardown is not set: told at the end of the hook
def test_A22_a_teardown_that_sleeps_with_the_gil(asleep: Lab) -> None:
    other, box = asleep.boxes
    began = time.monotonic()
    waits = [Later(box.status), Later(other.status)]
    until(lambda: asleep.stats()["slots"] == 2)  # an answer that comes after both Waits were read
    os.kill(box.pid, 9)
    assert waits[0].result() == 137
    assert box.told().message.exit_status == 137
    os.kill(other.pid, 15)
    assert waits[1].result() == 143
    assert other.told().message.exit_status == 143
    took = time.monotonic() - began
    assert took < 3, f"{took} s: it was the hook's end that let them go"


# red: without a stand-in: the thread that reads requests also hands notes to Python, for which it needs the GIL
def test_A22_state_beside_a_teardown_that_sleeps_with_the_gil(asleep: Lab) -> None:
    other, box = asleep.boxes
    began = time.monotonic()
    os.kill(box.pid, 9)
    box.told()
    os.kill(other.pid, 15)
    other.told()  # both notes are there
    assert box.task.state().status == STOPPED
    assert time.monotonic() - began < 3


# --- A23


@pytest.fixture
def disk(session_root: Path) -> Iterator[Callable[[str, str], Path]]:
    """Makes small filesystems: disk("tmpfs", "64k") is a tmpfs of that size, disk("ext4", "8M") a loop mount."""
    made: list[Path] = []

    def make(kind: str, size: str) -> Path:
        point = session_root / f"disk-{os.urandom(3).hex()}"
        point.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
        else:
            image = point.with_suffix(".img")
            subprocess.run(["truncate", "-s", size, str(image)], check=True)
            subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
            command = ["mount", "-o", "loop", str(image), str(point)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"no {kind} can be mounted here")
        made.append(point)
        return point

    yield make
    for point in made:
        subprocess.run(["fsfreeze", "-u", str(point)], capture_output=True)
        subprocess.run(["umount", "-l", str(point)], check=True)
        point.with_suffix(".img").unlink(missing_ok=True)


# red: every ledger taken for one on tmpfs: the exit thread hangs in its write
def test_A23_the_bundles_filesystem_frozen(lab: Lab, disk: Callable[[str, str], Path]) -> None:
    point = disk("ext4", "16M")
    count = scale(20, 100)
    gate = lab.runtime.gate()
    box = lab.box("a23-frozen", bundle=point / "a23-frozen")
    for number in range(count):
        box.exec(f"e{number}", gate.args(number))
    subprocess.run(["fsfreeze", "-f", str(point)], check=True)
    try:
        gate.open()
        for number in range(count):
            assert box.told(f"e{number}", timeout=10).message.exit_status == number
        late = lab.stats()["record_late"]
        assert late >= 1
        assert box.task.state("e0").exit_status == 0
    finally:
        subprocess.run(["fsfreeze", "-u", str(point)], check=True)
    gate.close()
    box.task.kill(9)
    assert box.told().message.exit_status == 137
    until(lambda: len(ledger.read(str(box.bundle))) == count + 1)
    assert sorted(exit.exec_id for exit in ledger.read(str(box.bundle))) == sorted(["", *(f"e{n}" for n in range(count))])
    box.delete()


# red: an exit whose record failed stays pending: it is never told
def test_A23_no_space_left(lab: Lab, disk: Callable[[str, str], Path]) -> None:
    point = disk("tmpfs", "256k")
    count = scale(450, 900)  # 16 KiB are preallocated, and a record of these takes 45 bytes
    box = lab.box("a23-full", bundle=point / "a23-full")
    unrecorded = lab.stats()["unrecorded"]
    for number in range(4):
        box.exec(f"first{number}", ["@exit", "23"])
        box.told(f"first{number}")
    with contextlib.suppress(OSError), open(point / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    # What was preallocated still takes these.
    before = len(ledger.read(str(box.bundle)))
    lab.call("sequence_in", id=box.id, count=count)
    lab.events.wait("/tasks/exit", container=box.id, count=4 + count)
    recorded = len(ledger.read(str(box.bundle)))
    assert before == 4 and recorded > before
    unrecorded = lab.stats()["unrecorded"] - unrecorded
    assert unrecorded > 0 and recorded + unrecorded == 4 + count
    box.task.kill(9)
    assert box.told().message.exit_status == 137
    (point / "filler").unlink()
    box.delete()


# red: sc_slot_forget empties the queue: no deletion
def test_A23_a_pods_first_bundle_is_removed_with_events_unsent(new_lab: Callable[..., Lab], session_root: Path) -> None:
    lab = new_lab()
    gate = lab.runtime.gate()
    first = Box(lab, "lab", gate.args(1), bundle=lab.session.bundle.path)
    first.create()
    first.task.start()
    second = lab.box("a23-second", gate.args(2))
    lab.settled()
    lab.events.set_mode(FROZEN)
    gate.open()
    assert (first.status(), second.status()) == (1, 2)
    assert first.delete() == 1
    lab.session.bundle.remove()
    assert second.delete() == 2
    lab.events.set_mode(UP)
    for box, code in ((first, 1), (second, 2)):
        assert box.told().message.exit_status == code
        lab.events.wait("/tasks/delete", container=box.id)
    lab.session.bundle.path.mkdir()
