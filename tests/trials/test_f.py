"""Trials F: OOM, on the cgroups that this machine has. Each says what would turn it red."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import cgroup
from shimcore.rig import Rig, Session, bundle
from tests.faults import scale

HOG = "head -c 200m /dev/zero | tail"
LIMIT = 24 << 20


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    if "memory" not in {name for one in cgroup.hierarchies() for name in one.controllers} and not cgroup.is_unified():
        pytest.skip("no memory controller here")
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


# red: as above
def test_F3_an_oom_kill_of_init_is_137(rig: Rig) -> None:
    """Init itself is the hog: it is what the kernel kills."""
    container = limited(rig, "tail", "/dev/zero")
    assert container.wait() == 137
    container.delete()
