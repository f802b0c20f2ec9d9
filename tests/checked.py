"""Programs that mypy --strict takes, or does not: those of tests/typing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "typing"
HANG = 600  # seconds: the first run has no cache of what the standard library is


def _lines(arguments: list[str], **variables: str) -> list[str]:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=HANG)
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    return done.stdout.splitlines()


def mypy(program: Path, *folders: Path) -> list[str]:
    """What mypy --strict says of a program, line by line: all of it, also of what it imports from ours and from the folders."""
    path = os.pathsep.join(map(str, [program.parent, *folders]))
    return _lines(["mypy", "--strict", "--no-error-summary", "--explicit-package-bases", str(program)], MYPYPATH=path)


def stubtest(modules: list[str], allowed: list[str], folder: Path = ROOT) -> list[str]:
    """How modules differ from their .pyi, line by line, but for what is allowed (regular expressions of full names).

    folder: where they are, on top of our own package."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("\n".join(allowed))
        file.flush()
        options = ["--concise", "--ignore-disjoint-bases", "--allowlist", file.name]
        path = os.pathsep.join(map(str, [folder, ROOT]))
        return _lines(["mypy.stubtest", *modules, *options], MYPYPATH=str(folder), PYTHONPATH=path)


def errors(lines: list[str]) -> list[tuple[str, int, str]]:
    """(file's name, line, code) of each error among what mypy says."""
    found = [re.match(r"(.+?):(\d+): error: .*\[([a-z-]+)\]$", line) for line in lines]
    return [(Path(match[1]).name, int(match[2]), match[3]) for match in found if match]


def marked(program: Path) -> list[tuple[str, int, str]]:
    """What errors() is to be for a program: a line in it with an error ends with `# wrong: CODE`."""
    lines = enumerate(program.read_text().splitlines(), 1)
    return [(program.name, number, line.rpartition("# wrong: ")[2]) for number, line in lines if "# wrong: " in line]
