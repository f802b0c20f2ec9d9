"""What is in the package that is built of this folder: all that was written, and nothing that was not."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HANG = 300


def setup(*arguments: str) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=ROOT, check=True, capture_output=True, timeout=HANG)


def written(folder: str) -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("git alone knows what was written, and this is no clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    return set(subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def test_the_source_distribution(tmp_path: Path) -> None:
    setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames() if opened.getmember(name).isfile()}
    assert {name for name in names if name.startswith("shimcore/")} == written("shimcore")
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_what_is_installed_beside_the_compiled_modules(tmp_path: Path) -> None:
    setup("build_py", "--build-lib", str(tmp_path))
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith("shimcore/_bin/")}
    wanted = (".py", ".pyi", ".pxd", ".h", ".proto", "py.typed")
    assert {"shimcore/py.typed", "shimcore/_ttrpc.pyi", "shimcore/_reaper.pyi", "shimcore/protos/task_pb2.pyi"} <= names
    assert names == {name for name in written("shimcore") if name.endswith(wanted)} - {"shimcore/rig/fake_parts.h"}
