"""What the tests under the real containerd share: each runs once with the stock shim and once with ours."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from shimcore.testing.leaks import RUNC, Guard
from tests.containerd.daemon import Containerd, wait_for

STOCK = "io.containerd.runc.v2"
OURS = "io.containerd.runc.v2-py"

# An init that ends with 7 on SIGTERM.
TRAPPED = 'trap "exit 7" TERM; while :; do sleep 0.05; done'


class Box:
    """The containers of one test: named apart from all others, of one runtime, removed at its end."""

    def __init__(self, daemon: Containerd, runtime: str, rootfs: Path) -> None:
        self.daemon = daemon
        self.runtime = runtime
        self.rootfs = rootfs
        self.ids: list[str] = []

    @property
    def ours(self) -> bool:
        return self.runtime == OURS

    def name(self) -> str:
        self.ids.append(f"c{uuid.uuid4().hex[:10]}")
        return self.ids[-1]

    def run(
        self, name: str, *command: str, flags: tuple[str, ...] = (), check: bool = True
    ) -> CompletedProcess[str]:
        """`ctr run` of a command; with "-d" among the flags its FIFOs lie below the daemon's root."""
        if "-d" in flags:
            flags += ("--fifo-dir", str(self.daemon.fifos))
        return self.daemon.ctr(
            "run", "--runtime", self.runtime, *flags, "--rootfs", self.rootfs, name, *command, check=check
        )

    def start(self, *command: str) -> tuple[str, int]:
        """A detached container: its id and the pid of its init."""
        name = self.name()
        self.run(name, *command, flags=("-d",))
        return name, self.daemon.tasks()[name][0]

    def exec(self, name: str, *command: str, check: bool = True) -> CompletedProcess[str]:
        fifos = ("--fifo-dir", str(self.daemon.fifos))
        exec_id = f"e{uuid.uuid4().hex[:8]}"
        return self.daemon.ctr("task", "exec", *fifos, "--exec-id", exec_id, name, *command, check=check)

    def rm(self, name: str) -> int:
        """Removes a stopped task and its container; the task's exit code, which ctr only warns about."""
        done = self.daemon.ctr("task", "rm", name)
        self.daemon.ctr("container", "rm", name)
        told = re.search(r"exit with non-zero exit code (\d+)", done.stderr)
        return int(told[1]) if told else 0

    def status(self, name: str) -> str:
        return self.daemon.tasks().get(name, (0, "GONE"))[1]

    def wait_status(self, name: str, wanted: str) -> None:
        wait_for(f"task {name} {wanted}", lambda: self.status(name) == wanted)

    def left(self) -> list[str]:
        """What of this test's containers is still there."""
        tasks, containers = self.daemon.tasks(), self.daemon.containers()
        found = [f"task {name}: {tasks[name]}" for name in self.ids if name in tasks]
        found += [f"container {name}" for name in self.ids if name in containers]
        found += [f"bundle {name}" for name in self.ids if self.daemon.bundle(name).exists()]
        found += [f"runc {name}" for name in self.ids if (RUNC / self.daemon.namespace / name).exists()]
        return found

    def remove(self) -> None:
        for name in self.ids:
            self.daemon.ctr("task", "rm", "-f", name, check=False)
            self.daemon.ctr("container", "rm", name, check=False)


@pytest.fixture(params=[pytest.param(STOCK, id="stock"), pytest.param(OURS, id="ours")])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == OURS:
        request.getfixturevalue("shim_dir")
    return str(request.param)


@pytest.fixture
def box(containerd: Containerd, runtime: str, rootfs: Path, request: pytest.FixtureRequest) -> Iterator[Box]:
    made = Box(containerd, runtime, rootfs)
    yield made
    left = made.left() if getattr(request.node, "passed", False) else []
    made.remove()
    assert not left, f"left after the test: {left}"


@pytest.fixture
def nothing_left(leak_guard: Guard, containerd: Containerd) -> Iterator[None]:
    """After the test no shim, container, mount, socket or cgroup is there that was not there before."""
    before = set(leak_guard.find())

    def left() -> list[str]:
        # The test may have restarted the daemon.
        found = sorted(set(leak_guard.find()) - before)
        return [one for one in found if not one.startswith(f"process {containerd.pid}:")]

    yield
    wait_for("clean machine", lambda: not left(), detail=left)
