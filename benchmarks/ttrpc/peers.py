"""The servers of the benchmark, each built below build/ttrpc-peers; one that can't be built is left out with its reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..exit_latency.place import CFLAGS, CORE, ROOT

SOURCES = ROOT / "benchmarks" / "ttrpc"
BUILD = ROOT / "build" / "ttrpc-peers"
GO_VERSION = "v1.2.10"
GOPATH = "/usr/share/gocode"
DEBIAN = Path(GOPATH, "src/github.com/containerd/ttrpc")

OURS, SAME, GO, FLOOR, BATCHED = "shimcore", "shimcore, same message", f"Go {GO_VERSION}", "C floor", "C floor, batched"


class Missing(Exception):
    """A peer that can't be built here; the text says why."""


def compile_c(name: str) -> str:
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / name
    compiler = [os.environ.get("CC", "cc"), *CFLAGS, str(SOURCES / "c" / f"{name}.c"), str(CORE / "frame.c"), "-o", str(out)]
    subprocess.run(compiler, check=True)
    return str(out)


def command(folder: Path, *words: str, **env: str) -> str:
    """What it prints. Raises Missing when it is not there, or fails."""
    if not shutil.which(words[0]):
        raise Missing(f"there is no {words[0]} on PATH")
    done = subprocess.run(words, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(words)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def build_go(name: str) -> str:
    """head: from the module proxy; debian: golang-github-containerd-ttrpc-dev, built without modules as Debian builds."""
    folder = BUILD / f"go-{name}"
    out = folder / "server"
    sources = sorted((SOURCES / "go" / name).glob("*.go"))
    folder.mkdir(parents=True, exist_ok=True)
    if out.exists() and out.stat().st_mtime > max(source.stat().st_mtime for source in [*sources, Path(__file__)]):
        return str(out)
    for source in sources:
        shutil.copy(source, folder)
    if name == "debian":
        if not DEBIAN.exists():
            raise Missing("golang-github-containerd-ttrpc-dev is not installed")
        command(folder, "go", "build", "-o", str(out), "main.go", GO111MODULE="off", GOPATH=GOPATH, GOFLAGS="")
    else:
        (folder / "go.mod").write_text("module bench\n\ngo 1.24\n")
        command(folder, "go", "get", f"github.com/containerd/ttrpc@{GO_VERSION}", GOFLAGS="-mod=mod")
        command(folder, "go", "build", "-o", str(out), ".", GOFLAGS="-mod=mod")
    return str(out)


def build_rust() -> tuple[str, str]:
    """(program, version of the crate `ttrpc`): the peer of the interop checks, which serves the benchmark too."""
    folder = ROOT / "build" / "interop" / "rust"
    shutil.copytree(ROOT / "tests" / "interop" / "rust", folder, dirs_exist_ok=True)
    command(folder, "cargo", "build", "-q", "--release")
    found = re.search(r'^name = "ttrpc"\nversion = "(.*)"', (folder / "Cargo.lock").read_text(), re.MULTILINE)
    return str(folder / "target" / "release" / "peer"), found[1] if found else ""


def rust(missing: dict[str, str]) -> dict[str, list[str]]:
    """name -> command of Rust's two flavours; none, and the reason in `missing`, where they can't be built."""
    try:
        program, version = build_rust()
    except Missing as error:
        missing["Rust"] = str(error)
        return {}
    return {f"Rust {version} {flavour}": [program, flavour] for flavour in ("sync", "async")}


def servers() -> tuple[dict[str, list[str]], dict[str, str]]:
    """(name -> command without `serve PATH`, name -> why it is missing)."""
    floor = compile_c("floor")
    found = {
        OURS: [sys.executable, "-m", "benchmarks.ttrpc.ours"],
        SAME: [sys.executable, "-m", "benchmarks.ttrpc.ours", "--same"],
        FLOOR: [floor],
        BATCHED: [floor, "--batched"],
    }
    missing: dict[str, str] = {}
    for title, name in ((GO, "head"), ("Go, Debian's", "debian")):
        try:
            found[title] = [build_go(name)]
        except Missing as error:
            missing[title] = str(error)
    return found | rust(missing), missing
