"""shimcore.testing, as an author's project uses it: a pytest of its own, outside this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

CONFTEST = f"""
import pytest
pytest_plugins = ["shimcore.testing"]

@pytest.fixture(scope="session")
def shim(install_shim):
    return install_shim("skeleton:Skeleton", "io.containerd.skeleton.v1", {str(EXAMPLES)!r})
"""

TESTS = """
def test_rig(rig):
    container = rig.container(["sh", "-c", "echo hello; exit 3"])
    assert container.run() == 3
    assert container.output == "hello\\n"
    rig.events.wait("/tasks/exit", container=container.id)
    container.delete()

def test_fake_runtime(make_rig, install_shim, fake_runtime):
    rig = make_rig(install_shim(), runtime=str(fake_runtime.binary), env=fake_runtime.environment)
    container = rig.container(["@exit", "5"])
    assert container.run() == 5
    assert fake_runtime.calls[0].startswith("create")
    container.delete()

def test_fake_containerd(fake_containerd):
    assert fake_containerd.count() == 0
    fake_containerd.restart()
"""


def author(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """pytest in a project that holds these tests; a session and a marker of its own."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_an_authors_project(tmp_path: Path) -> None:
    done = author(tmp_path, TESTS)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


def test_what_a_test_leaves_fails_it(tmp_path: Path) -> None:
    stray = """
import subprocess
def test_stray(rig):
    env = {"SHIMCORE_RIG": rig.leaks.marker}
    subprocess.Popen(["/bin/sleep", "100"], env=env)
def test_stray_of_the_session(leak_guard):
    subprocess.Popen(["/bin/sleep", "101"])
"""
    done = author(tmp_path, stray)
    assert done.returncode == 1, done.stdout
    assert "2 errors" in done.stdout and "sleep 100" in done.stdout and "sleep 101" in done.stdout
