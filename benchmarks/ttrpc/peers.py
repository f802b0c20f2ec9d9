"""The servers of the benchmark, each built below build/ttrpc-peers; one that can't be built is left out with its reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..exit_latency.place import CFLAGS, CORE, ROOT

SOURCES = ROOT / "benchmarks" / "ttrpc"
BUILD = ROOT / "build" / "ttrpc-peers"
GO_VERSION = "v1.2.10"
DEBIAN = Path("/usr/share/gocode/src/github.com/containerd/ttrpc")

OURS, GO, FLOOR, BATCHED = "shimcore", f"Go {GO_VERSION}", "C floor", "C floor, batched"


class Missing(Exception):
    """A peer that can't be built here; the text says why."""


def compile_c(name: str) -> str:
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / name
    command = [os.environ.get("CC", "cc"), *CFLAGS, str(SOURCES / "c" / f"{name}.c"), str(CORE / "frame.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return str(out)


def _go(folder: Path, env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(["go", *arguments], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"go {' '.join(arguments)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


def build_go(name: str) -> str:
    """head: from the module proxy; debian: golang-github-containerd-ttrpc-dev, built without modules as Debian builds."""
    if not shutil.which("go"):
        raise Missing("there is no go on PATH")
    folder = BUILD / f"go-{name}"
    out = folder / "server"
    source = SOURCES / "go" / name / "main.go"
    folder.mkdir(parents=True, exist_ok=True)
    if out.exists() and out.stat().st_mtime > max(source.stat().st_mtime, Path(__file__).stat().st_mtime):
        return str(out)
    shutil.copy(source, folder)
    if name == "debian":
        if not DEBIAN.exists():
            raise Missing("golang-github-containerd-ttrpc-dev is not installed")
        _go(folder, {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}, "build", "-o", str(out), "main.go")
    else:
        (folder / "go.mod").write_text("module bench\n\ngo 1.24\n")
        env = {"GOFLAGS": "-mod=mod"}
        _go(folder, env, "get", f"github.com/containerd/ttrpc@{GO_VERSION}")
        _go(folder, env, "build", "-o", str(out), ".")
    return str(out)


def servers() -> tuple[dict[str, list[str]], dict[str, str]]:
    """(name -> command without `serve PATH`, name -> why it is missing)."""
    floor = compile_c("floor")
    found = {
        OURS: [sys.executable, "-m", "benchmarks.ttrpc.ours"],
        FLOOR: [floor],
        BATCHED: [floor, "--batched"],
    }
    missing = {}
    for title, name in ((GO, "head"), ("Go, Debian's", "debian")):
        try:
            found[title] = [build_go(name)]
        except Missing as error:
            missing[title] = str(error)
    return found, missing
