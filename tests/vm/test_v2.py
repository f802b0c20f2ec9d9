"""Real containers where cgroup v2 is alone, by runc and by crun: `make vm-test` runs these in a guest that has it so."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import cgroup
from shimcore.protos import metrics_v2_pb2, runc_options_pb2
from shimcore.rig import Rig, Session, bundle
from tests.faults import until

TOP = Path("/sys/fs/cgroup")
LIMIT = 24 << 20
HOG = "head -c 200m /dev/zero | tail"

pytestmark = pytest.mark.skipif(not cgroup.is_unified(), reason="cgroup v2 is not alone here: `make vm-test` boots where it is")


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest) -> str:
    found = shutil.which(request.param)
    if not found:
        pytest.skip(f"no {request.param} here")
    return found


@pytest.fixture
def rig(runtime: str, shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, runtime=runtime) as rig:
        yield rig


def running(rig: Rig, *args: str, **resources: object) -> Session:
    id = f"v{uuid.uuid4().hex[:8]}"
    spec = bundle.spec(args or ("sleep", "1000"), root=str(rig.rootfs), cgroups_path=f"/{rig.namespace}/{id}")
    spec["linux"].setdefault("resources", {}).update(resources)
    container = rig.container(id=id, spec=spec)
    container.create()
    container.start()
    return container


def group(container: Session) -> Path:
    """The container's own, as the kernel names it."""
    (line,) = Path(f"/proc/{container.pid}/cgroup").read_text().split()
    return TOP / line.removeprefix("0::/")


def metrics(container: Session) -> metrics_v2_pb2.Metrics:
    found = container.task.stats()
    assert found.type_url == "io.containerd.cgroups.v2.Metrics"
    return metrics_v2_pb2.Metrics.FromString(found.value)


def killed(container: Session) -> None:
    """And nothing is left of its cgroup."""
    folder = group(container)
    assert folder.is_dir() and folder != TOP
    container.task.kill(9)
    assert container.wait() == 137
    container.delete()
    assert not folder.exists()


def test_a_whole_life(rig: Rig) -> None:
    container = running(rig, "sh", "-c", "exit 42")
    assert container.wait() == 42
    container.delete()
    assert rig.events.topics(container.id) == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_an_oom_is_told_before_its_exit_and_init_s_is_137(rig: Rig) -> None:
    for args, status in ((("tail", "/dev/zero"), 137), (("sh", "-c", f"{HOG}; exit 7"), 7)):
        container = running(rig, *args, memory={"limit": LIMIT, "swap": LIMIT})
        assert container.wait() == status
        rig.events.wait("/tasks/exit", container=container.id)
        told = rig.events.topics(container.id)
        assert told.count("/tasks/oom") == 1 and told.index("/tasks/oom") < told.index("/tasks/exit"), told
        container.delete()


def test_stats_are_the_kernel_s(rig: Rig) -> None:
    container = running(rig, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 100 & sleep 100",
                        memory={"limit": LIMIT}, pids={"limit": 50})
    until(lambda: metrics(container).pids.current >= 2)
    found, folder = metrics(container), group(container)
    assert found.pids.limit == 50 and found.memory.usage_limit == LIMIT
    assert 0 < found.memory.usage <= LIMIT and found.cpu.usage_usec > 1000
    stat = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
    assert found.cpu.usage_usec <= int(stat["usage_usec"])
    assert found.cpu.user_usec + found.cpu.system_usec <= int(stat["user_usec"]) + int(stat["system_usec"])
    killed(container)


def test_update_changes_the_files(rig: Rig) -> None:
    container = running(rig, memory={"limit": LIMIT}, pids={"limit": 50})
    folder = group(container)
    container.task.update({
        "memory": {"limit": 2 * LIMIT}, "pids": {"limit": 70}, "cpu": {"quota": 50000, "period": 100000, "shares": 512},
    })  # fmt: skip
    assert (folder / "memory.max").read_text().split() == [str(2 * LIMIT)]
    assert (folder / "pids.max").read_text().split() == ["70"]
    assert (folder / "cpu.max").read_text().split() == ["50000", "100000"]
    assert metrics(container).memory.usage_limit == 2 * LIMIT
    killed(container)


def test_pause_and_resume(rig: Rig) -> None:
    container = running(rig, "sh", "-c", "while :; do echo .; sleep 0.01; done")
    folder = group(container)
    container.task.pause()
    assert (folder / "cgroup.freeze").read_text().strip() == "1"
    assert rig.events.wait("/tasks/paused", container=container.id)
    container.task.resume()
    assert (folder / "cgroup.freeze").read_text().strip() == "0"
    seen = len(container.output)
    until(lambda: len(container.output) > seen)
    killed(container)


def test_a_paused_container_is_killed(rig: Rig) -> None:
    container = running(rig, "sh", "-c", "sleep 1000 & sleep 1000")
    container.task.pause()
    killed(container)


def test_kill_of_all_and_what_is_left_of_a_host_pid_namespace(rig: Rig) -> None:
    """Without a pid namespace init's death takes nobody with it."""
    id = f"v{uuid.uuid4().hex[:8]}"
    spec = bundle.spec(["sh", "-c", "sleep 1000 & sleep 1000 & exec sleep 1000"], root=str(rig.rootfs),
                       cgroups_path=f"/{rig.namespace}/{id}")
    spec["linux"]["namespaces"] = [one for one in spec["linux"]["namespaces"] if one["type"] != "pid"]
    container = rig.container(id=id, spec=spec)
    container.create()
    container.start()
    until(lambda: len(container.task.pids()) == 3)
    folder = group(container)
    container.task.kill(9, all=True)
    assert container.wait() == 137
    until(lambda: not folder.exists() or not (folder / "cgroup.procs").read_text())
    container.delete()
    assert not folder.exists()


def test_exec_is_in_the_container_s_cgroup(rig: Rig) -> None:
    container = running(rig)
    process = container.exec(["sleep", "1000"])
    assert str(process.pid) in (group(container) / "cgroup.procs").read_text().split()
    container.task.kill(9, process.id)
    assert process.wait() == 137
    process.delete()
    killed(container)


def test_shim_cgroup(runtime: str, shim_dir: Path, rootfs: Path, tmp_path: Path) -> None:
    folder = TOP / f"shims-{uuid.uuid4().hex[:6]}"
    folder.mkdir()
    try:
        options = runc_options_pb2.Options(shim_cgroup=f"/{folder.name}", root=str(tmp_path / "state"), binary_name=runtime)
        with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, options=options) as rig:
            container = rig.container(["sleep", "1000"])
            assert str(container.shim_pid) in (folder / "cgroup.procs").read_text().split()
            container.create()
            container.start()
            killed(container)
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text())
        os.rmdir(folder)


def test_a_killed_shim_leaves_no_cgroup(rig: Rig) -> None:
    container = running(rig, "sh", "-c", "sleep 1000 & sleep 1000")
    folder = group(container)
    container.kill_shim()
    container.cleanup()
    assert not folder.exists() and not Path(f"/proc/{container.pid}").exists()
