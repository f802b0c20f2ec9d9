"""One container: its bundle on disk, the runtime that runs it, and its processes. What blocks is here, for
the pool."""

from __future__ import annotations

import os

from .. import cgroup, jobs, ledger, logger, mount
from ..errors import NotFound, ShimError
from ..util import mkdir, read_pid_from_file, read_spec, write_options, write_runtime
from .meter import Readings
from .options import Options, from_any
from .process import Process, unlink
from .readers import Lost, Policy, policy_of, spill_folder
from .runc import INIT_PID_FILE, Runtime, read_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..protos import task_pb2

SIGKILL = 9
# How often SIGKILL for all goes round: a fork bomb makes new ones while we list.
KILL_ROUNDS = 10


class Container:
    """Its fields belong to the RPC thread; the pool's functions read those that were set before they were
    called.

    lock: held by Create, Start of init, Delete, Pause, Resume and Update, from end to end. Execs, Kill, Pids
    and CloseIO do without: the exit table itself refuses what comes too early or too late."""

    __slots__ = (
        "bundle", "cgroup", "cgroups", "checkpoint", "deleted", "execs", "id", "init", "lock", "log_read", "lost", "mounted",
        "namespace",
        "options", "pid_readings", "policy", "private_pids", "readings", "ready", "rootfs", "runtime", "spill_folder",
    )  # fmt: skip

    def __init__(self, id: str, namespace: str, bundle: str, init: Process, lost: Lost | None = None) -> None:
        self.id = id
        self.namespace = namespace
        self.bundle = bundle
        self.init = init
        self.mounted = False  # there is, or may be, something to unmount at rootfs
        self.rootfs = os.path.join(bundle, "rootfs")
        self.execs: dict[str, Process] = {}
        self.lock = jobs.Lock()
        self.options = Options()
        self.runtime = Runtime(self.options, namespace, bundle)
        self.cgroup = ""  # directory of init's cgroup, "" when it could not be learnt
        self.cgroups: dict[str, str] = {}  # for Stats: controller ("": v2) to directory, those at the top of a mount left out
        self.readings = Readings()  # of Stats
        self.pid_readings = Readings()
        self.private_pids = True
        self.log_read = 0  # bytes of the runtime's log that an error has been made of already
        self.policy = Policy()  # for output that nobody reads
        self.lost = Lost(lost)
        self.spill_folder = ""
        self.ready = False  # Create has been answered with success
        self.checkpoint = ""  # the folder of the checkpoint that Start makes it from
        self.deleted: task_pb2.DeleteResponse | None = None

    @property
    def pid_file(self) -> str:
        return os.path.join(self.bundle, INIT_PID_FILE)

    def process(self, exec_id: str) -> Process:
        """Raises NotFound."""
        if not exec_id:
            return self.init
        process = self.execs.get(exec_id)
        if process is None:
            raise NotFound(f"process does not exist {exec_id}")
        return process

    # --- Create, for the pool

    def prepare(self, options_type: str, options: bytes, mounts: Sequence[Any]) -> None:
        """Everything before the runtime: options, files of the bundle, rootfs (containerd.types.Mount),
        stdio. unprepare() takes it back, also when this has failed half-way."""
        self.options = from_any(options_type, options)
        self.runtime = Runtime(self.options, self.namespace, self.bundle)
        # A daemon that died, or another shim, may have left these; a stale pid would be bound as ours.
        unlink(self.pid_file)
        unlink(self.runtime.log)
        write_options(self.bundle, self.options.values())
        write_runtime(self.bundle, self.options.binary_name)
        spec = self._spec()
        self.private_pids = has_private_pids(spec)
        self.policy = policy_of(spec)
        self.spill_folder = spill_folder(self.bundle)
        try:
            self.init.slot.set_ledger(os.path.join(self.bundle, ledger.FILE_NAME))
        except OSError as error:  # its exits are told all the same
            logger.error("the exits of this container will not be recorded", id=self.id, error=error)
        if mounts:
            mkdir(self.rootfs)
            self.mounted = True
            mount.mount_all(mounts, self.rootfs)
        self.init.open_io((self.options.io_uid, self.options.io_gid), self.namespace, self.policy.copy)

    def _spec(self) -> dict[str, Any]:
        try:
            return read_spec(self.bundle)
        except (OSError, ShimError) as error:
            logger.warn("config.json of the bundle can't be read", bundle=self.bundle, error=error)
            return {}

    def collect(self) -> int:
        """The pid of the init that was made. Raises OSError, InvalidArgument, Unknown."""
        pid = read_pid_from_file(self.pid_file)
        # Before the slot is bound: a zombie that has been reaped has no cgroup.
        try:
            found = cgroup.hierarchies()
            known = cgroup.below_top(cgroup.paths(pid, found), found)
        except (OSError, ShimError) as error:
            logger.warn("cgroups of the container are not known", id=self.id, pid=pid, error=error)
        else:
            self._learn_cgroups(pid, found, known)
        self.init.take_terminal()
        return pid

    def _learn_cgroups(self, pid: int, found: list[cgroup.Hierarchy], known: dict[str, str]) -> None:
        unified = cgroup.mode(found) == cgroup.UNIFIED
        self.cgroups = {name: path for name, path in known.items() if unified or name}
        try:
            self.cgroup = own_cgroup(pid, found, known)
        except (OSError, ShimError) as error:
            logger.warn("cgroup of the container is not known", id=self.id, pid=pid, error=error)
        try:
            folder = cgroup.choose_directory(pid, known, found, *(() if unified else ("memory",)))
            self.init.slot.watch_oom(folder, unified)
        except (OSError, ShimError) as error:
            logger.info("OOM kills of this container will not be told", id=self.id, error=error)

    def unprepare(self) -> None:
        """Never raises: the error that brought us here is the one to tell."""
        self.init.close_io()
        try:
            self.unmount()
        except (OSError, ShimError) as error:
            logger.error("rootfs of a container that was not created can't be unmounted", id=self.id, error=error)

    def unmount(self) -> None:
        """Idempotent. Raises OSError."""
        if self.mounted:
            mount.umount_recursive(self.rootfs)

    def close_io(self) -> None:
        """Of every process; on the RPC thread, which may be about to look at it."""
        self.init.close_io()
        for process in self.execs.values():
            process.close_io()

    def forget(self) -> None:
        """Take init out of the exit table, and with it its execs. Raises FailedPrecondition."""
        self.init.forget()
        for process in self.execs.values():
            process.slot.cookie = None
        self.execs.clear()

    def known_pids(self) -> list[int]:
        """Those of init and the execs that live. On the RPC thread."""
        slots = [process.slot for process in (self.init, *self.execs.values())]
        return [slot.pid for slot in slots if slot.pid > 0 and slot.exited_at == 0]

    # --- for the pool, at any time

    def runtime_log(self) -> bytes:
        """What the runtime has logged since an error was last made of it."""
        log, self.log_read = read_log(self.runtime.log, self.log_read)
        return log

    def listed(self) -> list[int]:
        """Every process in the container's cgroup; empty when it is not known, has gone or is unreadable."""
        try:
            return cgroup.cgroup_procs(self.cgroup) if self.cgroup else []
        except (OSError, ShimError):
            return []

    def signal_all(self, signum: int) -> int:
        """Signal every process of the cgroup; how many were. For SIGKILL until none is new."""
        seen: set[int] = set()
        for _ in range(KILL_ROUNDS if signum == SIGKILL else 1):
            fresh = [pid for pid in self.listed() if pid not in seen]
            if not fresh:
                break
            seen.update(fresh)
            cgroup.signal_listed(fresh, self.listed, signum)
        return len(seen)

    def signal_one(self, pid: int, signum: int) -> None:
        """Signal a process if it is one of this container's."""
        cgroup.signal_listed([pid], self.listed, signum)


def own_cgroup(pid: int, found: list[cgroup.Hierarchy], known: dict[str, str]) -> str:
    """Directory of a cgroup that is the container's alone; what is in it may be killed. Raises NotFound,
    OSError."""
    directory = cgroup.choose_directory(pid, known, found)
    if directory in cgroup.paths("self", found).values():
        raise NotFound(f"process {pid} is in the shim's own cgroup")
    return directory


def has_private_pids(spec: dict[str, Any]) -> bool:
    """Whether init's death takes all other processes with it: config.json asks for a new pid namespace. When
    that can't be told, the rest are killed to be sure."""
    linux = spec.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    if not isinstance(namespaces, list):
        return False
    return any(isinstance(entry, dict) and entry.get("type") == "pid" and not entry.get("path") for entry in namespaces)
