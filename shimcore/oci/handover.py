"""What the task service hands over to new code when the shim is upgraded in place (upgrade.py): its containers, their
processes and the open ends of their stdio.

What runs by itself is stopped by hand_over() and begun again by go_on(): the relay's thread. The coroutines that look after
output are not taken over but made anew, by what they were made by before.
"""

from __future__ import annotations

from .._reaper import DROPPED, OPENED, TOLD
from ..errors import FailedPrecondition
from .container import Container
from .options import Options
from .process import Process
from .readers import Lost, Policy
from .runc import Runtime
from .stdio import Stdio, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .._reaper import Core
    from .relay import Carried
    from .service import RuncTask

# Container's own fields, as they are.
_FIELDS = (
    "bundle", "cgroup", "cgroups", "checkpoint", "log_read", "mounted", "namespace", "private_pids", "rootfs", "spill_folder",
)  # fmt: skip
_PROCESS = ("spec", "stderr", "stdin", "stdin_closed", "stdout", "terminal")


def _processes(task: RuncTask) -> Iterator[Process]:
    for container in task.containers.values():
        yield container.init
        yield from container.execs.values()


def _carried(task: RuncTask) -> list[Carried]:
    """What the relay carries of all processes."""
    return [carried for process in _processes(task) if process.io is not None for carried in _carried_of(process.io)]


def _carried_of(io: Stdio) -> list[Carried]:
    found: list[Carried] = [] if io._console is None else [io._console]
    if io.copied:
        from .copying import copied

        found += copied(io)
    return found


# --- in the old code


def save(task: RuncTask, trial: bool) -> dict[str, Any]:
    """Raises FailedPrecondition where there is something that can't be handed over."""
    if task.sandbox.alive:
        raise FailedPrecondition("this shim is a pod's sandbox: its pause process would end with the code that made it")
    if not trial and not task.containers:
        raise FailedPrecondition("it has no container yet, or none any more")
    if _carried(task) and not trial:
        from .relay import hold

        hold(True)
    containers = [one for one in task.containers.values() if one.ready and one.init.slot.phase != OPENED]
    fds: list[int] = []
    saved = [_save_container(container, fds) for container in containers]
    return {"containers": saved, "lost": _save_lost(task.lost), "fds": fds}


def _save_lost(lost: Lost) -> list[int]:
    return [lost.dropped, lost.spilled]


def _save_container(container: Container, fds: list[int]) -> dict[str, Any]:
    policy = container.policy
    return {
        "id": container.id,
        "options": container.options.values(),
        # Code that knows no copying refuses the fourth.
        "policy": [policy.action, policy.after, policy.max, *([True] if policy.copy else [])],
        "lost": _save_lost(container.lost),
        "init": _save_process(container.init, fds),
        "execs": [_save_process(one, fds) for one in container.execs.values() if one.slot.phase != OPENED],
        **{name: getattr(container, name) for name in _FIELDS},
    }


def _save_process(process: Process, fds: list[int]) -> dict[str, Any]:
    if process.console_socket is not None:
        raise FailedPrecondition("a container with a terminal waits to be restored from a checkpoint")
    return {
        "exec": process.exec_id,
        "io": None if process.io is None else _save_io(process.io, fds),
        "size": None if process.size is None else list(process.size),
        **{name: getattr(process, name) for name in _PROCESS},
    }


def _save_io(io: Stdio, fds: list[int]) -> dict[str, Any]:
    if io.streamed:
        raise FailedPrecondition("a process has containerd's streams for its stdio, whose calls never rest")
    console, logger = io._console, io.logger
    streams = [(one.name, one.read_fd, one.write_fd) for one in io.streams if not one.carried]
    ends = [*io._child.values(), io._input, io._output, io._stdin_hold]
    for one in io.streams:
        ends += [one.read_fd, one.write_fd]
    saved: dict[str, Any] = {
        "child": [[number, fd] for number, fd in io._child.items()],
        "input": io._input,
        "output": io._output,
        "streams": streams,
        "stdin_hold": io._stdin_hold,
        "closed": io._closed,
        "console": None,
        "logger": None,
    }
    if console is not None and not console.closed:
        saved["console"] = console.save()
        ends.append(console.master)
    if io.copied:
        from .copying import save

        saved["copied"], copied_ends = save(io)
        ends += copied_ends
    if logger is not None:
        saved["logger"] = [logger._path, logger._fd]
        ends.append(logger._fd)
    fds += [fd for fd in ends if fd >= 0 and fd not in fds]
    return saved


# --- in the new code


def restore(task: RuncTask, state: dict[str, Any]) -> None:
    task.lost.dropped, task.lost.spilled = state["lost"]
    for saved in state["containers"]:
        container = _container(task, saved)
        task.containers[container.id] = container
    for process in _processes(task):
        process.streams = task.the_streams


def _container(task: RuncTask, saved: dict[str, Any]) -> Container:
    id = saved["id"]
    init = _process(task.core, id, saved["bundle"], saved["init"])
    container = Container(id, saved["namespace"], saved["bundle"], init, task.lost)
    for name in _FIELDS:
        setattr(container, name, saved[name])
    container.options = Options().update(saved["options"])
    container.runtime = Runtime(container.options, container.namespace, container.bundle)
    container.policy = Policy(*saved["policy"])
    container.lost.dropped, container.lost.spilled = saved["lost"]
    container.ready = True
    for one in saved["execs"]:
        container.execs[one["exec"]] = _process(task.core, id, container.bundle, one)
    return container


def _process(core: Core, id: str, bundle: str, saved: dict[str, Any]) -> Process:
    slot = core.find(id, saved["exec"])
    if slot is None:
        raise FailedPrecondition(f"process {saved['exec']!r} of container {id} is not in the exit table")
    process = Process(slot, bundle, "", "", "")
    for name in _PROCESS:
        setattr(process, name, saved[name])
    process.size = None if saved["size"] is None else (saved["size"][0], saved["size"][1])
    process.io = None if saved["io"] is None else _io(saved["io"])
    slot.cookie = process
    if slot.phase in (TOLD, DROPPED):
        process.told.set()
    return process


def _io(saved: dict[str, Any]) -> Stdio:
    io = Stdio()
    io._child = dict(saved["child"])
    io._input, io._output, io._stdin_hold = saved["input"], saved["output"], saved["stdin_hold"]
    io._closed = saved["closed"]
    io.streams = [Stream(*one) for one in saved["streams"]]
    if saved["logger"] is not None:
        from .binlog import Logger

        io.logger = Logger.adopt(*saved["logger"])
    if saved.get("copied") is not None:  # older code has none
        from .copying import restore

        restore(io, saved["copied"])
    if saved["console"] is not None:
        from .relay import Console

        io._console = Console.restore(saved["console"])
    return io


def resume(task: RuncTask, restored: bool) -> None:
    """restored: in the new code; else in the old one, which goes on."""
    carried = _carried(task)
    if carried:
        from .relay import carry_on, hold

        if restored:
            carry_on(carried)
        else:
            hold(False)
    if not restored:
        return
    for container in task.containers.values():
        for process in (container.init, *container.execs.values()):
            if process.io is None or process.io._closed:
                continue
            if process.slot.phase == TOLD:
                process.ended(task.core)
            elif not process.io._child and process.slot.pid:
                folder = "" if process.exec_id else container.spill_folder  # only init's output is kept on disk
                process.watch_readers(task.core, container.policy, container.lost, folder)
