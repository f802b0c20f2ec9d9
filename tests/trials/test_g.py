"""Trials G1 to G5 and G10: memory, threads, Stats, what is called and how often. Each says how it was seen red, or (G4, G5, G10)
what would turn it so.

G6 and G7 stand in tests/test_debug.py, G8 in tests/test_cli.py, G9 in tests/test_template.py."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.errors import DeadlineExceeded
from shimcore.protos import metrics_v2_pb2, task_pb2
from shimcore.rig import FROZEN, UP, Rig
from shimcore.ttrpc import codec
from tests.faults import FULL, Lab, Later, scale, together, until


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


# red: Meter.read without the branch for a reading that has stalled: each call takes its second; without `within`, all hang
@pytest.mark.parametrize("earlier", [True, False], ids=["an earlier reading", "none"])
def test_G5_stats_while_the_kernel_stalls(lab: Lab, tmp_path: Path, earlier: bool) -> None:
    good, stalled = tmp_path / "good", tmp_path / "stalled"
    for path, box in ((good, lab.box("fine")), (stalled, lab.box("stuck"))):
        path.mkdir()
        (path / "pids.current").write_text("3\n")
        lab.call("set_cgroups", id=box.id, cgroups={"": str(path)})
    fine, stuck = lab.boxes[-2:]
    if earlier:
        assert metrics_v2_pb2.Metrics.FromString(stuck.task.stats().value).pids.current == 3
    assert metrics_v2_pb2.Metrics.FromString(fine.task.stats().value).pids.current == 3
    (stalled / "pids.current").unlink()
    os.mkfifo(stalled / "pids.current")  # its reader waits for a writer

    def ask() -> int:
        return metrics_v2_pb2.Metrics.FromString(stuck.task.stats().value).pids.current

    answers = together(*[ask] * 20, timeout=20)
    if earlier:
        assert answers == [3] * 20
        assert ask() == 3
    else:
        assert {type(answer) for answer in answers} == {DeadlineExceeded}
    # The other one's are answered from its last reading, and a whole life goes on beside.
    assert metrics_v2_pb2.Metrics.FromString(fine.task.stats().value).pids.current == 3
    other = lab.box("beside", ["@exit", "4"])
    assert other.status() == 4 and other.delete() == 4
    writer = os.open(stalled / "pids.current", os.O_WRONLY)  # the kernel goes on
    os.write(writer, b"8\n")
    os.close(writer)
    (stalled / "pids.current").unlink()
    (stalled / "pids.current").write_text("9\n")
    until(lambda: ask() == 9)


# red: the files read on the RPC thread one by one with a sleep of 1 ms between
def test_G5_stats_are_quick(lab: Lab) -> None:
    box = lab.box("quick")
    lab.call("set_cgroups", id=box.id, cgroups={"": "/sys/fs/cgroup"})
    took = []
    for _ in range(scale(100, 2000)):
        began = time.monotonic()
        box.task.stats()
        took.append(time.monotonic() - began)
    took.sort()
    if FULL:
        assert took[int(len(took) * 0.99)] < 0.005, f"p99 {took[int(len(took) * 0.99)] * 1e3:.1f} ms"


# red: State answered by `runc state`; a second runtime call for each exec
def test_G4_one_runtime_call_for_each_exec_and_none_for_state(lab: Lab) -> None:
    box = lab.box("g4")
    before = list(lab.runtime.calls)
    for number in range(20):
        box.exec(f"e{number}", ["@exit", "1"])
        for _ in range(5):
            box.task.state()
            box.task.state(f"e{number}")
            box.task.pids()
            box.task.connect()
        assert box.status(f"e{number}") == 1
        assert box.delete(f"e{number}") == 1
    assert lab.runtime.calls[len(before) :] == [f"exec g4 e{number}" for number in range(20)]


# red: adjust_oom_score left out of _place
def test_G10_the_shims_oom_score_stands_between_containerds_and_the_containers(shim_dir: Path, rootfs: Path) -> None:
    """That a warm start gives the same is told by the comparison in test_template."""
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        container = rig.container(["sleep", "100"])
        ours = int(Path(f"/proc/{os.getpid()}/oom_score_adj").read_text())
        assert int(Path(f"/proc/{container.shim_pid}/oom_score_adj").read_text()) == min(ours + 1, 1000)
        container.create()
        container.start()
        assert int(Path(f"/proc/{container.pid}/oom_score_adj").read_text()) == min(ours + 1, 1000)
        container.task.kill(9)
        container.wait()
        container.delete()
