"""Trials A1 to A12: exits lost, late, misordered, doubled. The rest of section A is in test_a2 and test_a3.

Each says in a comment how it was seen red: what was broken in a copy of the core.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore import ledger
from shimcore.errors import FailedPrecondition, NotFound, ShimError
from shimcore.rig import DOWN, FROZEN, MUTE, UP, Gate
from tests.faults import FULL, Box, Lab, Later, scale, together, until

RUNNING, STOPPED = 2, 3  # containerd.v1.types.Status


# red: MEMORY_MAX and MEMORY_HARD_MAX of the outbox set to 1000: the rest of the exits never come
def test_A1_a_burst_while_the_consumer_sleeps(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    count = scale(1500, 10000)
    gate = lab.runtime.gate()
    init = lab.call("crowd", id="crowd", count=count, gate=str(gate.path))
    before = lab.process()["private"]
    lab.events.set_mode(FROZEN)
    gate.open()
    until(lambda: lab.stats()["told"] == count, 60, "not all were reaped")
    if FULL:
        time.sleep(30)
    grown = lab.process()["private"] - before
    assert grown < 2 * count + 8192, f"{grown} kB for {count} exits"
    lab.events.set_mode(UP)
    lab.events.wait("/tasks/exit", container="crowd", count=count, timeout=60)
    lab.settled()
    came = [(event.process, event.message.exit_status) for event in lab.events.of("crowd") if event.topic == "/tasks/exit"]
    assert sorted(came) == sorted((f"e{number}", number % 256) for number in range(count))
    lab.call("kill_slot", id="crowd")
    assert lab.events.wait("/tasks/exit", container="crowd", process="").message.pid == init


# red: sc_record taken out of `exited`: no record when Wait answers
def test_A2_what_has_no_live_pid_has_an_exit_recorded(lab: Lab) -> None:
    random.seed(2)
    boxes = [lab.box(f"a2-{number}", create=False) for number in range(scale(16, 400))]
    stop = threading.Event()
    wrong: list[str] = []

    def watch() -> None:
        while not stop.is_set():
            for box in boxes:
                with contextlib.suppress(NotFound):
                    state = box.task.state()
                    if state.status != STOPPED:
                        continue
                    record = ledger.last_exit(box.id, "", str(box.bundle))
                    if not state.HasField("exited_at") or record is None or record.exit_status != state.exit_status:
                        wrong.append(f"{box.id}: {state}, recorded {record}")

    def live(share: list[Box]) -> None:
        for box in share:
            pid = box.create()
            moment = random.randrange(3)
            if moment == 0:
                os.kill(pid, 9)
            with contextlib.suppress(ShimError):
                box.task.start()
            if moment == 1:
                os.kill(pid, 15)
            elif moment == 2:
                box.task.kill(9)
            status = box.task.wait().exit_status
            assert status in (137, 143)
            # The record was there before anybody heard of it.
            record = ledger.last_exit(box.id, "", str(box.bundle))
            assert record is not None and (record.pid, record.exit_status) == (pid, status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert together(*(lambda share=boxes[n::4]: live(share) for n in range(4))) == [None] * 4
    finally:
        stop.set()
        watcher.join()
    assert wrong == []


# red: sc_tell_if_due does not look at `busy`: init before its execs
def test_A3_inits_death_amid_execs_is_told_once(lab: Lab) -> None:
    random.seed(3)
    execs = scale(60, 500)
    for number in range(scale(3, 20)):
        gate = lab.runtime.gate(f"a3-{number}")
        box = lab.box(f"a3-{number}")
        moment = random.randrange(execs)
        done = threading.Semaphore(0)

        def run(exec_id: str, box: Box = box, gate: Gate = gate, done: threading.Semaphore = done) -> bool:
            try:
                box.exec(exec_id, gate.args(1))
                return True
            except ShimError:
                return False
            finally:
                done.release()

        def kill(moment: int = moment, box: Box = box, done: threading.Semaphore = done) -> None:
            for _ in range(moment):
                done.acquire()
            os.kill(box.pid, 9)
            gate.open()  # noqa: B023  (what a private pid namespace does: init's death ends the rest)

        def share(first: int, run: Callable[[str], bool] = run) -> list[str]:
            return [exec_id for exec_id in (f"e{n}" for n in range(first, execs, 8)) if run(exec_id)]

        results = together(kill, *(lambda first=first: share(first) for first in range(8)))
        started = sorted(exec_id for result in results[1:] for exec_id in result)
        box.told()
        gate.close()
        assert box.exits().count(("", 137)) == 1
        assert box.exits()[-1] == ("", 137)
        assert sorted(exec_id for exec_id, _ in box.exits()[:-1]) == started
        assert sorted(event.process for event in box.events if event.topic == "/tasks/exec-started") == started


# red: sc_tell_if_due does not look at `busy`: init first
@pytest.mark.timeout(1200)
def test_A4_init_and_exec_exit_together(lab: Lab) -> None:
    for number in range(scale(60, 10000)):
        lab.events.clear()
        gate = lab.runtime.gate(f"a4-{number}")
        box = lab.box(f"a4-{number}", gate.args(3))
        box.exec("e", gate.args(4))
        gate.open()
        assert box.status() == 3
        assert box.told().message.exit_status == 3
        gate.close()
        assert box.exits() == [("e", 4), ("", 3)]
        assert box.delete() == 3


# red: the same: init is told with an exec in flight
def test_A4_an_exec_in_flight_ends_before_init(lab: Lab) -> None:
    for number in range(scale(5, 200)):
        box = lab.box(f"a4f-{number}")
        box.task.exec("e", box.process(["@exit", "4"]))
        lab.runtime.rule("exec", "made dead", "end hold", id=box.id)
        start = Later(lambda box=box: box.task.start("e"))
        with lab.runtime.wait("exec", "end", id=box.id):
            os.kill(box.pid, 9)
            assert box.task.state().status == RUNNING
        start.result()
        box.told()
        assert box.exits() == [("e", 4), ("", 137)]


# red: sc_slot_open does not look at init: the runtime is called, and answers in its own words
def test_A5_no_exec_starts_after_inits_exit(lab: Lab) -> None:
    box = lab.box("a5")
    for name in ("late", "raced"):
        box.task.exec(name, box.process(["@sleep"]))
    lab.runtime.rule("exec", "begin hold", id="a5", exec_id="raced")
    raced = Later(lambda: box.task.start("raced"))
    with lab.runtime.wait("exec", "begin", id="a5"):
        os.kill(box.pid, 9)
        until(lambda: not os.path.exists(f"/proc/{box.pid}"))  # reaped, not a zombie only
        with pytest.raises(FailedPrecondition):
            box.task.start("late")
    with pytest.raises(ShimError):  # in the runtime's words: it found init dead
        raced.result()
    assert box.told().message.exit_status == 137
    with pytest.raises(FailedPrecondition):
        box.task.start("late")
    assert [call for call in lab.runtime.calls if call.startswith("exec a5")] == ["exec a5 raced"]
    assert box.exits() == [("", 137)]
    assert not {"/tasks/exec-started"} & {event.topic for event in box.events}


# red: sc_tell_if_due does not look at `announced` and `holds`: the exit before its start
@pytest.mark.timeout(1200)
def test_A6_an_exit_before_start_has_returned(lab: Lab) -> None:
    for number in range(scale(40, 10000)):
        lab.events.clear()
        box = lab.box(f"a6-{number}", ["@exit", "6"], start=False)
        lab.runtime.rule("start", "made dead", id=box.id)
        lab.runtime.rule("exec", "made dead", id=box.id)
        other = lab.box(f"a6x-{number}")
        lab.runtime.rule("exec", "made dead", id=other.id)
        other.exec("e", ["@exit", "5"])
        other.told("e")
        box.task.start()
        box.told()
        topics = [event.topic for event in box.events]
        assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit"]
        topics = [event.topic for event in other.events if event.process == "e"]
        assert topics == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
        box.delete()
        os.kill(other.pid, 9)
        other.told()
        other.delete()
        for name in ("start", "exec"):
            lab.runtime.forget(name, id=box.id)
            lab.runtime.forget(name, id=other.id)


FATES = ("signal 9", "exit 1", "kill 9")  # the process dies; the runtime fails; the runtime dies


# red: sc_slot_drop leaves `busy` alone: after a failed exec init is told after 10 s
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("step", ["begin", "made", "end"])
@pytest.mark.parametrize("command", ["create", "start", "exec"])
def test_A7_an_exit_at_every_step(lab: Lab, command: str, step: str, fate: str) -> None:
    box = lab.box(f"a7-{command}-{step}-{fate.replace(' ', '')}", create=False)
    lab.runtime.rule(command, f"{step} {fate}", id=box.id)
    made: list[str] = []
    before = time.monotonic()

    def attempt(name: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        with contextlib.suppress(ShimError):
            call()
            made.append(name)
        took = time.monotonic() - began
        assert took < (1 if FULL else 10), f"{name} took {took} s"

    attempt("create", box.create)
    attempt("start", box.task.start)
    attempt("exec", lambda: box.exec("e"))
    attempt("state", box.task.state)
    attempt("kill", lambda: box.task.kill(9))
    with contextlib.suppress(ShimError):
        box.task.kill(9, "e")  # here, where there is no pid namespace, it does not die with init
    if "create" in made:
        attempt("wait", lambda: made.append(str(box.status())))
        attempt("delete", box.delete)
        assert made[-1] == "delete"
        box.told()
        assert [exec_id for exec_id, _ in box.exits()].count("") == 1 and box.exits()[-1][0] == ""
    else:
        box.deleted = True
        assert box.exits() == []
    starts = [event.process for event in box.events if event.topic == "/tasks/exec-started"]
    assert [exec_id for exec_id, _ in box.exits() if exec_id] == starts
    assert lab.stats()["overdue"] == 0
    if fate != "signal 9" and command == "create":
        assert made == []
    assert time.monotonic() - before < 20
    lab.sweep()


ASK = """
import json, select, sys, time
from shimcore.rig import Task
from shimcore.ttrpc import Client
task = Task(Client(sys.argv[1], namespace=sys.argv[2]), sys.argv[3])
took = []
while not select.select([0], [], [], 0)[0]:
    began = time.monotonic()
    assert task.state().status == 2
    took.append(time.monotonic() - began)
    if len(took) == 1:
        print("asking", flush=True)
print(json.dumps(took))
"""


# red: a sleep of 0.2 s in _start_exec, on the RPC thread (full size)
def test_A8_state_is_quick_amid_parallel_execs(lab: Lab) -> None:
    count = scale(40, 200)
    box = lab.box("a8")
    # A process of its own: here its answers would wait for the threads that call.
    command = [sys.executable, "-c", ASK, lab.session.started.address, lab.rig.namespace, box.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking:
        assert asking.stdin and asking.stdout and asking.stdout.readline() == b"asking\n"
        results = together(*(lambda n=n: box.exec(f"e{n}", ["@exit", "1"]) for n in range(count)))
        took = json.loads(asking.communicate(b"\n")[0])
    assert all(isinstance(result, int) for result in results)
    lab.events.wait("/tasks/exit", container="a8", count=count)
    took.sort()
    p99 = took[len(took) * 99 // 100]
    assert p99 < (0.05 if FULL else 5), f"p99 {p99 * 1000:.1f} ms, worst {took[-1] * 1000:.1f} of {len(took)} calls"


@pytest.mark.timeout(1200)
def test_A9_every_exit_comes_when_containerd_returns(new_lab: Callable[..., Lab], shm: Path) -> None:
    lab = new_lab()
    lab.call("spill", path=str(shm), cap=64 << 20)
    count = scale(100, 3000)
    lab.call("sequence", id="a9", count=1)
    lab.events.wait("/tasks/exit", container="a9")
    lab.events.set_mode(DOWN)
    # More than memory takes, so that the rest goes by way of the spill file.
    lab.call("publish", count=4096)
    lab.call("sequence", id="b9", count=count)
    stats = lab.stats()
    assert stats["spilled"] > 0 and stats["dropped"] == 0
    if FULL:
        time.sleep(600)
    lab.events.set_mode(UP)
    lab.events.wait("/tasks/exit", container="b9", count=count, timeout=30)
    lab.settled()
    came = [event.process for event in lab.events.of("b9") if event.topic == "/tasks/exit"]
    assert came == [f"s{number}" for number in range(count)]
    assert lab.stats()["dropped"] == 0
    assert lab.events.count("/tasks/exec-added") == 4096
    for id in ("a9", "b9"):
        lab.call("kill_slot", id=id)
        lab.events.wait("/tasks/exit", container=id, process="")


# red: refused: an error taken for an acknowledgement; hung up: what was in flight freed by `disconnect`
@pytest.mark.parametrize("code", [14, 0], ids=["refused", "hung up"])
def test_A10_a_send_that_fails_is_sent_again(lab: Lab, code: int) -> None:
    gate = lab.runtime.gate()
    box = lab.box(f"a10-{code}", gate.args(10), create=False)
    client = lab.connect()
    caller = type(box.task)(client, box.id, timeout=10.0)
    caller.create(str(box.bundle), options=lab.rig.options)
    caller.start()
    lab.settled()
    client.close()
    lab.events.refused.clear()
    lab.events.refuse(code=code)
    gate.open()
    assert box.told().message.exit_status == 10
    gate.close()
    assert [event.topic for event in lab.events.refused] == ["/tasks/exit"]
    assert box.told().raw == lab.events.refused[0].raw
    assert box.exits() == [("", 10)]


# red: sc_tell_if_due waits for an empty flight: nothing is told beside a mute peer
def test_A11_a_mute_peer_holds_up_nobody(lab: Lab) -> None:
    lab.box("a11-first")
    lab.settled()
    lab.events.set_mode(MUTE)
    told = lab.stats()["told"]
    count = scale(20, 300)
    began = time.monotonic()
    for number in range(count):
        box = lab.box(f"a11-{number}", ["@exit", "11"])
        assert box.status() == 11
        assert box.task.state().exit_status == 11
        assert box.delete() == 11
    took = (time.monotonic() - began) / count
    stats = lab.stats()
    assert stats["told"] == told + count
    assert stats["in_flight"] > 0
    assert took < (0.1 if FULL else 2)
    assert [pid for pid, state in lab.process()["children"] if state == "Z"] == []
    lab.events.restart()
    lab.events.wait("/tasks/delete", container=f"a11-{count - 1}")


# red: sc_outbox_push drops while it backs off: the exits never come
def test_A12_the_true_code_after_containerds_absence(lab: Lab) -> None:
    gate = lab.runtime.gate()
    boxes = [lab.box(f"a12-{code}", gate.args(code)) for code in (0, 12, -15)]
    lab.settled()
    lab.events.set_mode(DOWN)
    lab.client.close()
    gate.open()
    lab.reconnect()
    for box, code in zip(boxes, (0, 12, 143), strict=True):
        assert box.status() == code
        state = box.task.state()
        assert (state.status, state.exit_status) == (STOPPED, code)
        assert box.delete() == code
    lab.events.set_mode(UP)
    for box, code in zip(boxes, (0, 12, 143), strict=True):
        assert box.told().message.exit_status == code
        lab.events.wait("/tasks/delete", container=box.id)
        assert [event.topic for event in box.events] == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
