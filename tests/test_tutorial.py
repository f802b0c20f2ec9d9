"""docs/tutorial.md, played as it stands: each command, in a shell of its own folder, and what the page says that it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HANG = 300.0
DONE = "--- done "


class Reader:
    """Who types what stands on the page, into one shell."""

    def __init__(self, home: Path) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.shell = subprocess.Popen(
            ["bash", "--norc"], cwd=home, env={**env, "PYTEST_ADDOPTS": "-p no:cacheprovider --color=no"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1,
        )  # fmt: skip
        self.home = home
        self.file = Path()

    def type(self, command: str) -> str:
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f"{command} </dev/null\necho '{DONE}'$?\n")
        lines = []
        for line in self.shell.stdout:
            if line.startswith(DONE):
                said = "".join(lines)
                assert line == f"{DONE}0\n", f"{command}\n{said}"
                return said
            lines.append(line)
        raise AssertionError(f"the shell has ended at {command}")

    def pip(self, words: str) -> None:
        """This checkout, and what it needs, stand in for what pip would fetch; the project itself is installed by pip."""
        python = self.home / "venv" / "bin" / "python"
        site = Path(self.type(f"{python} -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'").strip())
        (site / "there.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
        for name in ("shimcore", "pytest"):
            command = python.with_name(name)
            module = "shimcore.cli" if name == "shimcore" else name
            command.write_text(f"#!/bin/sh\nexec {python} -m {module} \"$@\"\n")
            command.chmod(0o755)
        if "-e" in words:
            self.type(f"{sys.executable} -m pip --python {python} install -q --no-deps --no-build-isolation"
                      " --disable-pip-version-check --root-user-action=ignore -e .")

    def write(self, text: str) -> None:
        """A method takes the place of the one that is there; a whole file that of the tests."""
        folder = self.home / "quiet"
        if text.startswith("    def edit"):
            path = folder / "quiet_shim.py"
            method = re.compile(r"    def edit\(.*?\n\n(?=    async def)", re.DOTALL)
            new, found = method.subn(lambda _: text + "\n", path.read_text())
            assert found == 1
            path.write_text(new)
        else:
            (folder / "tests" / "test_shim.py").write_text(text)

    def end(self) -> None:
        assert self.shell.stdin
        self.shell.stdin.close()
        self.shell.wait(HANG)


def said_as_shown(shown: list[str], said: str, command: str) -> None:
    """Each line that is shown is there, in order; … stands for anything."""
    at = 0
    for line in shown:
        pattern = ".*".join(map(re.escape, line.split("…")))
        found = re.compile(pattern if "…" in line else f"^{pattern}$", re.MULTILINE).search(said, at)
        assert found, f"{command}\nsaid\n{said}\nand not {line!r}"
        at = found.end()


@pytest.mark.timeout(HANG)
def test_the_tutorial(tmp_path: Path, rootfs: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    reader = Reader(tmp_path)
    typed = 0
    try:
        for kind, text in BLOCK.findall(page):
            if kind == "python":
                reader.write(text)
                continue
            assert kind == "console", kind
            for part in re.split(r"^(?=\$ )", text, flags=re.MULTILINE):
                if not part.startswith("$ "):
                    assert not part or all(line.startswith("# ") for line in part.splitlines()), part  # root's; see below
                    continue
                command, *shown = part[2:].splitlines()
                if command.startswith("python3 -m venv"):
                    reader.type(f"{sys.executable} -m venv --without-pip {command.split()[-1]}")
                elif command.startswith("pip install"):
                    reader.pip(command)
                elif command.startswith("shimcore run"):
                    said_as_shown(shown, reader.type(command.replace(" --shim", f" --rootfs {rootfs} --shim", 1)), command)
                else:
                    said_as_shown(shown, reader.type(command), command)
                typed += 1
    finally:
        reader.end()
    assert typed == 12


def test_what_root_types_is_there(tmp_path: Path) -> None:
    """The commands for containerd's machine: that of ours is understood, and ctr knows its flags."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    lines = [line[2:] for _, text in BLOCK.findall(page) for line in text.splitlines() if line.startswith("# ")]
    assert [line.split()[0] for line in lines] == ["shimcore", "ctr"]
    ours = [sys.executable, "-m", "shimcore.cli", "install", "--help"]
    helped = subprocess.run(ours, capture_output=True, text=True, check=True)
    known = subprocess.run(["ctr", "run", "--help"], capture_output=True, text=True, check=True)
    for line, said in zip(lines, (helped.stdout, known.stdout), strict=True):
        for flag in re.findall(r" (--[a-z-]+)", line.split("'")[0]):
            assert flag in said, flag
