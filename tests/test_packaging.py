"""What is in the package that is built of this folder: all that was written, and nothing that was not."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from shimcore import install

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


def test_the_smoke_tests_of_wheels_pass_here() -> None:
    done = subprocess.run([sys.executable, "tests/smoke.py"], cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   life_under_the_launcher" in done.stdout


def test_pips_command_is_the_shim_that_is_installed(tmp_path: Path) -> None:
    """What the entry point calls, as pip's script calls it: under the shim's name."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][install.NAME]
    module, _, function = entry.partition(":")
    script = tmp_path / install.NAME
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {module} import {function}\n{function}()\n"
    script.write_text(f"#!{sys.executable}\n{start}")
    script.chmod(0o755)
    both = (str(script), install.install(str(tmp_path / "bin")))
    told = [subprocess.run([path, "-v"], capture_output=True, text=True, timeout=HANG, check=True) for path in both]
    assert told[0].stdout == told[1].stdout and install.RUNTIME_ID in told[0].stdout


def test_public_ci_calls_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    called = set(re.findall(r"run: make ([a-z-]+)", text))
    assert {"lint", "test", "sanitize"} <= called <= targets
    assert all((ROOT / name).exists() for name in re.findall(r"tests/\w+\.py", text))
