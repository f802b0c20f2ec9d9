"""A shim whose code a test can change while it runs: its script, and a copy of the package that the script runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore.cli import nodes
from shimcore.cli.upgrade import upgrade_one
from shimcore.install import needed_paths, script
from shimcore.rig import Rig
from shimcore.rig.session import Session

PACKAGE = Path(__file__).resolve().parent.parent / "shimcore"
HANG = 60.0

# In a script, before the shim: what is done in an upgrade's new image only, before any of it runs.
IN_THE_WINDOW = """
import os
if os.environ.get("SHIMCORE_UPGRADE", "try").isdigit():
    {code}
"""


def until(what: str, ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + HANG
    while not (value := ready()):
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.005)
    return value


class Copy:
    """binary: the shim. change(): the code that it would run from now on says that it is another version."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "code" / "shimcore"
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.pyx", "core", "rig", "testing")
        shutil.copytree(PACKAGE, self.package, ignore=ignored)
        paths = [str(self.package.parent), str(folder), *needed_paths("shimcore.shim")[1:2]]
        self.binary = folder / "containerd-shim-runc-v2-py"
        self.text = script("io.containerd.runc.v2-py", "shimcore.oci.shim:RuncShim", paths, sys.executable)
        self.write(self.text)
        self.original: dict[str, str] = {}
        self.number = 0

    def write(self, text: str) -> None:
        new = self.binary.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o755)
        new.replace(self.binary)

    def change(self) -> str:
        """The version that the code has from now on."""
        self.number += 1
        version = "9." + self.number * "1"  # of another length: bytecode goes by size and second
        self.edit("__init__.py", lambda text: text + f'\n__version__ = "{version}"\n')
        return version

    def edit(self, name: str, how: Callable[[str], str]) -> None:
        path = self.package / name
        text = self.original.setdefault(name, path.read_text())
        new = path.with_name(f".{path.name}")  # another file: an import of the old one meanwhile has it whole
        new.write_text(how(text))
        new.replace(path)

    def mend(self) -> None:
        for name, text in self.original.items():
            self.edit(name, lambda _, text=text: text)  # type: ignore[misc]

    def in_the_window(self, code: str) -> None:
        """Have every new image run this, before anything else."""
        first, rest = self.text.split("\n", 1)
        self.write(first + IN_THE_WINDOW.format(code=code.replace("\n", "\n    ")) + rest)


def upgrade(session: Session, timeout: float = 10.0, to: str = "") -> dict[str, Any]:
    """As `shimcore upgrade` does it. Raises nodes.NoAnswer."""
    path = session.started.address.removeprefix("unix://")
    return upgrade_one(nodes.Shim(session.shim_pid, "shim", "", session.id, "", socket=path), to, timeout)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "shimcore.cli", "upgrade", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=HANG)


def told(session: Session) -> dict[str, Any]:
    """The shim's dump."""
    path = session.started.address.removeprefix("unix://") + ".debug"
    found: dict[str, Any] = json.loads(nodes.ask(nodes.Shim(session.shim_pid, "shim", "", "", "", debug=path), "/dump"))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def words(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


@pytest.fixture
def copy(session_root: Path, tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def rig(copy: Copy, rootfs: Path) -> Iterator[Rig]:
    with Rig(copy.binary, rootfs=rootfs) as rig:
        yield rig


class Later:
    """A call on a thread of its own."""

    def __init__(self, call: Any) -> None:
        self._found: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._found.append(call()))
        self._thread.start()

    def get(self) -> Any:
        self._thread.join(HANG)
        assert self._found, "the call did not come to its end"
        return self._found[0]


def exits(session: Session) -> list[tuple[str, int]]:
    """As containerd has heard of them: ids, and statuses."""
    return [(event.message.id, event.message.exit_status) for event in session.events if event.topic == "/tasks/exit"]
