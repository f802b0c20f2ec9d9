"""Private memory of our shim over many execs of one container, each made, started, waited for and deleted.

The runtime is the rig's fake one, which costs two milliseconds where runc costs forty; to the shim they are alike: a job that is
spawned, a pid file, a child that it reaps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.lifecycle import memory
from shimcore.rig import FakeRuntime, Rig

FIRST = 1000  # what happens once has happened by then


class Growth(NamedTuple):
    """execs; private memory at the FIRST and at the last, MiB; the most in between; seconds."""

    execs: int
    first: float
    last: float
    most: float
    seconds: float


def growth(shim: str, execs: int) -> Growth:
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeRuntime(Path(folder) / "f") as runtime,
        Rig(shim, runtime=str(runtime.binary), rootfs=Path("/"), env={**runtime.environment}, timeout=60) as rig,
    ):
        box = rig.container(["@sleep"])
        box.create()
        box.start()
        process = {"args": ["@exit", "0"], "env": ["PATH=/usr/bin:/bin"], "cwd": "/"}
        seen: list[float] = []
        for number in range(1, execs + 1):
            name = f"e{number}"
            box.task.exec(name, process)
            box.task.start(name)
            box.task.wait(name)
            box.task.delete(name)
            if number % FIRST == 0:
                seen.append(memory(box.shim_pid)["private"])
                rig.events.clear()
                if sys.stderr.isatty():
                    print(f"\r{number} execs, {seen[-1]:.2f} MiB", end="", file=sys.stderr)
        box.dispose()
    return Growth(execs, seen[0], seen[-1], max(seen), time.monotonic() - began)
