"""Stats: a container's cgroup files as the message that containerd's clients know, io.containerd.cgroups.v1.Metrics or v2's.

Imported when somebody asks. What a kernel or a hierarchy does not have is left at 0, as in the stock shim. Units are the
kernel's: v1 tells CPU time in nanoseconds, v2 in microseconds; memory is in bytes.
Sources: Documentation/admin-guide/cgroup-v1/*.rst and cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from ..protos import metrics_v1_pb2, metrics_v2_pb2

NO_LIMIT = (1 << 64) - 1
USER_HZ_NS = 10_000_000  # cpuacct.stat counts hundredths of a second, whatever the kernel's own tick
# The kernel says "max" where RDMA has no limit; the message has 32 bits.
RDMA_NO_LIMIT = (1 << 32) - 1


def measure(cgroups: Mapping[str, str]) -> tuple[str, bytes]:
    """(type URL, message serialized) for a container's cgroups.

    cgroups: controller to directory for v1; "" to directory, and nothing else, for v2. Reads files, which may take as long as
    the kernel likes.
    """
    if set(cgroups) == {""}:
        return "io.containerd.cgroups.v2.Metrics", v2(cgroups[""]).SerializeToString()
    return "io.containerd.cgroups.v1.Metrics", v1(cgroups).SerializeToString()


# --- files


def _text(directory: str | None, name: str) -> str:
    """"" when it can't be read: a controller that is off, a kernel that has no such file, a cgroup that has gone."""
    if directory is None:
        return ""
    try:
        with open(os.path.join(directory, name), "rb", buffering=0) as file:
            return os.fsdecode(file.readall())
    except OSError:
        return ""


def _number(text: str, unlimited: int = NO_LIMIT) -> int:
    text = text.strip()
    if text == "max":
        return unlimited
    return int(text) if text.isdigit() else 0


def _value(directory: str | None, name: str, unlimited: int = NO_LIMIT) -> int:
    return _number(_text(directory, name), unlimited)


def _flat(text: str) -> dict[str, int]:
    """A flat keyed file: a name and a number on each line."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2:
            found[words[0]] = _number(words[1])
    return found


def _nested(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A nested keyed file: a key, then name=value."""
    for line in text.splitlines():
        key, *pairs = line.split()
        yield key, dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _fill(message: Any, values: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Set the fields (values of `names`) for which there is a number under the kernel's name (keys)."""
    for name, field in names.items():
        if name in values:
            setattr(message, field, values[name])


def _rdma(message: Any, directory: str | None) -> None:
    for name, entries in (("rdma.current", message.current), ("rdma.max", message.limit)):
        for device, values in _nested(_text(directory, name)):
            entries.add(
                device=device,
                hca_handles=_number(values.get("hca_handle", "0"), RDMA_NO_LIMIT),
                hca_objects=_number(values.get("hca_object", "0"), RDMA_NO_LIMIT),
            )


def _page_sizes(directory: str | None, ending: str) -> list[str]:
    """The sizes of huge pages that a cgroup counts, as the kernel writes them: 2MB, 1GB."""
    try:
        names = os.listdir(directory) if directory is not None else []
    except OSError:
        return []
    return sorted(name[len("hugetlb.") : -len(ending)] for name in names if name.startswith("hugetlb.") and name.endswith(ending))


# --- v1

_MEMORY_V1 = (
    "cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "inactive_anon", "active_anon", "inactive_file",
    "active_file", "unevictable",
)  # fmt: skip
# What the message calls otherwise than the kernel does.
_FAULTS_V1 = {"pgpgin": "pg_pg_in", "pgpgout": "pg_pg_out", "pgfault": "pg_fault", "pgmajfault": "pg_maj_fault"}
_STAT_V1 = {name: name for name in _MEMORY_V1} | _FAULTS_V1
_STAT_V1 |= {f"total_{name}": f"total_{field}" for name, field in _STAT_V1.items()}
_STAT_V1 |= {"hierarchical_memory_limit": "hierarchical_memory_limit", "hierarchical_memsw_limit": "hierarchical_swap_limit"}

# CFQ's and BFQ's files first; where they say nothing, those of the throttling layer.
_BLKIO = (
    (
        ("sectors_recursive", "sectors_recursive"),
        ("io_service_bytes_recursive", "io_service_bytes_recursive"),
        ("io_serviced_recursive", "io_serviced_recursive"),
        ("io_queued_recursive", "io_queued_recursive"),
        ("io_service_time_recursive", "io_service_time_recursive"),
        ("io_wait_time_recursive", "io_wait_time_recursive"),
        ("io_merged_recursive", "io_merged_recursive"),
        ("time_recursive", "io_time_recursive"),
    ),
    (("throttle.io_serviced", "io_serviced_recursive"), ("throttle.io_service_bytes", "io_service_bytes_recursive")),
)


def _device(major: int, minor: int) -> str:
    """The device file of a block device, "" when sysfs does not know it."""
    for line in _text(f"/sys/dev/block/{major}:{minor}", "uevent").splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.removeprefix("DEVNAME=")
    return ""


def _blkio(message: metrics_v1_pb2.BlkIOStat, directory: str | None) -> None:
    names: dict[tuple[int, int], str] = {}
    for files in _BLKIO:
        found = False
        for name, field in files:
            for line in _text(directory, "blkio." + name).splitlines():
                # "8:0 Read 4096", "8:0 4096"; the sum over all devices, "Total 4096", is no device's.
                words = line.split()
                major, colon, minor = words[0].partition(":") if words else ("", "", "")
                if not colon or len(words) not in (2, 3):
                    continue
                key = int(major), int(minor)
                if key not in names:
                    names[key] = _device(*key)
                operation = words[1] if len(words) == 3 else ""
                getattr(message, field).add(
                    op=operation, device=names[key], major=key[0], minor=key[1], value=_number(words[-1])
                )
                found = True
        if found:
            return


def _entry(message: metrics_v1_pb2.MemoryEntry, directory: str | None, prefix: str) -> None:
    message.usage = _value(directory, prefix + "usage_in_bytes")
    message.max = _value(directory, prefix + "max_usage_in_bytes")
    message.failcnt = _value(directory, prefix + "failcnt")
    message.limit = _value(directory, prefix + "limit_in_bytes")


def v1(cgroups: Mapping[str, str]) -> metrics_v1_pb2.Metrics:
    from ..protos import metrics_v1_pb2

    out = metrics_v1_pb2.Metrics()
    memory, cpuacct = cgroups.get("memory"), cgroups.get("cpuacct")
    if memory is not None:
        _fill(out.memory, _flat(_text(memory, "memory.stat")), _STAT_V1)
        for message, prefix in (
            (out.memory.usage, "memory."), (out.memory.swap, "memory.memsw."), (out.memory.kernel, "memory.kmem."),
            (out.memory.kernel_tcp, "memory.kmem.tcp."),
        ):  # fmt: skip
            _entry(message, memory, prefix)
        control = _flat(_text(memory, "memory.oom_control"))
        _fill(out.memory_oom_control, control, {name: name for name in ("oom_kill_disable", "under_oom", "oom_kill")})
    if cpuacct is not None:
        usage = out.cpu.usage
        usage.total = _value(cpuacct, "cpuacct.usage")
        usage.per_cpu.extend(map(_number, _text(cpuacct, "cpuacct.usage_percpu").split()))
        times = _flat(_text(cpuacct, "cpuacct.stat"))
        usage.user, usage.kernel = times.get("user", 0) * USER_HZ_NS, times.get("system", 0) * USER_HZ_NS
    if "cpu" in cgroups:
        names = {"nr_periods": "periods", "nr_throttled": "throttled_periods", "throttled_time": "throttled_time"}
        _fill(out.cpu.throttling, _flat(_text(cgroups["cpu"], "cpu.stat")), names)
    if "pids" in cgroups:
        out.pids.current = _value(cgroups["pids"], "pids.current")
        out.pids.limit = _value(cgroups["pids"], "pids.max", 0)  # v1's message says 0 for no limit
    if "blkio" in cgroups:
        _blkio(out.blkio, cgroups["blkio"])
    hugetlb = cgroups.get("hugetlb")
    for size in _page_sizes(hugetlb, ".usage_in_bytes"):
        if not size.endswith(".rsvd"):
            base = f"hugetlb.{size}."
            out.hugetlb.add(
                pagesize=size, usage=_value(hugetlb, base + "usage_in_bytes"), max=_value(hugetlb, base + "max_usage_in_bytes"),
                failcnt=_value(hugetlb, base + "failcnt"),
            )  # fmt: skip
    if "rdma" in cgroups:
        _rdma(out.rdma, cgroups["rdma"])
    return out


# --- v2

_CPU_V2 = ("usage_usec", "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec", "nr_bursts", "burst_usec")
_EVENTS_V2 = ("low", "high", "max", "oom", "oom_kill", "oom_group_kill")
_MEMORY_V2 = (
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback", "anon_thp",
    "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable", "slab_unreclaimable",
    "pgfault", "pgmajfault", "workingset_nodereclaim", "workingset_refault_anon", "workingset_refault_file",
    "workingset_activate_anon", "workingset_activate_file", "pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate",
    "pglazyfree", "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc", "workingset_refault", "workingset_activate",
)  # fmt: skip


def _pressure(message: Any, directory: str, name: str) -> None:
    for kind, values in _nested(_text(directory, name)):
        if kind in ("some", "full"):
            data = getattr(message.psi, kind)
            for field in ("avg10", "avg60", "avg300"):
                setattr(data, field, float(values.get(field, "0")))
            data.total = _number(values.get("total", "0"))


def v2(directory: str) -> metrics_v2_pb2.Metrics:
    from ..protos import metrics_v2_pb2

    out = metrics_v2_pb2.Metrics()
    out.pids.current = _value(directory, "pids.current")
    out.pids.limit = _value(directory, "pids.max")
    _fill(out.cpu, _flat(_text(directory, "cpu.stat")), {name: name for name in _CPU_V2})
    _pressure(out.cpu, directory, "cpu.pressure")
    memory = out.memory
    values = _flat(_text(directory, "memory.stat"))
    for whole in ("workingset_refault", "workingset_activate"):  # Linux 5.9 tells the parts alone
        if f"{whole}_anon" in values:
            values.setdefault(whole, values[f"{whole}_anon"] + values.get(f"{whole}_file", 0))
    _fill(memory, values, {name: name for name in _MEMORY_V2})
    memory.usage = _value(directory, "memory.current")
    memory.usage_limit = _value(directory, "memory.max")
    memory.max_usage = _value(directory, "memory.peak")
    memory.swap_usage = _value(directory, "memory.swap.current")
    memory.swap_limit = _value(directory, "memory.swap.max")
    memory.swap_max_usage = _value(directory, "memory.swap.peak")
    _pressure(memory, directory, "memory.pressure")
    _fill(out.memory_events, _flat(_text(directory, "memory.events")), {name: name for name in _EVENTS_V2})
    for device, amounts in _nested(_text(directory, "io.stat")):
        major, colon, minor = device.partition(":")
        if colon:
            counts = {name: _number(amounts.get(name, "0")) for name in ("rbytes", "wbytes", "rios", "wios")}
            out.io.usage.add(major=int(major), minor=int(minor), **counts)
    _pressure(out.io, directory, "io.pressure")
    for size in _page_sizes(directory, ".current"):
        if not size.endswith(".rsvd"):
            base = f"hugetlb.{size}."
            out.hugetlb.add(
                pagesize=size, current=_value(directory, base + "current"), max=_value(directory, base + "max"),
                failcnt=_flat(_text(directory, base + "events")).get("max", 0),
            )  # fmt: skip
    _rdma(out.rdma, directory)
    return out
