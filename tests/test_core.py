"""_reaper.Core: jobs, timers, notes, slots, with an exit thread that is not the leader (tests/test_leader.py has that)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper
from shimcore.errors import AlreadyExists, FailedPrecondition, NotFound

HANG = 60.0  # seconds after which a test that should have ended has hung


@pytest.fixture
def core() -> Iterator[_reaper.Core]:
    made = _reaper.Core("ns", "")
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join(HANG)
    assert not thread.is_alive()


def next_note(core: _reaper.Core, kind: int) -> tuple[Any, ...]:
    """The next note, which has to be of this kind; it must not be kept waiting for long."""
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        for note in core.notes(1):
            assert note[0] == kind
            return note
    raise AssertionError("no note came")


def test_job(core: _reaper.Core) -> None:
    cookie = object()
    job = core.job(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=HANG, cookie=cookie)
    assert job.cookie is cookie
    with pytest.raises(ValueError, match="not ended"):
        job.result()
    assert next_note(core, _reaper.NOTE_JOB)[1] is job
    result = job.result()
    assert (result.status, result.signaled, result.output) == (3, False, b"out\nerr\n")
    assert not (result.truncated or result.timed_out)


def test_job_cap_and_timeout(core: _reaper.Core) -> None:
    core.job(["sh", "-c", "head -c 300000 /dev/zero"], timeout=HANG, cap=1000)
    result = next_note(core, _reaper.NOTE_JOB)[1].result()
    assert (result.status, len(result.output), bool(result.truncated)) == (0, 1000, True)
    core.job(["sh", "-c", "sleep 1000 & wait"], timeout=0.05)
    result = next_note(core, _reaper.NOTE_JOB)[1].result()
    assert (result.status, bool(result.timed_out), bool(result.signaled)) == (137, True, True)


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e12])
def test_job_without_a_deadline(core: _reaper.Core, timeout: float) -> None:
    core.job(["sh", "-c", "sleep 0.1; exit 4"], timeout=timeout)
    result = next_note(core, _reaper.NOTE_JOB)[1].result()
    assert (result.status, bool(result.timed_out)) == (4, False)


def test_job_environment_cwd_and_fds(core: _reaper.Core, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"from stdin\n")
    os.close(writer)
    core.job(["/bin/sh", "-c", "cat; echo $A; pwd"], timeout=HANG, env={"A": "1"}, cwd=str(tmp_path), fds={0: reader})
    os.close(reader)
    assert next_note(core, _reaper.NOTE_JOB)[1].result().output == f"from stdin\n1\n{tmp_path}\n".encode()


def test_job_that_cannot_be_started(core: _reaper.Core) -> None:
    with pytest.raises(FileNotFoundError):
        core.job(["/nonexistent"], timeout=1)
    assert core.stats()["jobs"] == 0


def test_timers_posts_and_their_references(core: _reaper.Core) -> None:
    cookies = [object() for _ in range(3)]
    counts = [sys.getrefcount(cookie) for cookie in cookies]
    for seconds, cookie in zip((0.03, 0.01, 0.02), cookies, strict=True):
        core.timer(seconds, cookie)
    del cookie
    order = [next_note(core, _reaper.NOTE_TIMER)[1] for _ in cookies]
    assert order == [cookies[1], cookies[2], cookies[0]]
    order.clear()
    assert [sys.getrefcount(cookie) for cookie in cookies] == counts
    core.post(print)
    assert next_note(core, _reaper.NOTE_POST) == (_reaper.NOTE_POST, print)


def test_a_timer_in_the_far_future_does_not_fire(core: _reaper.Core) -> None:
    core.timer(float("inf"), "never")
    core.timer(1e15, "never")
    core.timer(0.01, "soon")
    assert core.notes(HANG) == [(_reaper.NOTE_TIMER, "soon")]
    assert core.notes(0.05) == []


def test_notes_fd_is_readable_while_there_are_notes(core: _reaper.Core) -> None:
    import select

    assert select.select([core.notes_fd], [], [], 0)[0] == []
    core.post(print)
    assert select.select([core.notes_fd], [], [], HANG)[0]
    core.take()
    assert select.select([core.notes_fd], [], [], 0)[0] == []


def test_a_watched_pid(core: _reaper.Core) -> None:
    pid, pidfd = _reaper.spawn(["sh", "-c", "exit 5"])
    os.close(pidfd)
    core.watch(pid)
    before = time.time_ns()
    kind, told, status, at = next_note(core, _reaper.NOTE_PID)
    assert (kind, told, status) == (_reaper.NOTE_PID, pid, 5)
    assert abs(at - before) < HANG * 1e9
    with pytest.raises(ProcessLookupError):
        core.watch(pid)


def test_the_life_of_a_slot(core: _reaper.Core) -> None:
    slot = core.open("c")
    assert (slot.phase, slot.pid, slot.container_id, slot.exec_id) == (_reaper.OPENED, 0, "c", "")
    assert core.find("c") is slot
    assert core.find("c", "x") is None
    with pytest.raises(AlreadyExists):
        core.open("c")
    with pytest.raises(FailedPrecondition, match="not created"):
        slot.kill(15)
    pid, pidfd = _reaper.spawn(["sleep", "1000"])
    os.close(pidfd)
    slot.bind(pid)
    slot.announce()
    assert (slot.phase, slot.pid, slot.status) == (_reaper.BOUND, pid, _reaper.CREATED)
    slot.set_status(_reaper.RUNNING)
    assert slot.status == _reaper.RUNNING
    with pytest.raises(FailedPrecondition):
        slot.forget()
    execution = core.reserve("c", "x")
    with pytest.raises(AlreadyExists):
        core.reserve("c", "x")
    with pytest.raises(NotFound):
        core.reserve("d", "x")
    with pytest.raises(AlreadyExists, match="container c already exists"):
        core.reserve("c", "")
    assert execution.phase == _reaper.RESERVED
    before = time.time_ns()
    slot.kill(9)
    assert next_note(core, _reaper.NOTE_TOLD)[1] is slot
    assert (slot.phase, slot.status, slot.exit_status) == (_reaper.TOLD, _reaper.STOPPED, 137)
    assert before <= slot.exited_at <= time.time_ns()
    with pytest.raises(NotFound):
        slot.kill(9)
    with pytest.raises(FailedPrecondition, match="init has exited"):
        execution.open()
    assert [s.exec_id for s in core.slots()] == ["", "x"]
    slot.forget()
    assert core.slots() == []
    assert core.stats()["slots"] == 0
    stamp = core.stamps()[-1]
    assert stamp[:3] == ("c", "", pid)


def test_exits_of_many_at_once(core: _reaper.Core) -> None:
    pids = {}
    for number in range(200):
        slot = core.open(f"c{number}")
        pid, pidfd = _reaper.spawn(["sh", "-c", f"exit {number}"])
        os.close(pidfd)
        slot.bind(pid)
        slot.announce()
        pids[slot.container_id] = number
    told: dict[str, int] = {}
    while len(told) < 200:
        for note in core.notes(HANG):
            assert note[1].container_id not in told
            told[note[1].container_id] = note[1].exit_status
    assert told == pids
    assert core.stats()["stolen"] == 0


def test_a_core_that_goes_with_everything_still_under_way() -> None:
    gc.collect()
    fds = os.listdir("/proc/self/fd")
    for _ in range(20):
        made = _reaper.Core("ns", "/nonexistent/socket")
        thread = threading.Thread(target=made.run)
        thread.start()
        slot = made.open("c")
        pid, pidfd = _reaper.spawn(["sleep", "1000"], new_group=True)
        slot.bind(pid)
        slot.announce("/tasks/create", "t", b"x")
        made.timer(1000, object())
        made.post(print)
        job = made.job(["sleep", "1000"], timeout=1000)
        made.publish("/t", "t", b"")
        made.stop()
        thread.join(HANG)
        os.kill(pid, signal.SIGKILL)
        os.close(pidfd)
        os.waitpid(pid, 0)
        del job, slot, made
    gc.collect()  # a core and its slots refer to each other
    for line in subprocess.check_output(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], text=True).splitlines():
        if line.endswith("sleep 1000"):
            os.kill(int(line.split()[0]), signal.SIGKILL)
            os.waitpid(int(line.split()[0]), 0)
    assert len(os.listdir("/proc/self/fd")) == len(fds)
