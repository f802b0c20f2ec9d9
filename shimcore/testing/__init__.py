"""pytest fixtures for authors of shims. In a conftest.py::

    pytest_plugins = ["shimcore.testing"]

    @pytest.fixture(scope="session")
    def shim(install_shim):
        return install_shim("my_shim:MyShim", "io.containerd.mine.v1")

    def test_hello(rig):
        container = rig.container(["echo", "hello"])
        assert container.run() == 0
        assert container.output == "hello\\n"
        rig.events.wait("/tasks/exit", container=container.id)
        container.delete()

There is no entry point by which pytest would load it by itself: what a test uses is to be seen in its project.
Needs `pip install shimcore[testing]`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore.install import RUNTIME_ID, SHIM, install
from shimcore.rig import Events, FakeRuntime, Rig
from shimcore.rig.bundle import BUSYBOX, busybox_rootfs
from shimcore.testing.leaks import Guard, watched

#: install_shim([module:Class, runtime id, *directories that its module and what it imports lie in]) -> path.
Install = Callable[..., str]


@pytest.fixture(scope="session")
def leak_guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """Fails the session when a process, mount, socket or cgroup of its own is left at its end. All fixtures here use it."""
    with watched(tmp_path_factory.getbasetemp()) as guard:
        yield guard


@pytest.fixture(scope="session")
def session_root(leak_guard: Guard) -> Path:
    """A directory that goes with the session, with a path short enough for sockets (unix(7): 107 bytes)."""
    return leak_guard.roots[0]


@pytest.fixture(scope="session")
def rootfs(session_root: Path) -> Path:
    """A root filesystem of a static busybox, shared by all containers; the test is skipped on a machine that has none."""
    if not os.path.exists(BUSYBOX):
        pytest.skip(f"there is no {BUSYBOX} (Debian's busybox-static)")
    return busybox_rootfs(session_root / "rootfs")


@pytest.fixture(scope="session")
def install_shim(session_root: Path) -> Iterator[Install]:
    """A function that installs a shim and returns its executable's path; without arguments, our shim for runc."""
    with pytest.MonkeyPatch.context() as patch:

        def make(shim: str = SHIM, runtime_id: str = RUNTIME_ID, *paths: str | Path) -> str:
            for path in paths:
                if str(path) not in sys.path:
                    patch.syspath_prepend(str(path))
            # One directory each: a name may be another's module.
            dest = session_root / "bin" / runtime_id if runtime_id != RUNTIME_ID else session_root / "bin"
            return install(str(dest), runtime_id=runtime_id, shim=shim)

        yield make


@pytest.fixture
def make_rig(leak_guard: Guard, rootfs: Path) -> Iterator[Callable[..., Rig]]:
    """A function that makes a Rig of the arguments that Rig takes. Each must be left without anything behind."""
    made: list[Rig] = []

    def make(shim: str | Path, **options: object) -> Rig:
        made.append(Rig(shim, **{"rootfs": rootfs, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    left = [line for rig in made for line in rig.close()]
    assert not left, "left behind:\n  " + "\n  ".join(left)


@pytest.fixture
def rig(make_rig: Callable[..., Rig], shim: str) -> Rig:
    """A Rig of the shim that the project's own fixture `shim` names."""
    return make_rig(shim)


@pytest.fixture
def fake_containerd(session_root: Path) -> Iterator[Events]:
    """containerd's Events endpoint alone, for what publishes to it without a rig around; a Rig has its own as `events`."""
    with Events(session_root / f"e{os.urandom(4).hex()}") as events:
        yield events


@pytest.fixture
def fake_runtime(session_root: Path) -> Iterator[FakeRuntime]:
    """An OCI runtime whose timing the test decides: make_rig(shim, runtime=str(it.binary), env=it.environment)."""
    with FakeRuntime(session_root / f"r{os.urandom(4).hex()}") as runtime:
        yield runtime
