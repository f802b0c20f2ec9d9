"""The binaries' own times, taken by a small program that stands in for them; and the floor of a warm start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.exit_latency.place import CFLAGS, ROOT, SOURCES, Program
from shimcore.rig.templates import end_templates

BUILD = ROOT / "build" / "bench-start"
NOTHING, LAUNCHER, PYTHON = "a program that does nothing", "the launcher, answered at once", "the interpreter, with nothing to do"
IMPORTS = "the interpreter, which imports what a daemon is made of, without protobuf"
MADE_OF = "shim, forked, serve, _ttrpc, oci.shim, oci.service"


def program(name: str) -> str:
    """Compiled from benchmarks/c. Raises CalledProcessError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / name
    command = [os.environ.get("CC", "cc"), *CFLAGS, "-static", str(SOURCES / f"{name}.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return str(out)


class Timer:
    """Milliseconds of a shim's actions: `binary` is to be run in its place, with `env`."""

    def __init__(self, shim: str, folder: str) -> None:
        found = shutil.which(shim)
        if not found:
            raise FileNotFoundError(f"no {shim} on PATH")
        fd, self._times = tempfile.mkstemp(dir=folder)
        os.close(fd)
        self.binary = program("timer")
        self.env = {"BENCH_SHIM": os.path.realpath(found), "BENCH_TIMES": self._times}

    def last(self, action: str) -> float:
        """What its last run took. Raises AssertionError when that was another action."""
        word, ns = Path(self._times).read_text().split("\n")[-2].split()
        assert word == action, f"{word} was timed last, not {action}"
        return int(ns) / 1e6

    def run(self, *arguments: str, env: dict[str, str]) -> float:
        command = [self.binary, *arguments]
        subprocess.run(command, env={**env, **self.env}, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        return self.last(arguments[-1])


def floors(shim: str, rounds: int) -> dict[str, list[float]]:
    """Of a program that does nothing, of our launcher with a template in C that answers at once, and of the interpreter with
    nothing to do but to start, or to import, as the plain way runs it; alternating."""
    paths = [str(ROOT), sysconfig.get_path("purelib")]
    end = "import posix; posix._exit(0)"  # as a shim ends
    modules = ", ".join(f"shimcore.{name}" for name in MADE_OF.split(", "))
    imports = f"import gc, sys; gc.disable(); sys.path[0:0] = {paths}; import {modules}; {end}"
    with tempfile.TemporaryDirectory() as folder:
        nothing, launcher, python = Timer("true", folder), Timer(shim, folder), Timer(sys.executable, folder)
        directory = Path(folder, "t")
        directory.mkdir(mode=0o700)
        env = {**os.environ, "SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": str(directory)}
        launcher.run("-v", env=env)  # makes a template, whose lock has the name that the launcher has computed
        while not (sockets := list(directory.glob("*.sock"))):
            time.sleep(0.01)
        end_templates(str(directory))
        answer = Program([program("answer"), str(sockets[0])])
        try:
            found: dict[str, list[float]] = {NOTHING: [], LAUNCHER: [], PYTHON: [], IMPORTS: []}
            for _ in range(rounds):
                found[NOTHING].append(nothing.run("start", env=dict(os.environ)))
                found[LAUNCHER].append(launcher.run("start", env=env))
                found[PYTHON].append(python.run("-IS", "-c", end, "start", env=dict(os.environ)))
                found[IMPORTS].append(python.run("-IS", "-c", imports, "start", env=dict(os.environ)))
            return found
        finally:
            answer.child.kill()
            answer.child.wait()
