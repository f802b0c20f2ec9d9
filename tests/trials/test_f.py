"""Trials F: OOM, on the cgroups that this machine has, and all else on v2 alone. Each says what would turn it red."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import cgroup
from shimcore.rig import Rig, Session, bundle
from tests.faults import FULL, REPO, scale

HOG = "head -c 200m /dev/zero | tail"
LIMIT = 24 << 20


# What is worth a second look on v2: what is read of a cgroup, who is killed through it, and all that containerd expects.
SUITE = ["tests/trials/test_f.py", "tests/trials/test_a3.py", "tests/test_cgroup.py", "tests/test_oci_stats.py"]
SUITE += ["tests/trials/test_c.py", "tests/trials/test_c2.py", "tests/test_conform.py"] if FULL else []
V2_ALONE = "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\""


def memory_folder() -> Path | None:
    """The top of the hierarchy that has the memory controller."""
    for one in cgroup.hierarchies():
        top = Path(one.mountpoint)
        if "memory" in one.controllers or (one.v2 and "memory" in (top / "cgroup.controllers").read_text().split()):
            return top
    return None


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    if not memory_folder():
        pytest.skip(f"no memory controller here ({cgroup.mode()} cgroups)")
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def limited(rig: Rig, *args: str) -> Session:
    """A container that runs and may have LIMIT bytes."""
    id = f"f{uuid.uuid4().hex[:8]}"
    spec = bundle.spec(args, root=str(rig.rootfs), cgroups_path=f"/{rig.namespace}/{id}")
    spec["linux"].setdefault("resources", {})["memory"] = {"limit": LIMIT, "swap": LIMIT}
    container = rig.container(id=id, spec=spec)
    container.create()
    container.start()
    return container


# red: sc_oom_look left out of tell(): the OOM comes after the exit, or never
def test_F1_F3_an_oom_is_told_before_its_exit(rig: Rig) -> None:
    for _ in range(scale(3, 100)):
        container = limited(rig, "sh", "-c", f"{HOG}; exit $?")
        assert container.wait() != 0
        rig.events.wait("/tasks/exit", container=container.id)
        told = rig.events.topics(container.id)
        assert told.index("/tasks/oom") < told.index("/tasks/exit"), told
        oom = next(event for event in rig.events.of(container.id) if event.topic == "/tasks/oom")
        assert oom.message.container_id == container.id
        container.delete()


# red: the folder of another hierarchy than v1's memory; with v2, `oom` counted instead of `oom_kill`. Not: the event asked for of
# the parent, since v1 tells watchers of both
def test_F2_the_limit_stands_on_the_parent_alone(rig: Rig) -> None:
    top = memory_folder()
    assert top is not None
    parent = f"{rig.namespace}/parent"
    v2 = cgroup.is_unified()
    (top / parent).mkdir(parents=True)
    if v2:
        for folder in (top, top / rig.namespace, top / parent):
            (folder / "cgroup.subtree_control").write_text("+memory")
    (top / parent / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(LIMIT))
    id = f"f{uuid.uuid4().hex[:8]}"
    spec = bundle.spec(["sh", "-c", f"{HOG}; exit 7"], root=str(rig.rootfs), cgroups_path=f"/{parent}/{id}")
    container = rig.container(id=id, spec=spec)
    container.create()
    container.start()
    assert container.wait() in (7, 137)
    rig.events.wait("/tasks/exit", container=id)
    told = rig.events.topics(id)
    assert told.index("/tasks/oom") < told.index("/tasks/exit"), told
    container.delete()
    for path in rig.leaks.cgroups():  # the parents, which runc leaves; the container's own has gone with it
        assert Path(path).name == "parent"
        os.rmdir(path)


# red: Pids and the killing of the rest looked for below v1's controllers
@pytest.mark.timeout(900)
def test_F4_the_same_suite_on_v2_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """In a mount namespace where /sys/fs/cgroup is cgroup2. What needs a controller that v1 holds is skipped, and says so."""
    if cgroup.is_unified():
        pytest.skip("v2 is alone here: all trials run on it")
    if os.geteuid() != 0 or "cgroup2" not in Path("/proc/filesystems").read_text():
        pytest.skip("needs root and cgroup2")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", V2_ALONE, "sh"]
    command += [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *SUITE]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    with capfd.disabled():
        print(*[line for line in done.stdout.splitlines() if line.startswith("SKIPPED")], sep="\n")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# red: as above
def test_F3_an_oom_kill_of_init_is_137(rig: Rig) -> None:
    """Init itself is the hog: it is what the kernel kills."""
    container = limited(rig, "tail", "/dev/zero")
    assert container.wait() == 137
    container.delete()
