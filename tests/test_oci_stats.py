"""Stats: the cgroup files of v1 and v2 as messages, on trees that are made up and of real containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from shimcore import cgroup
from shimcore.errors import NotFound
from shimcore.oci import stats
from shimcore.protos import metrics_v1_pb2, metrics_v2_pb2
from shimcore.rig import Rig
from tests.faults import Lab, until

STOCK = Path("/usr/bin/containerd-shim-runc-v2")


def write(directory: Path, files: Mapping[str, str]) -> str:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return str(directory)


@pytest.fixture
def v1_tree(tmp_path: Path) -> dict[str, str]:
    memory = {
        "memory.stat": "cache 1\nrss 2\nrss_huge 3\nshmem 99\nmapped_file 4\ndirty 5\nwriteback 6\npgpgin 7\npgpgout 8\n"
        "pgfault 9\npgmajfault 10\ninactive_anon 11\nactive_anon 12\ninactive_file 13\nactive_file 14\nunevictable 15\n"
        "hierarchical_memory_limit 16\nhierarchical_memsw_limit 17\ntotal_cache 18\ntotal_rss 19\ntotal_pgfault 26\n",
        "memory.usage_in_bytes": "4096\n", "memory.max_usage_in_bytes": "8192\n", "memory.failcnt": "3\n",
        "memory.limit_in_bytes": "9223372036854771712\n", "memory.memsw.usage_in_bytes": "5000\n",
        "memory.kmem.usage_in_bytes": "600\n", "memory.kmem.tcp.usage_in_bytes": "70\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n",
    }  # fmt: skip
    cpu = {
        "cpuacct.usage": "123456789\n", "cpuacct.usage_percpu": "23456789 100000000 \n", "cpuacct.stat": "user 5\nsystem 7\n",
        "cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n",
    }  # fmt: skip
    blkio = {
        "blkio.throttle.io_serviced": "1:3 Read 2\n1:3 Write 0\n1:3 Total 2\nTotal 2\n",
        "blkio.throttle.io_service_bytes": "1:3 Read 8192\n1:3 Total 8192\nTotal 8192\n",
    }
    huge = {
        "hugetlb.2MB.usage_in_bytes": "2097152\n", "hugetlb.2MB.max_usage_in_bytes": "4194304\n", "hugetlb.2MB.failcnt": "1\n",
        "hugetlb.2MB.rsvd.usage_in_bytes": "0\n",
    }  # fmt: skip
    rdma = {"rdma.current": "mlx4_0 hca_handle=2 hca_object=9\n", "rdma.max": "mlx4_0 hca_handle=max\n"}
    both = write(tmp_path / "cpu", cpu)
    return {
        "memory": write(tmp_path / "memory", memory), "cpu": both, "cpuacct": both,
        "pids": write(tmp_path / "pids", {"pids.current": "4\n", "pids.max": "max\n"}),
        "blkio": write(tmp_path / "blkio", blkio), "hugetlb": write(tmp_path / "hugetlb", huge),
        "rdma": write(tmp_path / "rdma", rdma),
    }  # fmt: skip


def test_v1_says_what_the_files_say(v1_tree: dict[str, str]) -> None:
    url, value = stats.measure(v1_tree)
    assert url == "io.containerd.cgroups.v1.Metrics"
    out = metrics_v1_pb2.Metrics.FromString(value)
    memory = out.memory
    assert (memory.cache, memory.rss, memory.rss_huge, memory.mapped_file) == (1, 2, 3, 4)
    assert (memory.pg_pg_in, memory.pg_pg_out, memory.pg_fault, memory.pg_maj_fault) == (7, 8, 9, 10)
    assert (memory.inactive_anon, memory.unevictable) == (11, 15)
    assert (memory.hierarchical_memory_limit, memory.hierarchical_swap_limit) == (16, 17)
    assert (memory.total_cache, memory.total_rss, memory.total_pg_fault) == (18, 19, 26)
    usage = memory.usage
    assert (usage.usage, usage.max, usage.failcnt, usage.limit) == (4096, 8192, 3, 9223372036854771712)
    assert (memory.swap.usage, memory.kernel.usage, memory.kernel_tcp.usage) == (5000, 600, 70)
    assert (out.memory_oom_control.under_oom, out.memory_oom_control.oom_kill) == (1, 2)
    assert out.cpu.usage.total == 123456789 and list(out.cpu.usage.per_cpu) == [23456789, 100000000]
    assert (out.cpu.usage.user, out.cpu.usage.kernel) == (50_000_000, 70_000_000)
    throttling = out.cpu.throttling
    assert (throttling.periods, throttling.throttled_periods, throttling.throttled_time) == (1, 2, 3)
    assert (out.pids.current, out.pids.limit) == (4, 0)
    served = [(entry.op, entry.major, entry.minor, entry.value) for entry in out.blkio.io_serviced_recursive]
    assert served == [("Read", 1, 3, 2), ("Write", 1, 3, 0), ("Total", 1, 3, 2)]
    assert [entry.value for entry in out.blkio.io_service_bytes_recursive] == [8192, 8192]
    assert [(one.pagesize, one.usage, one.max, one.failcnt) for one in out.hugetlb] == [("2MB", 2097152, 4194304, 1)]
    assert [(one.device, one.hca_handles, one.hca_objects) for one in out.rdma.current] == [("mlx4_0", 2, 9)]
    assert [one.hca_handles for one in out.rdma.limit] == [0xFFFFFFFF]


def test_v1_with_the_files_of_a_scheduler_takes_those(v1_tree: dict[str, str]) -> None:
    write(Path(v1_tree["blkio"]), {"blkio.io_serviced_recursive": "8:0 Read 77\n", "blkio.time_recursive": "8:0 5\n"})
    out = stats.v1(v1_tree)
    assert [entry.value for entry in out.blkio.io_serviced_recursive] == [77]
    assert [(entry.op, entry.value) for entry in out.blkio.io_time_recursive] == [("", 5)]


@pytest.mark.parametrize("controller", ["memory", "cpu", "pids", "blkio", "hugetlb", "rdma"])
def test_v1_without_a_controller(v1_tree: dict[str, str], controller: str, tmp_path: Path) -> None:
    """One that is off, and one whose directory has gone."""
    gone = {**v1_tree, controller: str(tmp_path / "gone")}
    del v1_tree[controller]
    for tree in (v1_tree, gone):
        out = stats.v1(tree)
        assert out.cpu.usage.total == 123456789
        assert controller == "memory" or out.memory.cache == 1


@pytest.fixture
def v2_tree(tmp_path: Path) -> str:
    pressure = "some avg10=1.50 avg60=0.25 avg300=0.00 total=42\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n"
    return write(tmp_path / "v2", {
        "pids.current": "5\n", "pids.max": "max\n", "cpu.pressure": pressure, "memory.pressure": pressure,
        "io.pressure": pressure,
        "cpu.stat": "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\nnr_bursts 8\n"
        "burst_usec 9\ncore_sched.force_idle_usec 0\n",
        "memory.stat": "anon 1\nfile 2\nkernel_stack 3\nslab 4\nsock 5\nshmem 6\nanon_thp 10\npgfault 18\n"
        "workingset_refault_anon 20\nworkingset_refault_file 22\nthp_fault_alloc 30\n",
        "memory.current": "4096\n", "memory.max": "max\n", "memory.peak": "5000\n", "memory.swap.current": "1\n",
        "memory.swap.max": "2\n", "memory.swap.peak": "3\n",
        "memory.events": "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
        "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 \n",
        "hugetlb.2MB.current": "6\n", "hugetlb.2MB.max": "max\n", "hugetlb.2MB.events": "max 4\n",
        "hugetlb.2MB.rsvd.current": "0\n",
        "rdma.current": "mlx4_0 hca_handle=2 hca_object=9\n",
    })  # fmt: skip


def test_v2_says_what_the_files_say(v2_tree: str) -> None:
    url, value = stats.measure({"": v2_tree})
    assert url == "io.containerd.cgroups.v2.Metrics"
    out = metrics_v2_pb2.Metrics.FromString(value)
    assert (out.pids.current, out.pids.limit) == (5, stats.NO_LIMIT)
    cpu = out.cpu
    assert (cpu.usage_usec, cpu.user_usec, cpu.system_usec) == (10, 6, 4)
    assert (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec, cpu.nr_bursts, cpu.burst_usec) == (1, 2, 3, 8, 9)
    assert (cpu.psi.some.avg10, cpu.psi.some.avg60, cpu.psi.some.total, cpu.psi.full.total) == (1.5, 0.25, 42, 7)
    memory = out.memory
    assert (memory.anon, memory.file, memory.kernel_stack, memory.anon_thp, memory.pgfault) == (1, 2, 3, 10, 18)
    assert (memory.workingset_refault_anon, memory.workingset_refault_file, memory.workingset_refault) == (20, 22, 42)
    assert (memory.usage, memory.usage_limit, memory.max_usage) == (4096, stats.NO_LIMIT, 5000)
    assert (memory.swap_usage, memory.swap_limit, memory.swap_max_usage) == (1, 2, 3)
    events = out.memory_events
    assert (events.low, events.high, events.max, events.oom, events.oom_kill, events.oom_group_kill) == (0, 1, 2, 3, 4, 5)
    devices = [(one.major, one.minor, one.rbytes, one.wbytes, one.rios, one.wios) for one in out.io.usage]
    assert devices == [(8, 0, 1, 2, 3, 4), (8, 16, 0, 0, 0, 0)]
    assert [(one.pagesize, one.current, one.max, one.failcnt) for one in out.hugetlb] == [("2MB", 6, stats.NO_LIMIT, 4)]
    assert [(one.device, one.hca_handles) for one in out.rdma.current] == [("mlx4_0", 2)]


def test_v2_of_a_cgroup_that_has_gone(tmp_path: Path) -> None:
    assert stats.v2(str(tmp_path / "gone")).memory.usage == 0


# --- real containers


@pytest.fixture(params=["stock", "ours"])
def rig(request: pytest.FixtureRequest, rootfs: Path) -> Iterator[Rig]:
    if request.param == "stock":
        shim = STOCK
        if not shim.exists():
            pytest.skip(f"{shim} is not installed")
    else:
        shim = request.getfixturevalue("shim_dir") / "containerd-shim-runc-v2-py"
    with Rig(shim, rootfs=rootfs) as rig:
        yield rig


def test_a_container_is_measured(rig: Rig) -> None:
    v2 = Path("/sys/fs/cgroup/cgroup.controllers")
    if cgroup.is_unified() and not {"pids", "cpu", "memory"} <= set(v2.read_text().split()):
        pytest.skip("cgroup v2 is without the controllers pids, cpu and memory here")
    container = rig.container(["sh", "-c", "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; sleep 100 & sleep 100 & sleep 100"])
    container.create()
    container.start()

    def read() -> metrics_v1_pb2.Metrics | metrics_v2_pb2.Metrics:
        found = container.task.stats()
        version = {"io.containerd.cgroups.v1.Metrics": metrics_v1_pb2, "io.containerd.cgroups.v2.Metrics": metrics_v2_pb2}
        return version[found.type_url].Metrics.FromString(found.value)

    until(lambda: read().pids.current >= 3)
    out = read()
    if isinstance(out, metrics_v1_pb2.Metrics):
        assert out.cpu.usage.total > 1_000_000 and out.memory.usage.usage > 4096 and sum(out.cpu.usage.per_cpu) > 0
    else:
        assert out.cpu.usage_usec > 1000
    container.task.kill(9)
    container.wait()
    container.delete()


# --- where the kernel stalls, or there is nothing to read


def test_unknown_and_unmade_containers(lab: Lab) -> None:
    with pytest.raises(NotFound):
        lab.box("absent", create=False).task.stats()


def test_a_container_without_a_cgroup_of_its_own(lab: Lab) -> None:
    box = lab.box("bare")
    lab.call("set_cgroups", id="bare", cgroups={})
    with pytest.raises(NotFound, match="no cgroup of container bare is known"):
        box.task.stats()
