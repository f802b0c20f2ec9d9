"""Fixtures that every test may use, and the guard that fails the session when it leaves something behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd.daemon import Containerd
from tests.faults import lab, lab_shim, new_lab, shared_lab, shm
from tests.leaks import MARKER, Guard

__all__ = ["lab", "lab_shim", "new_lab", "shared_lab", "shm"]

REPO = Path(__file__).resolve().parent.parent
BUSYBOX = "/bin/busybox"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Lets a fixture's teardown know whether its test has passed."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call":
        item.passed = report.passed  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def leak_guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """Set up first and torn down last of all fixtures: fails when the session leaves anything behind."""
    marker = uuid.uuid4().hex
    # Short, since the paths of unix sockets are: 108 bytes at most.
    root = Path(tempfile.mkdtemp(prefix="sct-"))
    before = {name: os.environ.get(name) for name in (MARKER, "TMPDIR", "PYTHONPATH", "SHIMCORE_TEMPLATE")}
    # Whoever makes a temporary directory, the rig included, makes it where mounts are looked for at the end.
    os.environ[MARKER] = marker
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    # Children find the package whatever their working directory is, installed or not.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), before["PYTHONPATH"]]))
    # A template outlives those whom it served: the tests that want one have it in a directory of theirs.
    os.environ["SHIMCORE_TEMPLATE"] = os.environ.get("SHIMCORE_TEST_TEMPLATE", "0")
    guard = Guard(marker, f"sct-{marker[:8]}", [root, tmp_path_factory.getbasetemp()])
    yield guard
    left = guard.settle()
    if left:
        guard.clean()
    guard.drop_parents()
    tempfile.tempdir = None
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    shutil.rmtree(root, ignore_errors=True)
    if left:
        pytest.fail("the session left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def session_root(leak_guard: Guard) -> Path:
    """A directory with a short path that goes with the session."""
    return leak_guard.roots[0]


@pytest.fixture(scope="session")
def namespace(leak_guard: Guard) -> str:
    """The containerd namespace of this session; cgroups are named after it, which is how a stray is found."""
    return leak_guard.prefix


@pytest.fixture(scope="session")
def rootfs(session_root: Path) -> Path:
    """A root filesystem that holds a static busybox and its applets, shared by all containers."""
    root = session_root / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, root / "bin" / "busybox")
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for name in applets:
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    return root


@pytest.fixture(scope="session")
def shim_dir(session_root: Path) -> Path:
    """A directory that holds an executable containerd-shim-runc-v2-py."""
    directory = session_root / "bin"
    command = [sys.executable, "-m", "shimcore.install", "--dest", str(directory)]
    subprocess.run(command, check=True, cwd=REPO, timeout=120)
    return directory


@pytest.fixture(scope="session")
def containerd(session_root: Path, namespace: str, leak_guard: Guard) -> Iterator[Containerd]:
    """The machine's containerd, as a daemon of our own: own root, state and sockets, CRI off.

    Its PATH begins with the directory that shim_dir fills: a test of the stock shim needs no build of ours.
    """
    daemon = Containerd(session_root / "cd", namespace, path=[session_root / "bin"])
    daemon.start()
    yield daemon
    daemon.stop()
