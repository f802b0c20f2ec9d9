"""Trials G1 to G3: memory and threads. Each says how it was seen red."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.protos import task_pb2
from shimcore.rig import FROZEN, UP
from shimcore.ttrpc import codec
from tests.faults import Lab, Later, scale, together, until


# red: 4 KiB leaked with each slot
@pytest.mark.timeout(1800)
def test_G1_private_memory_stays_flat(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = lab.box("g1")

    def execs(first: int, count: int) -> None:
        for number in range(first, first + count):
            box.exec(f"e{number}", ["@exit", "1"])
            box.status(f"e{number}")
            box.delete(f"e{number}")

    execs(0, 300)
    lab.settled()
    lab.process()
    before = lab.process()
    execs(1000, scale(700, 50_000))
    lab.settled()
    after = lab.process()
    assert after["private"] - before["private"] < 1024, f"{before['private']} kB, then {after['private']} kB"
    assert after["fds"] == before["fds"]


# red: memory: MEMORY_MAX set to 1 << 30; spill: no cap of the file
@pytest.mark.parametrize("file", [False, True], ids=["memory", "spill"])
def test_G2_a_stalled_consumer(new_lab: Callable[..., Lab], shm: Path, file: bool) -> None:
    lab = new_lab()
    cap = 8 << 20
    if file:
        lab.call("spill", path=str(shm), cap=cap)
    lab.settled()
    lab.process()
    before = lab.process()["private"]
    lab.events.set_mode(FROZEN)
    count = scale(40_000, 1_000_000)
    lab.call("publish", count=count, size=1000)
    grown = lab.process()["private"] - before
    stats = lab.stats()
    assert grown < 12_000, f"{grown} kB"  # 4,096 events of 1.2 kB, and what the allocator keeps
    assert stats["dropped"] > 0 and (stats["spilled"] > 0) == file
    if file:
        assert shm.stat().st_size < cap + 4096
    # What must not be lost still finds room.
    box = lab.box("g2", ["@exit", "2"])
    assert box.status() == 2
    lab.events.set_mode(UP)
    assert box.told(timeout=60).message.exit_status == 2
    lab.settled()


# red: a thread made for each exec
def test_G3_threads(lab: Lab) -> None:
    waits = scale(2000, 10_000)
    execs = scale(50, 200)
    box = lab.box("g3")
    gate = lab.runtime.gate()
    box.exec("waited", gate.args(3))
    request = task_pb2.WaitRequest(id="g3", exec_id="waited").SerializeToString()
    data = codec.encode_request("containerd.task.v2.Task", "Wait", request)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(lab.session.started.address.removeprefix("unix://"))
        client.settimeout(30)
        for n in range(waits):
            client.sendall(codec.encode_frame(1 + 2 * n, codec.TYPE_REQUEST, codec.FLAG_REMOTE_CLOSED, data))
        lab.runtime.rule("exec", "made hold", id="g3")  # frozen runtimes, all at once
        starts = [Later(lambda n=n: box.exec(f"e{n}", ["@exit", "1"])) for n in range(execs)]
        held = [lab.runtime.wait("exec", "made", id="g3") for _ in range(execs)]
        until(lambda: lab.process()["threads"] <= 6)  # a second thread of the pool ends when nothing is left for it
        # Another container's life goes on beside them.
        other = lab.box("g3-other", ["@exit", "9"])
        assert other.status() == 9 and other.delete() == 9
        for call in held:
            call.release()
        for start in starts:
            start.result()
        until(lambda: lab.process()["threads"] <= 6)
        gate.open()
        parser = codec.FrameParser()
        answers = []
        while len(answers) < waits:
            answers += parser.feed(client.recv(1 << 18))
        replies = [task_pb2.WaitResponse.FromString(codec.decode_response(answer.data).payload) for answer in answers]
        statuses = {reply.exit_status for reply in replies}
        assert statuses == {3}
        assert len({answer.stream_id for answer in answers}) == waits
    gate.close()
    lab.runtime.forget("exec", id="g3")
    assert together(lambda: lab.events.wait("/tasks/exit", container="g3", count=execs + 1))[0].container == "g3"
    until(lambda: not [pid for pid, state in lab.process()["children"] if state == "Z"])
