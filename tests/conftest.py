"""Fixtures that every test may use, and the guard that fails the session when it leaves something behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.testing import Install
from shimcore.testing.leaks import Guard, watched
from tests.containerd.daemon import Containerd
from tests.faults import lab, lab_shim, new_lab, shared_lab, shm

# In a shell's background SIGINT is ignored, which children would inherit: tests interrupt commands.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["lab", "lab_shim", "new_lab", "shared_lab", "shm"]

REPO = Path(__file__).resolve().parent.parent


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
    with pytest.MonkeyPatch.context() as patch, watched(tmp_path_factory.getbasetemp()) as guard:
        # Children find the package whatever their working directory is, installed or not.
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        # A template outlives those whom it served: the tests that want one have it in a directory of theirs.
        patch.setenv("SHIMCORE_TEMPLATE", os.environ.get("SHIMCORE_TEST_TEMPLATE", "0"))
        patch.setenv("SHIMCORE_FEATURES_DIR", str(tmp_path_factory.getbasetemp() / "features"))
        yield guard


@pytest.fixture(scope="session")
def namespace(leak_guard: Guard) -> str:
    """The containerd namespace of this session; cgroups are named after it, which is how a stray is found."""
    return leak_guard.prefix


@pytest.fixture(scope="session")
def shim_dir(install_shim: Install) -> Path:
    """A directory that holds an executable containerd-shim-runc-v2-py."""
    return Path(install_shim()).parent


@pytest.fixture(scope="session")
def containerd(session_root: Path, namespace: str, leak_guard: Guard) -> Iterator[Containerd]:
    """The machine's containerd, as a daemon of our own: own root, state and sockets, CRI off.

    Its PATH begins with the directory that shim_dir fills: a test of the stock shim needs no build of ours.
    """
    daemon = Containerd(session_root / "cd", namespace, path=[session_root / "bin"])
    daemon.start()
    yield daemon
    daemon.stop()
