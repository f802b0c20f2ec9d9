"""Trials A13 to A19; see test_a."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.errors import FailedPrecondition
from shimcore.rig import DOWN, MUTE, UP
from shimcore.rig.leaks import alive
from tests.faults import FULL, Box, Lab, Later, scale, until

RUNNING, STOPPED = 2, 3  # containerd.v1.types.Status


# red: delete_shim does not read the ledger: 137
@pytest.mark.parametrize("mode", [UP, DOWN])
def test_A13_delete_knows_what_a_killed_shim_knew(new_lab: Callable[..., Lab], mode: str) -> None:
    lab = new_lab()
    box = Box(lab, "lab", ["@exit", "42"], bundle=lab.session.bundle.path)
    lab.events.set_mode(mode)
    pid = box.create()
    box.task.start()
    assert box.status() == 42
    first = box.task.state().exited_at.ToNanoseconds()
    if mode == UP:
        assert box.told().message.exited_at.ToNanoseconds() == first
    lab.session.kill_shim()
    deleted = lab.session.cleanup()
    assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (pid, 42, first)


# red: delete_shim makes up an exit: it is told instead of the kill
def test_A13_a_container_that_ran_when_its_shim_was_killed(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = Box(lab, "lab", ["@sleep"], bundle=lab.session.bundle.path)
    pid = box.create()
    box.task.start()
    began = time.time_ns()
    lab.session.kill_shim()
    deleted = lab.session.cleanup()
    assert (deleted.pid, deleted.exit_status) == (pid, 137)
    assert began < deleted.exited_at < time.time_ns()
    assert not alive(pid)


# red: a byte of the body changed with each connection: no replay alike; each exit pushed twice: doubled
def test_A14_one_exit_each_and_replays_alike(lab: Lab) -> None:
    count = scale(40, 1000)
    for number in range(0, count, 40):  # fewer than are in flight at once
        gate = lab.runtime.gate(f"a14-{number}")
        boxes = [lab.box(f"a14-{number + n}", gate.args(14)) for n in range(40)]
        lab.settled()
        lab.events.clear()
        lab.events.set_mode(MUTE)
        gate.open()
        lab.events.wait("/tasks/exit", count=len(boxes))
        heard = lab.events.all
        lab.events.clear()
        lab.events.restart()
        for box in boxes:
            box.told()
        gate.close()
        again = lab.events.all
        assert {event.answered for event in heard} == {False} and {event.answered for event in again} == {True}
        assert heard[0].connection < again[0].connection
        assert len(again) == len(boxes) == len({event.container for event in again})
        assert {event.container: event.raw for event in again} == {event.container: event.raw for event in heard}
        lab.settled()
        for box in boxes:
            box.delete()


# red: sc_slot_wait parks whoever asks after the telling: no answer
def test_A15_a_wait_long_after_the_exit(lab: Lab) -> None:
    box = lab.box("a15", ["@exit", "15"])
    told = box.told().message
    for number in range(20):
        lab.box(f"a15-{number}", ["@exit", "1"]).status()
    began = time.monotonic()
    answer = box.task.wait(timeout=5)
    took = time.monotonic() - began
    assert answer.exit_status == 15
    assert answer.exited_at == told.exited_at
    assert took < (0.05 if FULL else 5)


# red: Exec publishes nothing: no exec-added
def test_A16_added_started_exited(lab: Lab) -> None:
    box = lab.box("a16")
    count = scale(20, 500)
    for number in range(count):
        box.exec(f"e{number}", ["@exit", "1"])
    for number in range(count):
        box.told(f"e{number}")
        topics = [event.topic for event in box.events if event.process == f"e{number}"]
        assert topics == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]


# red: sc_tell_if_due does not look at `tearing_down`: stopped while the hook runs
def test_A17_the_authors_teardown_comes_before_the_exit(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(LAB_TEARDOWN="60")
    box = lab.box("a17", ["@exit", "17"])
    wait = Later(box.status)
    until(lambda: lab.call("hook", inline=True) == [""])
    assert box.task.state().status == RUNNING
    assert wait.running and box.exits() == []
    with pytest.raises(FailedPrecondition):
        box.delete()
    lab.call("hook", inline=True, let_go=True)
    assert wait.result() == 17
    assert box.told().message.exit_status == 17


# red: the timer of the teardown is not set: no exit
def test_A17_a_teardown_has_a_deadline(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(LAB_TEARDOWN="0.2")
    box = lab.box("a17", ["@exit", "17"])
    began = time.monotonic()
    assert box.status() == 17
    took = time.monotonic() - began
    assert lab.stats()["teardown_late"] == 1
    assert lab.call("hook", inline=True, let_go=True) == [""]
    assert took < (0.5 if FULL else 10)


DEADLY = [
    number for number in range(1, 65)
    if number not in (17, 18, 23, 28, 32, 33)  # ignored by default (signal(7)), or glibc's own
    and number not in (19, 20, 21, 22)  # they stop
]  # fmt: skip


# red: 127 + signal
def test_A18_every_status_and_signal(lab: Lab) -> None:
    box = lab.box("a18")
    for status in range(256):
        box.exec(f"s{status}", ["@exit", str(status)])
    for number in DEADLY:
        box.exec(f"n{number}", ["@signal", str(number)])
    for status in range(256):
        assert box.status(f"s{status}") == status
    for number in DEADLY:
        assert box.status(f"n{number}") == 128 + number
    os.kill(box.pid, 9)
    box.told()
    wanted = {f"s{status}": status for status in range(256)} | {f"n{number}": 128 + number for number in DEADLY} | {"": 137}
    assert dict(box.exits()) == wanted and len(box.exits()) == len(wanted)


# red: an exec's exit takes init's status when init has exited
def test_A18_init_and_exec_are_not_mixed(lab: Lab) -> None:
    for status in (0, 1, 127, 255, -6, -11, -9):
        gate = lab.runtime.gate(f"a18{status}")
        box = lab.box(f"a18-{status}", gate.args(status))
        other = 77 if status != -9 else 0
        box.exec("e", gate.args(other))
        gate.open()
        told = status if status >= 0 else 128 - status
        assert (box.status(), box.status("e")) == (told, other)
        box.told()
        gate.close()
        assert box.exits() == [("e", other), ("", told)]
        assert (box.delete("e"), box.delete()) == (other, told)


# red: only CLD_KILLED counts as signalled: 11
def test_A18_a_core_dump_is_told_as_its_signal(lab: Lab) -> None:
    box = lab.box("a18-core", ["@signal", str(int(signal.SIGSEGV))])
    assert box.status() == 139
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern == "core":
        assert list(box.bundle.glob("core*")), "no core was dumped, so that this proves nothing"


# red: a stolen status is 0
def test_A19_an_unknown_status_is_never_0(lab: Lab) -> None:
    statuses = lab.call("stolen", id="a19", count=scale(50, 2000))
    assert set(statuses["before"]) == {255}
    assert set(statuses["racing"]) <= {7, 255}
    assert lab.stats()["stolen"] >= len(statuses["before"])
    lab.call("kill_slot", id="a19")
