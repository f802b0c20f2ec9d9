"""A shim of an author's: ours for runc, and a service by which a test looks at its daemon and works in it.

Installed and run by tests/faults.py; nothing but the daemon imports it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import _reaper, logger
from shimcore._ttrpc import INLINE, POOL, Context, Server
from shimcore.errors import NotFound
from shimcore.oci.service import RuncTask
from shimcore.oci.shim import RuncShim
from shimcore.publisher import RemotePublisher

RUN = str(Path(_reaper.__file__).parent / "_bin" / "fake-runtime"), "run"


LabTask = RuncTask


class TeardownTask(LabTask):
    """Its hook waits until it is let go, or holds the GIL."""

    teardown_timeout = float(os.environ.get("LAB_TEARDOWN") or 5)
    entered: list[str] = []
    let_go = threading.Event()

    def teardown(self, slot: _reaper.Slot) -> None:
        self.entered.append(slot.exec_id)
        if os.environ.get("LAB_HOLD_GIL") and len(self.entered) == 1:
            import ctypes

            ctypes.PyDLL(None).sleep(int(os.environ["LAB_HOLD_GIL"]))  # PyDLL does not let go of the GIL
        elif not os.environ.get("LAB_HOLD_GIL"):
            self.let_go.wait()


class LabShim(RuncShim):
    def create_task_service(self, publisher: RemotePublisher) -> LabTask:
        kind = TeardownTask if os.environ.get("LAB_TEARDOWN") else LabTask
        self.task = kind(publisher, self.exit)
        return self.task

    def register_services(self, server: Server, publisher: RemotePublisher) -> None:
        server.add_service("shimcore.test.Lab", {
            "Call": (POOL, self.call, BytesValue),  # type: ignore[dict-item]
            "Look": (INLINE, self.call, BytesValue),  # type: ignore[dict-item]
        })  # fmt: skip

    def call(self, request: BytesValue, context: Context) -> BytesValue:
        name, arguments = json.loads(request.value)
        return BytesValue(value=json.dumps(FUNCTIONS[name](self.task, **arguments)).encode())


FUNCTIONS: dict[str, Callable[..., Any]] = {}


def offered(function: Callable[..., Any]) -> Callable[..., Any]:
    FUNCTIONS[function.__name__] = function
    return function


# --- looking


@offered
def stats(task: LabTask) -> dict[str, int]:
    return task.core.stats()


@offered
def stamps(task: LabTask) -> list[Any]:
    return task.core.stamps()


@offered
def process(task: LabTask) -> dict[str, Any]:
    """private: kB; cpu: s; switches: voluntary context switches of all threads; children: [pid, state]."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    tasks = [Path(entry.path) for entry in os.scandir("/proc/self/task")]
    switches = 0
    children = []
    for path in tasks:
        switches += sum(int(line.split()[1]) for line in (path / "status").read_text().splitlines() if line.startswith("vol"))
        for pid in (path / "children").read_text().split():
            try:
                children.append([int(pid), Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]])
            except OSError:
                pass
    return {
        "private": sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")),
        "cpu": time.process_time(),
        "switches": switches,
        "threads": len(tasks),
        "fds": len(os.listdir("/proc/self/fd")),
        "children": children,
    }


# --- acting


@offered
def set_cgroups(task: LabTask, id: str, cgroups: dict[str, str]) -> None:
    """Where Stats of a container reads."""
    task.containers[id].cgroups = cgroups


@offered
def set_cgroup(task: LabTask, id: str, path: str) -> None:
    """Where Pids of a container reads."""
    task.containers[id].cgroup = path


@offered
def sleep(task: LabTask, seconds: float) -> None:
    time.sleep(seconds)


@offered
def chdir(task: LabTask, path: str) -> None:
    os.chdir(path)


@offered
def log(task: LabTask, text: str) -> None:
    logger.info(text)


@offered
def log_to(task: LabTask, path: str) -> int:
    """The log goes there from now on; how many lines the one before has dropped."""
    return logger.set_logger(logger.Logger(path)).dropped


@offered
def divide(task: LabTask) -> float:
    return 1 / 0


@offered
def bound(task: LabTask, id: str, seconds: float) -> None:
    """How long the exit of a container's init waits for its execs'."""
    slot = task.core.find(id)
    assert slot is not None
    slot.set_kill_rest("", seconds)


@offered
def spill(task: LabTask, path: str, cap: int) -> int:
    return task.core.spill(path, cap)


@offered
def publish(task: LabTask, count: int, size: int = 0, topic: str = "/tasks/exec-added") -> None:
    for number in range(count):
        payload = b"\x0a\x04fill" + b"\x12\x04%04d" % (number % 10000)
        payload += b"\x7a" + _varint(size) + bytes(size) if size else b""
        task.core.publish(topic, "containerd.events.TaskExecAdded", payload, "fill", f"{number}")


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _exec_slot(core: _reaper.Core, id: str, exec_id: str, *args: str) -> _reaper.Slot:
    slot = core.reserve(id, exec_id)
    slot.open()
    pid, fd = _reaper.spawn([*RUN, *args])
    os.close(fd)
    slot.bind(pid)
    slot.announce("/tasks/exec-started", "containerd.events.TaskExecStarted", b"")
    return slot


def _init_slot(core: _reaper.Core, id: str, *args: str) -> _reaper.Slot:
    slot = core.open(id)
    pid, fd = _reaper.spawn([*RUN, *args])
    os.close(fd)
    slot.bind(pid)
    slot.announce()
    return slot


@offered
def crowd(task: LabTask, id: str, count: int, gate: str) -> int:
    """A container whose init sleeps, and execs that wait at a gate, e0 with status 0, e1 with 1 ...; only exits are told."""
    core = task.core
    init = _init_slot(core, id, "@sleep")
    for number in range(count):
        slot = core.reserve(id, f"e{number}")
        slot.open()
        pid, fd = _reaper.spawn([*RUN, "@gate", gate, str(number % 256)])
        os.close(fd)
        slot.bind(pid)
        slot.announce()
    return init.pid


@offered
def sequence(task: LabTask, id: str, count: int, keep: bool = True) -> list[int]:
    """Execs that end one after the other, each told before the next begins; their pids."""
    pids = []
    core = task.core
    init = core.find(id) or _init_slot(core, id, "@sleep")
    for number in range(count):
        slot = _exec_slot(core, id, f"s{number}", "@exit", str(number % 256))
        _told(slot)
        pids.append(slot.pid)
        if not keep:
            slot.forget()
    return [init.pid, *pids]


@offered
def sequence_in(task: LabTask, id: str, count: int) -> None:
    """The same in a container that Create has made."""
    for number in range(count):
        slot = _exec_slot(task.core, id, f"s{number}", "@exit", "1")
        _told(slot)
        slot.forget()


@offered
def kill_slot(task: LabTask, id: str, exec_id: str = "", signum: int = 9) -> bool:
    slot = task.core.find(id, exec_id)
    assert slot is not None
    try:
        slot.kill(signum)
    except NotFound:
        return False
    return True


@offered
def recycled(task: LabTask, id: str, count: int) -> list[list[int]]:
    """Execs that all get the same pid, as far as the kernel lets us choose: [[pid, status told, status wanted] ...]."""
    core = task.core
    core.find(id) or _init_slot(core, id, "@sleep")
    out = []
    wanted = 0
    for number in range(count):
        if wanted:
            _next_pid(wanted)
        slot = _exec_slot(core, id, f"r{number}", "@exit", str(number % 255 + 1))
        wanted = slot.pid
        _told(slot)
        out.append([slot.pid, slot.exit_status, number % 255 + 1])
    return out


def _next_pid(pid: int) -> None:
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))


@offered
def stranger(task: LabTask, id: str) -> dict[str, Any]:
    """An exec ends, and somebody else gets its pid: a Kill of the exec must not reach him."""
    core = task.core
    core.find(id) or _init_slot(core, id, "@sleep")
    slot = _exec_slot(core, id, "gone", "@exit", "5")
    _told(slot)
    for _ in range(1000):
        _next_pid(slot.pid)
        other = subprocess.Popen([*RUN, "@sleep"])
        if other.pid == slot.pid:
            break
        other.kill()
        other.wait()
    same = other.pid == slot.pid
    try:
        slot.kill(signal.SIGKILL)
        refused = False
    except NotFound:
        refused = True
    alive = other.poll() is None
    other.kill()
    other.wait()
    return {"same": same, "refused": refused, "alive": alive}


@offered
def subprocesses(task: LabTask, count: int) -> list[int]:
    """An author's own children while others die: their statuses."""
    return [subprocess.run([*RUN, "@exit", "7"]).returncode for _ in range(count)]


@offered
def stolen(task: LabTask, id: str, count: int) -> dict[str, list[int]]:
    """Statuses that are told of processes whose statuses an author's code takes first, or tries to."""
    core = task.core
    core.find(id) or _init_slot(core, id, "@sleep")
    before, racing = [], []
    for number in range(count):
        slot = core.reserve(id, f"b{number}")
        slot.open()
        pid, fd = _reaper.spawn([*RUN, "@exit", "7"])
        os.close(fd)
        os.waitpid(pid, 0)
        slot.bind(pid)
        slot.announce()
        _told(slot)
        before.append(slot.exit_status)
        slot = _exec_slot(core, id, f"t{number}", "@exit", "7")
        try:
            os.waitpid(slot.pid, 0)
        except ChildProcessError:
            pass
        _told(slot)
        racing.append(slot.exit_status)
    return {"before": before, "racing": racing}


@offered
def hook(task: TeardownTask, let_go: bool = False) -> list[str]:
    if let_go:
        task.let_go.set()
    return task.entered


def _told(slot: _reaper.Slot, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while slot.phase != _reaper.TOLD:
        assert time.monotonic() < deadline
        time.sleep(0.0002)
