"""Where a run takes place: compiled programs, a tmpfs for bundles and rootfs, the file of stamps, the driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "benchmarks" / "c"
CORE = ROOT / "shimcore" / "core"
CFLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CORE}")

HEAD_BYTES = SLOT_BYTES = 64  # of bench_stamps
_MNT_DETACH = 2


class BenchError(Exception):
    """The run can't go on; the text says why."""


def compile_all(folder: Path) -> Path:
    """Compiles the benchmark's programs into `folder`, those that are older than their sources. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), *CORE.glob("*.h"), CORE / "frame.c"])
    for name in ("dying", "driver", "callers", "loop"):
        out = folder / name
        if out.exists() and out.stat().st_mtime > newest:
            continue
        extra = ["-static"] if name == "dying" else [str(CORE / "frame.c")]
        command = [os.environ.get("CC", "cc"), *CFLAGS, str(SOURCES / f"{name}.c"), *extra, "-o", str(out)]
        subprocess.run(command, check=True)
    return folder


class Program:
    """A program that is asked by lines and answers by lines."""

    def __init__(self, argv: Sequence[str], *, own_session: bool = False) -> None:
        self.child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=own_session
        )
        if self.answer() != "ok":
            raise BenchError(f"{argv[0]} did not start")

    def answer(self) -> str:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            raise BenchError(f"{self.child.args!r} ended: {self.child.wait()}")
        return line.rstrip("\n")

    def ask(self, line: str) -> str:
        assert self.child.stdin
        self.child.stdin.write(line + "\n")
        return self.answer()

    def end(self) -> str:
        """Closes its stdin, waits for its end; what it still had to say."""
        output, _ = self.child.communicate(timeout=30)
        return output.strip()


class Place:
    """A context manager. root: a directory on a tmpfs; rootfs; programs: where they were compiled to; driver."""

    def __init__(self, programs: Path, slots: int) -> None:
        self.programs = programs
        self.slots = slots
        self._next = 0
        self._was = tempfile.tempdir

    def __enter__(self) -> Self:
        # Not below /run: it is no tmpfs on every machine.
        self.root = Path(tempfile.mkdtemp(prefix="bench-"))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"bench", os.fsencode(self.root), b"tmpfs", 0, b"mode=755") < 0:
            os.rmdir(self.root)
            raise BenchError(f"can't mount a tmpfs: {os.strerror(ctypes.get_errno())}; the benchmark runs as root")
        tempfile.tempdir = str(self.root)  # rigs make their bundles there
        self.rootfs = self.root / "rootfs"
        for name in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
            (self.rootfs / name).mkdir(parents=True)
        shutil.copy2(self.programs / "dying", self.rootfs / "dying")
        self.stamps = self.rootfs / "stamps"
        with open(self.stamps, "wb") as file:
            file.truncate(HEAD_BYTES + self.slots * SLOT_BYTES)
        self.events = str(self.root / "events.sock")
        self.driver = Program([str(self.programs / "driver"), self.events, str(self.stamps)])
        return self

    def __exit__(self, *exc: object) -> None:
        self.driver.end()
        tempfile.tempdir = self._was
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(self.root), _MNT_DETACH)
        os.rmdir(self.root)

    def take(self, count: int) -> int:
        """So many slots that nobody has used; the first one's number."""
        first, self._next = self._next, self._next + count
        if self._next > self.slots:
            raise BenchError(f"the file of stamps has only {self.slots} slots")
        return first

    def measured(self, command: str) -> list[tuple[int, int, int]]:
        """Runs a driver's command, "{}" in it being the file of results: (death, read, exited_at) for each process, ns.
        Raises BenchError when an exit was not told."""
        file = self.root / "result"
        answer = self.driver.ask(command.format(file))
        if answer != "ok":
            raise BenchError(f"{command}: {answer}")
        rows = [line.split() for line in file.read_text().splitlines()]
        return [(int(death), int(read), int(at)) for _, death, read, at in rows]
