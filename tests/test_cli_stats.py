"""`shimcore stats`, on real containers under our shim and the stock one."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shimcore import ttrpc
from shimcore.cli import nodes, stats
from shimcore.protos import anys, metrics_v1_pb2, metrics_v2_pb2, task_pb2, task_v3_pb2
from shimcore.rig import Rig, Session
from tests.test_cli import STOCK, cli

GROUP = {"io.containerd.runc.v2.group": "grp"}


def running(rig: Rig, args: list[str], **more: object) -> Session:
    box = rig.container(args, **more)  # type: ignore[arg-type]
    box.create()
    box.start()
    return box


@pytest.fixture(params=["ours", "stock"])
def boxes(request: pytest.FixtureRequest, make_rig: Callable[..., Rig], shim_dir: Path) -> Iterator[tuple[Session, Session]]:
    """One that spins and one that sleeps, under one shim."""
    if not shutil.which("runc"):
        pytest.skip("runc is not installed")
    if request.param == "stock" and not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    rig = make_rig(STOCK if request.param == "stock" else shim_dir / "containerd-shim-runc-v2-py")
    spin = running(rig, ["sh", "-c", "while :; do :; done"], annotations=GROUP)
    sleep = running(rig, ["sh", "-c", "sleep 1000 & sleep 1000"], annotations=GROUP)
    assert spin.shim_pid == sleep.shim_pid
    yield spin, sleep
    for box in (spin, sleep):
        box.dispose()


def test_each_container_of_a_shim(boxes: tuple[Session, Session]) -> None:
    """red: `containers` gives the shim's own id alone: the second is missing under the stock shim"""
    spin, sleep = boxes
    told = {one["container"]: one for one in json.loads(cli("stats", "--once", "-n", "0.3", "--json", str(spin.shim_pid)))}
    assert set(told) == {spin.id, sleep.id}
    for box in boxes:
        one = told[box.id]
        assert (one["namespace"], one["shim_pid"], one["error"]) == (box.rig.namespace, box.shim_pid, "")
        assert 0 < one["memory"] < 1 << 30
    assert told[spin.id]["cpu_percent"] > told[sleep.id]["cpu_percent"] >= 0
    assert told[sleep.id]["pids"] >= 2
    head, *rows = cli("stats", "--once", "-n", "0.1", str(spin.shim_pid)).splitlines()
    assert head.split()[:2] == ["NAMESPACE", "CONTAINER"] and len(rows) == 2
    assert {row.split()[1] for row in rows} == {spin.id, sleep.id}


def test_live_on_a_terminal_and_in_a_pipe(boxes: tuple[Session, Session]) -> None:
    command = [sys.executable, "-m", "shimcore.cli", "stats", "-n", "0.1", str(boxes[0].shim_pid)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        seen = b""
        while seen.count(b"\x1b[H\x1b[J") < 3:
            seen += os.read(ours, 65536)
        child.send_signal(signal.SIGINT)
    os.close(ours)
    assert child.returncode == 0
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [json.loads(child.stdout.readline()) for _ in range(2)]
        child.send_signal(signal.SIGINT)
    spins = [next(one for one in line if one["container"] == boxes[0].id) for line in lines]
    assert spins[0]["at"] < spins[1]["at"] and spins[0]["cpu_ns"] < spins[1]["cpu_ns"]
    assert child.returncode == 0


def test_a_shim_that_can_not_be_reached(tmp_path: Path) -> None:
    gone = nodes.Shim(1, "containerd-shim-x-v1", "n", "i", str(tmp_path / "i"), socket=str(tmp_path / "none"))
    mute = nodes.Shim(2, "containerd-shim-x-v1", "n", "j", str(tmp_path / "j"))
    one, other = stats.sample([gone, mute])
    assert one.error.startswith("the shim can't be reached: ") and other.error == "the shim listens on no socket"
    assert "no shim of a container nothing" in cli("stats", "--once", "nothing", status=1)


@pytest.mark.parametrize("version", [2, 3])
def test_either_version_of_the_task_api(version: int, tmp_path: Path) -> None:
    """red: asked of version 2 alone, a shim of containerd 2.x has no figures"""
    answer = task_pb2.StatsResponse()
    anys.pack(answer.stats, metrics_v2_pb2.Metrics(pids=metrics_v2_pb2.PidsStat(current=5)))
    task = SimpleNamespace(stats=lambda request, context: answer)
    module = task_pb2 if version == 2 else task_v3_pb2
    service = module.DESCRIPTOR.services_by_name["Task"]
    with ttrpc.Server() as server:
        server.register(service, task)
        server.listen(str(tmp_path / "s"))
        server.start()
        shim = nodes.Shim(1, "containerd-shim-x-v1", "n", "i", str(tmp_path / "none" / "i"), socket=str(tmp_path / "s"))
        (usage,) = stats.sample([shim])
        assert (usage.error, usage.pids) == ("", 5)


def filled(message: object) -> stats.Usage:
    usage = stats.Usage("n", "c", "s", 1)
    stats._fill(usage, message.DESCRIPTOR.full_name, message.SerializeToString())  # type: ignore[attr-defined]
    return usage


def test_both_kinds_of_figures() -> None:
    v1 = metrics_v1_pb2.Metrics()
    v1.cpu.usage.total = 5
    v1.memory.usage.usage, v1.memory.total_inactive_file, v1.memory.usage.limit = 100, 30, (1 << 63) - 4096
    v1.pids.current = 7
    usage = filled(v1)
    assert (usage.cpu_ns, usage.memory, usage.memory_limit, usage.pids, usage.pids_limit) == (5, 70, None, 7, None)
    v2 = metrics_v2_pb2.Metrics()
    v2.cpu.usage_usec = 5
    v2.memory.usage, v2.memory.inactive_file, v2.memory.usage_limit = 100, 30, 4096
    v2.pids.current, v2.pids.limit = 7, 9
    usage = filled(v2)
    assert (usage.cpu_ns, usage.memory, usage.memory_limit, usage.pids, usage.pids_limit) == (5000, 70, 4096, 7, 9)
    usage = stats.Usage("n", "c", "s", 1)
    stats._fill(usage, "some.Other", b"")
    assert "some.Other" in usage.error


@pytest.mark.parametrize(
    ("amount", "said"), [(None, "-"), (0, "0B"), (1023, "1023B"), (1536, "1.5K"), (3 << 20, "3.0M"), (1 << 60, "1048576.0T")]
)
def test_sizes(amount: int | None, said: str) -> None:
    assert stats.size(amount) == said
