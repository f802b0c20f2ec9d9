"""Our ttrpc client with other people's servers, and their clients with ours: python tools/interop.py

The peers are programs of tests/interop, built below build/interop: Go's ttrpc of the module proxy and of the Debian package
(golang-github-containerd-ttrpc-dev), and Rust's of crates.io, its two flavours. Every check has a server and a client of its own.
The table goes to docs/interop.md, with what was said where a check has failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ttrpc.peers import DEBIAN, GO_VERSION, GOPATH, Missing, build_rust, command  # noqa: E402
from tests.interop.ours import CHECKS, STREAMED  # noqa: E402

SOURCES = ROOT / "tests" / "interop"
BUILD = ROOT / "build" / "interop"
PAGE = ROOT / "docs" / "interop.md"
HANG = 60.0  # seconds
OURS = [sys.executable, "-m", "tests.interop.ours"]


HEAD = """# ttrpc between implementations

Made by `make interop`. Each cell is a client and a server of their own, over a unix socket. –: that version has no streams.

Known of Rust's: the sync server answers 3 for a method that it does not have, and the async client may send the ids of concurrent
calls out of order, which Go's server refuses as ours does (last column).
"""


def go(name: str) -> tuple[str, list[str]]:
    folder = BUILD / f"go-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES / "go" / "main.go", SOURCES / "go" / name / "version.go":
        shutil.copy(source, folder)
    peer = [str(folder / "peer")]
    if name == "head":
        (folder / "go.mod").write_text("module peer\n\ngo 1.24\n")
        command(folder, "go", "get", f"github.com/containerd/ttrpc@{GO_VERSION}", GOFLAGS="-mod=mod")
        command(folder, "go", "build", "-o", "peer", ".", GOFLAGS="-mod=mod")
        return f"Go {GO_VERSION}", peer
    if not DEBIAN.exists():
        raise Missing("golang-github-containerd-ttrpc-dev is not installed")
    command(folder, "go", "build", "-o", "peer", "main.go", "version.go", GO111MODULE="off", GOPATH=GOPATH, GOFLAGS="")
    version = command(folder, "dpkg-query", "-W", "-f", "${Version}", "golang-github-containerd-ttrpc-dev")
    return f"Go {version.split('-')[0]} (Debian's)", peer


def rust(flavour: str) -> tuple[str, list[str]]:
    program, version = build_rust()
    return f"Rust {version} {flavour}", [program, flavour]


def checked(server: list[str], client: list[str], check: str) -> str:
    """ "ok", or what was wrong."""
    with tempfile.TemporaryDirectory(prefix="interop-") as folder:
        path = f"{folder}/s"
        pipe = subprocess.PIPE
        with subprocess.Popen([*server, "serve", path], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as serving:
            assert serving.stdin is not None and serving.stdout is not None
            try:
                if serving.stdout.readline().strip() != "ok":
                    return "the server does not start"
                deadline = time.monotonic() + HANG
                while not os.path.exists(path):  # it says so before it listens
                    if serving.poll() is not None or time.monotonic() > deadline:
                        return "the server does not listen"
                    time.sleep(0.001)
                words = [*client, "call", path, check]
                done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
                return (done.stdout.strip() or done.stderr.strip() or "nothing was said").splitlines()[-1]
            except subprocess.TimeoutExpired:
                return "hangs"
            finally:
                serving.stdin.close()
                try:
                    serving.wait(5)
                except subprocess.TimeoutExpired:
                    serving.kill()


def main() -> int:
    columns: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    peers: dict[str, tuple[str, list[str]]] = {}
    for build, argument in (go, "head"), (go, "debian"), (rust, "sync"), (rust, "async"):
        try:
            name, peer = build(argument)
        except Missing as why:
            print(f"left out: {build.__name__} {argument}: {why}")
            continue
        peers[argument] = name, peer
        unary_only = argument in ("debian", "sync")
        pairs = [(f"our client, {name}", peer, OURS), (f"{name} client, ours", OURS, peer)]
        if argument == "async" and "head" in peers:
            pairs.append((f"{name} client, {peers['head'][0]}", peers["head"][1], peer))
        for title, server, client in pairs:
            results = columns.setdefault(title, {})
            for check in CHECKS:
                results[check] = "–" if unary_only and check in STREAMED else checked(server, client, check)
            bad = {check: said for check, said in results.items() if said not in ("ok", "–")}
            print(f"{title}: {list(results.values()).count('ok')} ok", *(f"{k}: {v}" for k, v in bad.items()), sep="\n  ")
            notes += [f"- {title} server, {check}: {said}" for check, said in bad.items()]
    lines = ["| check |" + "".join(f" {title} server |" for title in columns), "|---" * (len(columns) + 1) + "|"]
    for check in CHECKS:
        cells = (results[check] if results[check] in ("ok", "–") else "no" for results in columns.values())
        lines.append(f"| {check} | " + " | ".join(cells) + " |")
    text = f"{HEAD}\n" + "\n".join(lines) + "\n"
    if notes:
        text += "\nWhat was said where it is \"no\":\n\n" + "\n".join(notes) + "\n"
    if columns:
        PAGE.write_text(text)
    return not columns


if __name__ == "__main__":
    sys.exit(main())
