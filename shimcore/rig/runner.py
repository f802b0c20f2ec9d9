"""Runs one container under one shim from start to delete, and says what happened and when."""

from __future__ import annotations

import json
import math
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from shimcore.rig import bundle as bundles
from shimcore.rig import picture
from shimcore.rig.events import Event
from shimcore.rig.session import Rig, Session
from shimcore.rig.stdio import Reader

T = TypeVar("T")

# What a container prints is shown, and does nothing to the terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 9}

#: What is run when nothing is asked for.
HELLO = (
    "sh",
    "-c",
    'echo "Hello from a container: $(uname -sr), host name $(hostname), pid $$, uid $(id -u)"',
)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the timeline.

    at: ms since the shim was called. kind: "call" (what the rig did, when it had its answer), "event",
    "stdout", "stderr". took: ms that a call took, else 0.
    """

    at: float
    kind: str
    what: str
    detail: str = ""
    took: float = 0.0

    def __str__(self) -> str:
        took = f"{self.took:.1f}" if self.took else ""
        return f"{self.at:8.1f}{took:>8}  {self.kind:6}  {self.what:19} {self.detail}".rstrip().translate(_CONTROLS)


@dataclass(slots=True)
class Report:
    """What came of a run. exit_code: the container's, None when it did not come so far; error: why, else
    ""."""

    shim: str
    generation: str
    namespace: str
    id: str
    command: list[str]
    exit_code: int | None = None
    error: str = ""
    address: str = ""
    shim_pid: int = 0
    pid: int = 0
    stdout: str = ""
    stderr: str = ""
    shim_log: str = ""
    left: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status that a command line gives: the container's; 125 when the shim or the rig failed."""
        if self.error or self.exit_code is None or (self.left and not self.exit_code):
            return 125
        return self.exit_code

    def json(self) -> str:
        """The whole report."""
        return json.dumps(asdict(self), indent=2)

    def head(self) -> str:
        """What is run by what."""
        how = f"{self.shim}, called as containerd {self.generation} does"
        return f"{how}\ncommand: {shlex.join(self.command)}\n\n      ms    took"

    def end(self, width: int = 100) -> str:
        """What is known when all is over: a picture of it in time, how it ended, and what is left."""
        lines = picture.draw(self.steps, width)
        lines += ["", f"container {self.id or '(none)'}"]
        if self.address:
            lines[-1] += f", served at {self.address}"
        if self.error:
            lines.append(f"failed: {self.error}")
        if self.shim_log and self.error:
            lines += ["the shim's log:", *(f"  {line}" for line in self.shim_log.splitlines()[-20:])]
        if self.exit_code is not None:
            lines.append(f"exit code {self.exit_code}")
        lines += ["left behind:", *(f"  {line}" for line in self.left)] if self.left else ["nothing left behind"]
        return "\n".join(lines)

    def text(self, width: int = 100) -> str:
        """The report as a timeline to be read, of lines as wide as `width` where that is ours to say."""
        return "\n".join([self.head(), *map(str, self.steps), "", self.end(width)])


class Watcher:
    """What a run tells while it is under way. Called from several threads, one after the other; must not block."""

    def begun(self, report: Report) -> None:
        """Once, before anything is run."""

    def doing(self, what: str) -> None:
        """A call begins; its Step comes when it has ended."""

    def seen(self, step: Step) -> None:
        """A step. They come nearly, and stand in the report wholly, in the order of their times."""


class _Recorder:
    """Adds the steps to the report as they come, from any thread, and hands each on."""

    def __init__(self, report: Report, watcher: Watcher) -> None:
        self.report = report
        self.began = 0
        self._watcher = watcher
        self._lock = threading.Lock()

    def add(self, at: int, kind: str, what: str, detail: str = "", took: float = 0.0) -> None:
        """at: monotonic ns. took: ms."""
        step = Step(round((at - self.began) / 1e6, 3), kind, what, detail, took)
        with self._lock:
            self.report.steps.append(step)
            self._watcher.seen(step)

    def call(self, what: str, function: Callable[[], T], detail: Callable[[T], str] = lambda _: "") -> T:
        began = time.monotonic_ns()
        self.began = self.began or began
        with self._lock:
            self._watcher.doing(what)
        said = "failed"
        try:
            result = function()
            said = detail(result)
        finally:
            ended = time.monotonic_ns()
            self.add(ended, "call", what, said, round((ended - began) / 1e6, 3))
        return result

    def event(self, event: Event) -> None:
        detail = str(event).removeprefix(f"{event.topic} {event.container}").strip()
        self.add(event.at, "event", event.topic, detail)

    def watch(self, kind: str, reader: Reader | None) -> None:
        """Each line of output as it comes. What comes without a newline is a step of its own."""

        def came(at: int, chunk: bytes) -> None:
            for line in chunk.decode(errors="replace").splitlines():
                self.add(at, kind, line)

        if reader:
            reader.came = came

    def finish(self, session: Session) -> None:
        """What is known only now."""
        report = self.report
        report.stdout, report.stderr = session.output, session.errors
        report.shim_log = session.bundle.log


def run(
    shim: str | Path,
    command: Sequence[str] = HELLO,
    *,
    generation: str = "1.6",
    runtime: str = "",
    rootfs: Path | None = None,
    env: Sequence[str] = (),
    cwd: str = "/",
    timeout: float = math.inf,
    debug: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Runs `command` in a container under `shim`; never raises for what shim or container do wrong.

    rootfs: of busybox when None. env: NAME=value each, on top of PATH. timeout: seconds that the command may
    take. Raises FileNotFoundError when there is no such shim.
    """
    with Rig(shim, generation=generation, runtime=runtime, rootfs=rootfs, debug=debug, strict=False) as rig:
        report = Report(rig.shim, generation, rig.namespace, "", list(command))
        watcher = watcher or Watcher()
        record = _Recorder(report, watcher)
        watcher.begun(report)
        session: Session | None = None
        try:
            rig.events.came = record.event
            rig.rootfs  # noqa: B018  (made now, so that the first step's time is the shim's alone)
            session = container = record.call(
                "start",
                lambda: rig.container(command, env=[*bundles.ENV, *env], cwd=cwd),
                lambda made: f"{made.started.form} address, shim pid {made.shim_pid}",
            )
            record.watch("stdout", container.stdio.out)
            record.watch("stderr", container.stdio.err)
            report.id, report.shim_pid = container.id, container.shim_pid
            report.address = container.started.address
            report.pid = record.call("create", container.create, lambda pid: f"pid {pid}")
            record.call("start init", container.start)
            code = record.call("wait", lambda: container.wait(timeout=timeout), lambda code: f"exit status {code}")
            container.stdio.drain()
            # containerd would have it before it lets anybody delete.
            rig.events.wait("/tasks/exit", container=container.id, process="")
            record.call("delete", container.task.delete, lambda gone: f"exit status {gone.exit_status}")
            rig.events.wait("/tasks/delete", container=container.id, process="")
            record.finish(container)
            record.call("shutdown, delete", container.end)
            report.exit_code = code
        except Exception as error:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            report.error = f"{type(error).__name__}: {error}{notes}"
            if session is not None and session in rig.sessions and not report.stdout:
                record.finish(session)
    report.left = rig.left
    report.steps.sort(key=lambda step: step.at)
    return report
