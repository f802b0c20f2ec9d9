"""What containerd and its users may expect of any shim over an OCI runtime, each as a trial of its own in a fresh rig.

A trial is a function of a rig whose docstring's first line says what is expected; what it raises is why it failed. What it leaves
on the machine fails it too.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shimcore.errors import Closed, NotFound, ShimError, Unavailable
from shimcore.rig.activate import GENERATIONS, ActivationError
from shimcore.rig.events import DOWN, MUTE, UP, Event
from shimcore.rig.leaks import alive
from shimcore.rig.session import Rig, Session

PASSED, FAILED = "passed", "failed"


class Broken(Exception):
    """What was expected did not come true; says what came instead."""


@dataclass(frozen=True, slots=True)
class Result:
    """One trial's outcome. took: seconds; detail: why it failed, else ""."""

    name: str
    expects: str
    outcome: str
    detail: str
    took: float


def _check(true: object, what: str) -> None:
    if not true:
        raise Broken(what)


def _same(what: str, found: object, wanted: object) -> None:
    _check(found == wanted, f"{what}: {found!r} instead of {wanted!r}")


def _refused(what: str, call: Callable[[], object], kind: type[ShimError] = ShimError) -> None:
    try:
        call()
    except kind:
        return
    except ShimError as error:
        raise Broken(f"{what}: {type(error).__name__} ({error}) instead of {kind.__name__}") from None
    raise Broken(f"{what} was answered as if all were well")


def _running(rig: Rig, *args: str, **options: bool) -> Session:
    container = rig.container(args or ("sleep", "1000"), stdin=options.get("stdin", False), read=options.get("read", True))
    container.create()
    container.start()
    return container


def _exit(rig: Rig, container: Session, process: str = "", timeout: float = 10.0) -> Event:
    return rig.events.wait("/tasks/exit", container=container.id, process=process, timeout=timeout)


def _killed(rig: Rig, container: Session, *, may_end: bool = False) -> None:
    """may_end: the shim may do so once it has told the exit."""
    container.task.kill(signal.SIGKILL)
    if not may_end:
        _same("exit status after SIGKILL", container.wait(), 137)
    _same("exit that is told after SIGKILL", _exit(rig, container).message.exit_status, 137)
    try:
        container.delete()
    except (Closed, Unavailable):  # it has ended, or is about to
        if not may_end:
            raise
        container.cleanup()


def whole_life(rig: Rig) -> None:
    """create, start, exit and delete are told once each, in this order, with the same pid and status"""
    container = rig.container(["sh", "-c", "echo out; echo err >&2; exit 42"])
    _same("status", container.run(), 42)
    _same("output", (container.output, container.errors), ("out\n", "err\n"))
    exited = _exit(rig, container).message
    answer = container.delete()
    rig.events.wait("/tasks/delete", container=container.id)
    topics = [event.topic for event in container.events]
    _same("events", topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"])
    _same("pids", {event.message.pid for event in container.events} | {answer.pid}, {container.pid})
    _same("status of the event and of Delete", (exited.exit_status, answer.exit_status), (42, 42))
    _same("time of exit in Delete", answer.exited_at.ToNanoseconds(), exited.exited_at.ToNanoseconds())


def execs(rig: Rig) -> None:
    """an exec is told added, started and exited, and its exit comes before init's"""
    container = _running(rig)
    process = container.exec(["sh", "-c", "exit 7"])
    _same("the exec's status", process.wait(), 7)
    _exit(rig, container, process.id)
    told = [event.topic for event in container.events if event.process == process.id]
    _same("events of the exec", told, ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"])
    last = container.exec(["sleep", "1000"])
    container.task.kill(signal.SIGKILL)
    container.wait()
    _exit(rig, container)
    _same("exits", [event.process for event in container.events if event.topic == "/tasks/exit"], [process.id, last.id, ""])
    process.delete()
    last.delete()
    container.delete()


def early_exit(rig: Rig) -> None:
    """a process that ends at once is told started before it is told exited, 20 times out of 20"""
    for _ in range(20):
        container = rig.container(["true"])
        container.run()
        _exit(rig, container)
        topics = rig.events.topics(container.id)
        _same("events", topics, ["/tasks/create", "/tasks/start", "/tasks/exit"])
        container.delete()


def late_wait(rig: Rig) -> None:
    """Wait and State long after the exit answer with its status and time"""
    container = rig.container(["sh", "-c", "exit 9"])
    container.run()
    told = _exit(rig, container).message
    again = container.task.wait()
    _same("Wait", (again.exit_status, again.exited_at), (9, told.exited_at))
    state = container.task.state()
    _same("State", (state.status, state.exit_status), (3, 9))
    container.delete()


def refusals(rig: Rig) -> None:
    """Delete of what runs, Kill of what is gone, and an exec in what has ended are refused"""
    container = _running(rig)
    _refused("Delete of a running container", container.task.delete)
    _refused("Kill of an exec that is not there", lambda: container.task.kill(9, "nobody"), NotFound)
    container.task.kill(signal.SIGKILL)
    container.wait()
    _exit(rig, container)
    _refused("Kill of a stopped container", lambda: container.task.kill(9), NotFound)
    _refused("an exec in a stopped container", lambda: container.exec(["true"]))
    container.delete()


def failed_create(rig: Rig) -> None:
    """a Create that fails says why, is told by no exit, and leaves nothing"""
    container = rig.container(["/no/such/program"])
    try:
        container.create()
    except ShimError as error:
        _check("no such file" in str(error), f"the error does not say why: {error}")
    else:
        raise Broken("Create of a program that is not there succeeded")
    container.end()
    _check("/tasks/exit" not in rig.events.topics(container.id), "an exit was told of what never ran")


def never_started(rig: Rig) -> None:
    """a container that was created and killed but never started is waited for and deleted"""
    container = rig.container(["sleep", "1000"])
    container.create()
    _killed(rig, container)


def stdin(rig: Rig) -> None:
    """stdin reaches the process, and CloseIO ends it"""
    container = _running(rig, "cat", stdin=True)
    container.stdio.write(b"words\n")
    container.close_stdin()
    _same("status", container.wait(), 0)
    container.stdio.drain()
    _same("output", container.output, "words\n")
    container.delete()


def terminal(rig: Rig) -> None:
    """a terminal is a terminal, with the size that was asked for"""
    container = rig.container(["sh", "-c", "stty size; exit 4"], terminal=True)
    container.create()
    container.task.resize_pty(100, 30)
    container.start()
    _same("status", container.wait(), 4)
    container.stdio.drain()
    _same("output", container.output.split(), ["30", "100"])
    container.delete()


def late_reader(rig: Rig) -> None:
    """output is kept until its reader comes, after the process has ended"""
    container = _running(rig, "sh", "-c", "echo kept", read=False)
    container.wait()
    container.stdio.open_readers()
    container.stdio.drain()
    _same("output", container.output, "kept\n")
    container.delete()


def inherited_output(rig: Rig) -> None:
    """an exit is told though a child of init holds its output open"""
    container = _running(rig, "sh", "-c", "sleep 1000 & exit 6")
    _same("status", container.wait(), 6)
    _exit(rig, container)
    container.delete()


def containerd_away(rig: Rig) -> None:
    """an exit while containerd is away is answered by Wait, and told on its return"""
    container = _running(rig)
    rig.events.wait("/tasks/start", container=container.id)
    rig.events.set_mode(DOWN)
    container.reconnect()
    container.task.kill(signal.SIGKILL)
    _same("Wait", container.wait(), 137)
    rig.events.set_mode(UP)
    _exit(rig, container, timeout=30)
    container.delete()


def refused_event(rig: Rig) -> None:
    """an event that containerd refuses for the moment (UNAVAILABLE) is sent again"""
    container = _running(rig)
    rig.events.wait("/tasks/start", container=container.id)
    rig.events.refuse()
    container.task.kill(signal.SIGKILL)
    container.wait()
    _exit(rig, container, timeout=30)
    container.delete()


def mute_containerd(rig: Rig) -> None:
    """a containerd that takes events and never answers holds up no RPC and no exit"""
    container = _running(rig)
    rig.events.wait("/tasks/start", container=container.id)
    rig.events.set_mode(MUTE)
    process = container.exec(["sh", "-c", "exit 3"])
    _same("the exec's status", process.wait(), 3)
    _same("State", container.task.state().status, 2)
    rig.events.restart()
    process.delete()
    _killed(rig, container)


def terminated(rig: Rig) -> None:
    """SIGTERM to the shim ends no container, and later exits are told"""
    container = _running(rig)
    container.kill_shim(signal.SIGTERM)
    _same("State", container.task.state().status, 2)
    _check(alive(container.pid), "the container has died of it")
    _killed(rig, container, may_end=True)


def shim_killed(rig: Rig) -> None:
    """after the shim's death `delete` ends the container and says its pid"""
    container = _running(rig)
    container.kill_shim()
    gone = container.cleanup()
    _check(not alive(container.pid), "the container lives on")
    _same("delete", (gone.pid, gone.exit_status), (container.pid, 137))


def shim_killed_late(rig: Rig) -> None:
    """after the death of a shim whose container had exited with 42 `delete` says 42"""
    container = rig.container(["sh", "-c", "exit 42"])
    container.run()
    told = _exit(rig, container).message
    container.kill_shim()
    gone = container.cleanup()
    _same("delete", (gone.exit_status, gone.exited_at), (42, told.exited_at.ToNanoseconds()))


def delete_alone(rig: Rig) -> None:
    """`delete` works while containerd's Events endpoint is not there"""
    container = _running(rig)
    rig.events.wait("/tasks/start", container=container.id)
    rig.events.set_mode(DOWN)
    container.kill_shim()
    container.cleanup()
    _check(not alive(container.pid), "the container lives on")


def _generation(rig: Rig) -> None:
    container = rig.container(["sh", "-c", "exit 5"])
    _same("status", container.run(), 5)
    container.delete()


TRIALS: tuple[Callable[[Rig], None], ...] = (
    whole_life, execs, early_exit, late_wait, refusals, failed_create, never_started, stdin, terminal, late_reader,
    inherited_output, containerd_away, refused_event, mute_containerd, terminated, shim_killed, shim_killed_late, delete_alone,
)  # fmt: skip


def names() -> list[str]:
    """Of all trials, in the order in which they are run."""
    return [trial.__name__ for trial in TRIALS] + [f"generation_{one}" for one in GENERATIONS]


def conform(
    shim: str | Path, *, runtime: str = "", rootfs: Path | None = None, only: Iterable[str] = (), generation: str = GENERATIONS[0]
) -> Iterator[Result]:
    """Runs the trials, or `only` those of these names, against a shim; yields each result as it comes.

    runtime: the OCI runtime's binary, "" for the shim's choice; rootfs: of busybox when None; generation: the containerd that the
    rig plays, but in the trials of each. Raises FileNotFoundError when there
    is no such shim, ValueError for a name that is none.
    """
    chosen = list(only) or names()
    if wrong := [name for name in chosen if name not in names()]:
        raise ValueError(f"no such trial: {', '.join(wrong)}")
    by_name = {trial.__name__: trial for trial in TRIALS}
    for name in chosen:
        trial = by_name.get(name, _generation)
        protocol = name.removeprefix("generation_") if trial is _generation else generation
        expects = trial.__doc__ or f"it starts as containerd {protocol} starts it"
        began = time.monotonic()
        with Rig(shim, generation=protocol, runtime=runtime, rootfs=rootfs, strict=False) as rig:
            detail = _why(trial, rig)
        if rig.left and not detail:
            detail = "left behind: " + ", ".join(rig.left)
        yield Result(name, expects, FAILED if detail else PASSED, detail, round(time.monotonic() - began, 3))


def _why(trial: Callable[[Rig], None], rig: Rig) -> str:
    try:
        trial(rig)
    except (Broken, ActivationError, ShimError, OSError) as error:
        return str(error) or type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
