"""Cgroups of processes: where they are, who is in them, and the few files that a shim writes.

Three layouts are in use (cgroups(7)): v1 has one hierarchy per controller or pair of controllers, v2 one for
all ("unified"), and a hybrid machine has v1's with a v2 mount beside them that holds no controllers.
`/proc/PID/cgroup` names a process's cgroups as paths within each hierarchy; where those are in the file
system is in mountinfo, and a mount need not show its hierarchy from the top: within a container its root is
the container's own cgroup, which has to be taken off the path.
"""

from __future__ import annotations

import os

from . import mountinfo
from .errors import FailedPrecondition, InvalidArgument, NotFound, ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

UNIFIED, HYBRID, LEGACY, NONE = "unified", "hybrid", "legacy", "none"
CGROUP_ROOT = "/sys/fs/cgroup"
# include/uapi/linux/oom.h
OOM_SCORE_ADJ_MAX = 1000


# --- hierarchies


class Hierarchy:
    """One mounted hierarchy. controllers: v1 only, names as mountinfo and /proc/PID/cgroup have them
    ("memory", "name=systemd"); root: the path within the hierarchy that is seen at `mountpoint`.
    """

    __slots__ = ("controllers", "mountpoint", "root", "v2")

    def __init__(self, mountpoint: str, root: str, controllers: Sequence[str], v2: bool) -> None:
        self.mountpoint = mountpoint
        self.root = root
        self.controllers = tuple(controllers)
        self.v2 = v2

    def directory(self, path: str) -> str | None:
        """Where a cgroup of this hierarchy is in the file system; None when the mount does not show it.

        path: absolute within the hierarchy, from /proc/PID/cgroup. One that begins with /.. lies outside of
        our cgroup namespace (cgroup_namespaces(7)).
        """
        if path == "/.." or path.startswith("/../"):
            return None
        root = self.root.rstrip("/")
        if root:
            if path != root and not path.startswith(root + "/"):
                return None
            path = path[len(root) :]
        return self.mountpoint + path.rstrip("/") if path.strip("/") else self.mountpoint

    def __repr__(self) -> str:
        return f"Hierarchy({self.mountpoint!r}, {'v2' if self.v2 else ','.join(self.controllers)})"


def hierarchies(mounts: list[mountinfo.Mount] | None = None) -> list[Hierarchy]:
    """The mounted hierarchies, v1 and v2; of several mounts of one, that which shows most. Raises OSError."""
    found: dict[tuple[str, ...], Hierarchy] = {}
    for mount in mountinfo.read() if mounts is None else mounts:
        if mount.fstype == "cgroup2":
            hierarchy = Hierarchy(mount.mountpoint, mount.root, (), True)
        elif mount.fstype == "cgroup":
            names = [o for o in mount.super_options if o.startswith("name=") or o in _V1_CONTROLLERS]
            hierarchy = Hierarchy(mount.mountpoint, mount.root, names, False)
        else:
            continue
        known = found.get(hierarchy.controllers)
        if known is None or len(hierarchy.root.rstrip("/")) < len(known.root.rstrip("/")):
            found[hierarchy.controllers] = hierarchy
    return list(found.values())


_V1_CONTROLLERS = frozenset((
    "blkio", "cpu", "cpuacct", "cpuset", "debug", "devices", "freezer", "hugetlb", "memory", "misc",
    "net_cls", "net_prio", "perf_event", "pids", "rdma",
))  # fmt: skip


def mode(found: list[Hierarchy] | None = None) -> str:
    """UNIFIED (v2 alone), LEGACY (v1 alone), HYBRID (both), or NONE. Raises OSError."""
    if found is None:
        found = hierarchies()
    v2 = any(h.v2 for h in found)
    v1 = any(not h.v2 for h in found)
    return (HYBRID if v2 else LEGACY) if v1 else UNIFIED if v2 else NONE


def is_unified() -> bool:
    """Whether v2 holds the controllers of this machine; false on a hybrid one. Raises OSError."""
    return mode() == UNIFIED


# --- cgroups of a process


def parse_proc_cgroup(text: str) -> list[tuple[tuple[str, ...], str]]:
    """[(controllers, path)] of a /proc/PID/cgroup; v2's entry has no controllers. A path may hold colons."""
    entries = []
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            controllers = tuple(parts[1].split(",")) if parts[1] else ()
            path = parts[2].removesuffix(" (deleted)")
            entries.append((controllers, path or "/"))
    return entries


def parse_v2_path(text: str, mountpoint: str = CGROUP_ROOT) -> str:
    """The v2 directory of a /proc/PID/cgroup, below `mountpoint`. Raises NotFound when it has no v2 line."""
    for controllers, path in parse_proc_cgroup(text):
        if not controllers:
            return mountpoint.rstrip("/") + path
    raise NotFound("no cgroup v2 entry")


def _read(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall())


def _proc_cgroup(pid: int | str) -> list[tuple[tuple[str, ...], str]]:
    try:
        return parse_proc_cgroup(_read(f"/proc/{pid}/cgroup"))
    except (FileNotFoundError, ProcessLookupError):
        raise NotFound(f"no process {pid}") from None


def paths(pid: int | str, found: list[Hierarchy] | None = None) -> dict[str, str]:
    """Controller -> directory of a process's cgroups; v2's under "". Those that no mount shows are left out.

    Raises NotFound (no such process), OSError.
    """
    if found is None:
        found = hierarchies()
    by_name: dict[str, Hierarchy] = {}
    for hierarchy in found:
        by_name.update(dict.fromkeys(hierarchy.controllers or ("",), hierarchy))
    result = {}
    for controllers, path in _proc_cgroup(pid):
        for name in controllers or ("",):
            directory = by_name[name].directory(path) if name in by_name else None
            if directory is not None:
                result[name] = directory
    return result


def find_directory(pid: int | str, *controllers: str, top: bool = True) -> str:
    """A directory that stands for a process's cgroup: of the first of `controllers` ("" is v2) that can be
    seen, else v2's where v2 is alone, else of a v1 controller that runtimes make cgroups in.

    Never v2's on a hybrid machine unless asked for: runtimes leave their processes in its top there, beside
    everybody else's. For the same reason top=False, for who wants to kill what is inside, passes over cgroups
    that are the top of their mount. Raises NotFound when none is left, OSError.
    """
    found = hierarchies()
    known = paths(pid, found)
    return choose_directory(pid, known if top else below_top(known, found), found, *controllers)


def below_top(known: dict[str, str], found: list[Hierarchy]) -> dict[str, str]:
    """Those of `paths` that are not the top of their mount."""
    tops = {hierarchy.mountpoint for hierarchy in found}
    return {name: directory for name, directory in known.items() if directory not in tops}


def choose_directory(pid: int | str, known: dict[str, str], found: list[Hierarchy], *controllers: str) -> str:
    """find_directory among directories that are known already. Raises NotFound."""
    v1 = ("pids", "memory", "freezer", "devices", "cpu", "name=systemd")
    usual = ("",) if mode(found) == UNIFIED else v1
    for name in (*controllers, *usual):
        directory = known.get(name)
        if directory is not None and os.path.isdir(directory):
            return directory
    raise NotFound(f"no cgroup of process {pid} is visible")


def cgroup_procs(directory: str, recursive: bool = True) -> list[int]:
    """Pids in a cgroup and those below it, in no order. A cgroup that is removed meanwhile counts as empty.

    0 stands for a process that our pid namespace does not show; it is left out. Raises NotFound when the
    directory is no cgroup to begin with, OSError.
    """
    pids: set[int] = set()
    todo = [directory]
    while todo:
        here = todo.pop()
        try:
            pids.update(map(int, _read(os.path.join(here, "cgroup.procs")).split()))
            if recursive:
                with os.scandir(here) as entries:
                    todo += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError as error:
            from errno import ENODEV, ENOENT, EOPNOTSUPP

            if error.errno == EOPNOTSUPP:  # v2, a threaded cgroup: its processes are told by the one above
                continue
            if error.errno not in (ENOENT, ENODEV):
                raise
            if here == directory and not pids:
                raise NotFound(f"no cgroup {directory}") from None
    pids.discard(0)
    return list(pids)


def procs_path(pid: int | str) -> str:
    """The cgroup.procs file of a container's cgroup, by its init's pid: never that of a cgroup at the top of
    its mount, which holds other people's processes. Raises NotFound, OSError.
    """
    return os.path.join(find_directory(pid, top=False), "cgroup.procs")


def list_pids(procs: str) -> list[int]:
    """cgroup_procs for the directory of a cgroup.procs file, as procs_path gives it."""
    return cgroup_procs(os.path.dirname(procs))


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def add_task_to_cgroup(path: str, pid: int) -> list[str]:
    """Move a process into the cgroup `path`, relative to every hierarchy's top, wherever it exists; returns
    the directories.

    For the runc option shim_cgroup, which names a cgroup that the administrator has made: nothing is created.
    Raises InvalidArgument (an empty path, or .. in it), NotFound (no hierarchy has it, or no such process),
    FailedPrecondition (a cpuset that has not been set up), OSError.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise InvalidArgument(f"not a cgroup: {path!r}")
    joined = []
    for hierarchy in hierarchies():
        directory = "/".join((hierarchy.mountpoint, *parts))
        if not os.path.isdir(directory):
            continue
        try:
            _write(os.path.join(directory, "cgroup.procs"), str(pid))
        except ProcessLookupError:
            raise NotFound(f"no process {pid}") from None
        except OSError as error:
            from errno import ENOSPC

            if error.errno != ENOSPC:
                raise
            raise FailedPrecondition(f"{directory} takes no process: set its cpuset.cpus and cpuset.mems first") from None
        joined.append(directory)
    if not joined:
        raise NotFound(f"no hierarchy has the cgroup {path}")
    return joined


# --- freezing and killing


def freezer_file(directory: str) -> tuple[str, str, str]:
    """(file, value that freezes, value that thaws) of a cgroup: v2's cgroup.freeze, or v1's freezer.state.

    Raises NotFound when the directory has neither (a v2 cgroup at the top, or v1's of another controller).
    """
    for name, freeze, thaw in (("cgroup.freeze", "1", "0"), ("freezer.state", "FROZEN", "THAWED")):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            return path, freeze, thaw
    raise NotFound(f"{directory} cannot be frozen")


def freeze(directory: str) -> None:
    """Ask the kernel to freeze a cgroup; it may take its time. Raises NotFound, OSError."""
    path, value, _ = freezer_file(directory)
    _write(path, value)


def thaw(directory: str) -> None:
    """Undo freeze. Raises NotFound, OSError."""
    path, _, value = freezer_file(directory)
    _write(path, value)


def kill_file(directory: str) -> str | None:
    """v2's cgroup.kill, which kills all below at once when "1" is written to it (Linux 5.14); None without
    it.
    """
    path = os.path.join(directory, "cgroup.kill")
    return path if os.path.exists(path) else None


# --- the OOM killer's preference


def read_oom_score_adj(pid: int | str) -> int:
    """oom_score_adj of a process, -1000 to 1000 (proc(5)). Raises NotFound, OSError."""
    try:
        return int(_read(f"/proc/{pid}/oom_score_adj"))
    except (FileNotFoundError, ProcessLookupError):
        raise NotFound(f"no process {pid}") from None


def signal_listed(pids: Iterable[int], listed: Callable[[], Iterable[int]], signum: int, death_timeout: float = 0.0) -> None:
    """Signal those of these processes that `listed` names again: a pid that was given to a stranger since is not in there.

    death_timeout: seconds to wait for each one's death at most. Raises OSError but for one that has gone."""
    from ._reaper import pidfd_open, pidfd_send_signal

    fds: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                fds[pid] = pidfd_open(pid)
            except OSError:
                pass
        still = set(listed()) if fds else set()
        kept = [fd for pid, fd in fds.items() if pid in still]
        for fd in kept:
            try:
                pidfd_send_signal(fd, signum)
            except ProcessLookupError:
                pass
        if death_timeout:
            from select import POLLIN, poll

            for fd in kept:
                poller = poll()
                poller.register(fd, POLLIN)
                poller.poll(death_timeout * 1000)
    finally:
        for fd in fds.values():
            os.close(fd)


def adjust_oom_score(pid: int, parent: int | None = None) -> int:
    """Set a process's oom_score_adj to its parent's + 1, at most 1000, and return it as read back.

    So containerd (`parent`; our own parent when None) is killed after the shim, and the container, whose spec
    sets its own, before it. Raises NotFound, ShimError when the kernel kept another value, OSError (lowering
    it needs CAP_SYS_RESOURCE).
    """
    wanted = min(read_oom_score_adj(os.getppid() if parent is None else parent) + 1, OOM_SCORE_ADJ_MAX)
    if read_oom_score_adj(pid) != wanted:
        _write(f"/proc/{pid}/oom_score_adj", str(wanted))
    found = read_oom_score_adj(pid)
    if found != wanted:
        raise ShimError(f"oom_score_adj of {pid} is {found} after {wanted} was written")
    return found
