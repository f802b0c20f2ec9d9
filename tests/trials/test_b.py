"""Trials B1 to B7: reaping, pids, zombies, signals. Each says how it was seen red."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.rig import DOWN, UP
from tests.faults import FULL, Lab, Later, scale, until

NS_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
needs_ns_last_pid = pytest.mark.skipif(
    not os.access(NS_LAST_PID, os.W_OK) or os.geteuid() != 0, reason="pids can't be chosen here (CONFIG_CHECKPOINT_RESTORE, root)"
)


# A small pid_max would be everybody's on this machine: the next pid is chosen instead, always the same one.
# red: an exit status remembered by pid, and taken by the next bind of that number
@needs_ns_last_pid
@pytest.mark.timeout(1200)
def test_B1_no_code_is_credited_to_the_wrong_process(lab: Lab) -> None:
    count = scale(300, 100_000)
    done = lab.call("recycled", id="b1", count=count, timeout=1100)
    assert [(told, wanted) for _, told, wanted in done if told != wanted] == []
    pids = [pid for pid, _, _ in done]
    most = max(pids.count(pid) for pid in set(pids[:3000]))
    assert most > min(count, 3000) // 20, "hardly a pid came twice, so that this proves nothing"
    lab.call("kill_slot", id="b1")


# red: sc_slot_kill of an exited slot signals its number: the stranger dies
@needs_ns_last_pid
def test_B2_a_reused_pid_is_never_hit(lab: Lab) -> None:
    other = lab.call("stranger", id="b2")
    assert other["same"], f"the pid did not come again in {other['attempts']} attempts"
    assert other["refused"] and other["alive"]
    lab.call("kill_slot", id="b2")


# red: the sweep without __WNOTHREAD, and for its own process group too: statuses come back as 0
@pytest.mark.timeout(600)
def test_B3_an_authors_subprocesses_keep_their_statuses(lab: Lab) -> None:
    count = scale(300, 10_000)
    box = lab.box("b3")
    # Orphans too: they are what the sweep is for.
    orphans = lab.box("b3-orphans", ["@orphans", str(scale(200, 4000))], start=False)
    work = Later(lambda: lab.call("subprocesses", count=count, timeout=500))
    orphans.task.start()
    number = 0
    while work.running:
        box.exec(f"e{number}", ["@exit", "3"])
        number += 1
    statuses = work.result()
    assert statuses.count(7) == count, sorted(set(statuses))
    for index in range(number):
        assert box.status(f"e{index}") == 3


# red: sc_sweep reaps nothing: they stay zombies
def test_B4_orphans_are_reaped_and_told_to_nobody(lab: Lab) -> None:
    before = lab.stats()["orphans"]
    count = scale(50, 5000)
    box = lab.box("b4", ["@orphans", str(count)])
    until(lambda: lab.stats()["orphans"] - before == count)
    assert [state for _, state in lab.process()["children"] if state == "Z"] == []
    assert [event.topic for event in box.events] == ["/tasks/create", "/tasks/start"]
    box.task.kill(9)
    box.told()
    assert box.exits() == [("", 137)]
    assert lab.stats()["orphans"] - before == count


# red: epoll_wait with a timeout of 20 ms
def test_B5_idle(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = lab.box("b5", ["@exit", "1"])
    box.told()
    lab.settled()
    lab.process()  # twice: what it imports is not idle
    began = lab.process()
    time.sleep(60 if FULL else 1)  # this is the trial, not a wait for something
    ended = lab.process()
    used = ended["cpu"] - began["cpu"]
    switches = ended["switches"] - began["switches"]
    assert switches <= (10 if FULL else 6), f"woken {switches} times"
    assert used < 0.010, f"{used * 1000:.1f} ms"


# red: serve ends at SIGTERM whoever lives
def test_B6_sigterm_with_containers_alive(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(debug=True)  # the level of this entry, as it is the seed's
    boxes = [lab.box(f"b6-{number}") for number in range(2)]
    gone = os.pidfd_open(lab.pid)
    os.kill(lab.pid, signal.SIGTERM)
    until(lambda: "SIGTERM" in lab.session.bundle.log, 5, "SIGTERM was not logged")
    third = lab.box("b6-third")  # it works on
    for box in boxes:
        box.task.kill(9)
        assert box.status() == 137
        assert box.told().message.exit_status == 137
    assert not select.select([gone], [], [], 0)[0]
    began = time.monotonic()
    third.task.kill(15)
    assert third.told().message.exit_status == 143
    assert select.select([gone], [], [], 10)[0], "the shim did not end"
    assert time.monotonic() - began < (2 if FULL else 10)
    os.close(gone)


# red: serve passes signals on to every slot
def test_B7_no_signal_but_by_kill(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = lab.box("b7", create=False)
    seen = box.bundle / "signals"
    box = lab.box("b7", ["@signals", str(seen)])
    until(seen.exists)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGUSR1):
        os.kill(lab.pid, signum)
    for number in range(5):
        other = lab.box(f"b7-{number}", ["@exit", "1"])
        box.exec(f"e{number}", ["@exit", "1"])
        assert (other.status(), box.status(f"e{number}")) == (1, 1)
        other.delete()
        box.delete(f"e{number}")
    lab.events.set_mode(DOWN)
    lab.reconnect()
    lab.events.set_mode(UP)
    lab.settled()
    assert seen.read_text() == ""
    box.task.kill(10)
    until(seen.read_text)
    assert seen.read_text() == "10\n"
