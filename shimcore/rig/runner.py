"""Runs one container under one shim from start to delete, and says what happened and when."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from shimcore.rig import bundle as bundles
from shimcore.rig.session import Rig, Session
from shimcore.rig.stdio import Reader

T = TypeVar("T")

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

    def text(self) -> str:
        """The report as a timeline to be read."""
        lines = [
            f"{self.shim}, called as containerd {self.generation} does",
            f"container {self.id or '(none)'}: {shlex.join(self.command)}",
            *([f"served at {self.address}"] if self.address else []),
            "",
            "      ms    took",
        ]
        for step in self.steps:
            took = f"{step.took:.1f}" if step.took else ""
            lines.append(f"{step.at:8.1f}{took:>8}  {step.kind:6}  {step.what:19} {step.detail}".rstrip())
        lines.append("")
        if self.error:
            lines.append(f"failed: {self.error}")
        if self.shim_log and self.error:
            lines += ["the shim's log:", *(f"  {line}" for line in self.shim_log.splitlines()[-20:])]
        if self.exit_code is not None:
            lines.append(f"exit code {self.exit_code}")
        lines += ["left behind:", *(f"  {line}" for line in self.left)] if self.left else ["nothing left behind"]
        return "\n".join(lines)


class _Recorder:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.began = 0

    def ms(self, at: int) -> float:
        return round((at - self.began) / 1e6, 3)

    def call(self, what: str, function: Callable[[], T], detail: Callable[[T], str] = lambda _: "") -> T:
        began = time.monotonic_ns()
        self.began = self.began or began
        try:
            result = function()
        except BaseException:
            self._add(what, "failed", began)
            raise
        self._add(what, detail(result), began)
        return result

    def _add(self, what: str, detail: str, began: int) -> None:
        ended = time.monotonic_ns()
        took = round((ended - began) / 1e6, 3)
        self.report.steps.append(Step(self.ms(ended), "call", what, detail, took))

    def finish(self, rig: Rig, session: Session) -> None:
        """Adds events and output, each with its own time, and sorts."""
        report = self.report
        for event in rig.events.of(session.id):
            detail = str(event).removeprefix(f"{event.topic} {session.id}").strip()
            report.steps.append(Step(self.ms(event.at), "event", event.topic, detail))
        self._output("stdout", session.stdio.out)
        self._output("stderr", session.stdio.err)
        report.stdout, report.stderr = session.output, session.errors
        report.shim_log = session.bundle.log
        report.steps.sort(key=lambda step: step.at)

    def _output(self, kind: str, reader: Reader | None) -> None:
        for at, chunk in reader.chunks if reader else ():
            for line in chunk.decode(errors="replace").splitlines():
                self.report.steps.append(Step(self.ms(at), kind, line))


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
) -> Report:
    """Runs `command` in a container under `shim`; never raises for what shim or container do wrong.

    rootfs: of busybox when None. env: NAME=value each, on top of PATH. timeout: seconds that the command may
    take. Raises FileNotFoundError when there is no such shim.
    """
    with Rig(shim, generation=generation, runtime=runtime, rootfs=rootfs, debug=debug, strict=False) as rig:
        report = Report(rig.shim, generation, rig.namespace, "", list(command))
        record = _Recorder(report)
        session: Session | None = None
        try:
            rig.rootfs  # noqa: B018  (made now, so that the first step's time is the shim's alone)
            session = container = record.call(
                "start",
                lambda: rig.container(command, env=[*bundles.ENV, *env], cwd=cwd),
                lambda made: f"{made.started.form} address, shim pid {made.shim_pid}",
            )
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
            record.finish(rig, container)
            record.call("shutdown, delete", container.end)
            report.exit_code = code
        except Exception as error:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            report.error = f"{type(error).__name__}: {error}{notes}"
            if session is not None and session in rig.sessions and not report.stdout:
                record.finish(rig, session)
    report.left = rig.left
    return report
