"""What `start` and `delete` do for an OCI runtime. Both run once per container: no protobuf, no json, no
subprocess here.

The task service is imported when the daemon asks for it.
"""

from __future__ import annotations

import os

from ..bootstrap import DeleteResult, encode_info
from ..errors import NotFound, ShimError
from ..shim import Shim
from ..util import json_loads, now_ns, read_file_to_str, read_pid_from_file, read_runtime, read_spec
from .options import Options, from_any, from_bundle
from .runc import DEFAULT_BINARY, INIT_PID_FILE, LOG_FILE, Runtime, last_error, read_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .._ttrpc import Server
    from ..bootstrap import Flags, Invocation, StartOpts
    from ..publisher import RemotePublisher
    from ..task import Task
    from .service import RuncTask

# A container with one of these joins the shim of its group; the first that is there counts.
GROUP_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")

STREAMING = "containerd.services.streaming.v1.Streaming"

POD_FILES = "pod"  # what the Sandbox service makes in a sandbox's bundle, with a mount in it

SIGKILL = 9
KILLED_STATUS = 128 + SIGKILL
# Seconds. containerd kills `delete` after 5.
INIT_DEATH_TIMEOUT = 1.0
RUNTIME_TIMEOUT = 3.0
KILL_TIMEOUT = 0.5


def grouping(spec: dict[str, Any], id: str) -> str:
    """The id under which a container's shim is found: its group's, else its own."""
    annotations = spec.get("annotations")
    if isinstance(annotations, dict):
        for name in GROUP_ANNOTATIONS:
            group = annotations.get(name)
            if isinstance(group, str):
                return group
    return id


def _group(bundle: str, id: str) -> str:
    """grouping() of a bundle. Raises InvalidArgument, OSError."""
    try:
        return grouping(read_spec(bundle), id)
    except NotFound:  # a sandbox has no config.json, and is its own group
        return id


class RuncShim(Shim):
    """containerd-shim-runc-v2-py."""

    api_version = 3

    _task: RuncTask | None = None

    def start_shim(self, opts: StartOpts) -> str:
        """The address of the shim that serves this container: a new daemon's, or that of its group's."""
        from ..daemon import spawn

        # Whatever is wrong with the options is said before there is a daemon.
        options = from_any(*opts.options) if opts.options is not None else Options()
        pid, address = spawn(opts, _group(os.curdir, opts.id))
        if pid:
            _place(pid, address, options.shim_cgroup)
        return address

    @classmethod
    def preload(cls) -> None:
        from google.protobuf import empty_pb2  # noqa: F401

        from ..protos import anys, events_pb2, runc_options_pb2, task_pb2  # noqa: F401
        from . import features, service  # noqa: F401

    def task_class(self) -> type[RuncTask]:
        """The class that answers the Task API: RuncTask, or what a derived shim makes of it."""
        from .service import RuncTask

        return RuncTask

    def create_task_service(self, publisher: RemotePublisher) -> Task:
        self._task = self.task_class()(publisher, self.exit)
        return self._task

    def register_services(self, server: Server, publisher: RemotePublisher) -> None:
        if self._task is None:
            return  # a derived shim with another service of its own: there are no pods in it
        from .._ttrpc import CLIENT_STREAM, COROUTINE, SERVER_STREAM
        from ..wire import Raw
        from .sandbox import register

        register(server, self._task.sandbox)
        stream = (COROUTINE, self._task.stream, Raw, CLIENT_STREAM | SERVER_STREAM)
        server.add_service(STREAMING, {"Stream": stream})

    def delete_shim(self) -> DeleteResult:
        """Clear away what a container has left, whether its shim is alive, dead, or has done all this
        already.

        What can't be cleared is logged and not raised: containerd, told of a failure, would keep the bundle
        for ever."""
        id, namespace = self.flags.id, self.flags.namespace
        bundle = _bundle(self.flags.bundle, id)
        options = from_bundle(bundle)
        try:
            options.binary_name = read_runtime(bundle) or options.binary_name
        except OSError:
            pass
        runtime = Runtime(options, namespace, bundle)
        try:
            pid = read_pid_from_file(os.path.join(bundle, INIT_PID_FILE))
        except (OSError, ShimError):
            pid = 0
        from .aborted import clear_half_made, clear_mounts

        # Without its state the runtime has nothing to delete, and is not asked: it has been done by the shim,
        # mostly.
        state_dir = runtime.state_dir(id)
        if os.path.isdir(state_dir):
            clear_mounts(state_dir)
            clear_half_made(state_dir, bundle)
            pid = _kill_init(state_dir) or pid
            _run_delete(runtime, id, os.path.join(bundle, LOG_FILE))
        _umount(os.path.join(bundle, "rootfs"))
        if os.path.isdir(os.path.join(bundle, POD_FILES)):
            _umount(os.path.join(bundle, POD_FILES))
        _remove_dead_socket(bundle, self.flags)
        return _told_exit(bundle, id) or DeleteResult(pid, KILLED_STATUS, now_ns())

    def shim_info(self, invocation: Invocation) -> bytes:
        """Name, version, the options as they came in, and what the runtime's `features` says or has said (see features), if it
        knows that command."""
        from .. import __version__
        from . import features

        options = from_any(*invocation.options) if invocation.options is not None else Options()
        binary = features.resolve(options.binary_name or DEFAULT_BINARY)
        said = features.cached(binary, lambda: _features(binary))
        return encode_info(self.runtime_id, __version__, options=invocation.options, features=said)


def _told_exit(bundle: str, id: str) -> DeleteResult | None:
    """How init ended, if its shim lived to record it: containerd publishes this when it has not heard of the exit."""
    from ..ledger import last_exit

    try:
        found = last_exit(id, bundle=bundle)
    except OSError:
        return None
    return None if found is None else DeleteResult(found.pid, found.exit_status, found.exited_at)


def _bundle(flag: str, id: str) -> str:
    """The bundle of `delete`: -bundle, else the working directory. It may have gone, which is no reason to
    fail."""
    if flag:
        return os.path.abspath(flag)
    try:
        return os.path.join(os.path.dirname(os.getcwd()), id)
    except OSError:
        return "/nonexistent"


def _place(pid: int, address: str, shim_cgroup: str) -> None:
    """Put the daemon into shim_cgroup, if one is asked for, and its oom_score_adj between containerd's and
    the containers'; a daemon that can't be put there is not left running."""
    from ..cgroup import add_task_to_cgroup, adjust_oom_score
    from ..daemon import caller

    try:
        if shim_cgroup:
            add_task_to_cgroup(shim_cgroup, pid)
        adjust_oom_score(pid, caller())
    except BaseException:
        from ..address import remove_socket_silently

        if pid != os.getpid():
            os.kill(pid, SIGKILL)  # our child, which nobody has waited for: the pid is its own
        remove_socket_silently(address)
        raise


def _features(binary: str) -> bytes | None:
    """The JSON of `runc features`, None from a runtime that has no such command. Raises OSError when it can't
    be started."""
    fd = os.memfd_create("features", os.MFD_CLOEXEC)
    try:
        if _call([binary, "features"], {1: fd}) != 0:
            return None
        return os.pread(fd, os.fstat(fd).st_size, 0).strip() or None
    finally:
        os.close(fd)


def _call(argv: list[str], fds: dict[int, int] | None = None) -> int:
    """Run a runtime for at most RUNTIME_TIMEOUT; its exit status, 137 when it was killed then. Raises
    OSError."""
    from .. import _reaper

    _, fd = _reaper.spawn(argv, fds=fds, new_group=True)
    try:
        if not _wait_readable(fd, RUNTIME_TIMEOUT):
            _reaper.pidfd_send_signal(fd, SIGKILL)
            _wait_readable(fd, KILL_TIMEOUT)
        status = _reaper.wait_pidfd(fd)
        return KILLED_STATUS if status is None else status
    finally:
        os.close(fd)


def _recorded_init(state_dir: str) -> tuple[int, int]:
    """(pid, start time in clock ticks since boot) of the init that the runtime has recorded, (0, 0) when it
    can't be told."""
    # runc, then crun.
    for name, pid_key, start_key in (
        ("state.json", "init_process_pid", "init_process_start"),
        ("status", "pid", "process-start-time"),
    ):
        try:
            state = json_loads(read_file_to_str(os.path.join(state_dir, name)))
            pid, start = state[pid_key], state[start_key]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(pid, int) and isinstance(start, int) and pid > 1 and start > 0:
            return pid, start
    return 0, 0


def _start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, 0 when there is no such process; the name before it may hold spaces and
    brackets."""
    try:
        return int(read_file_to_str(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _kill_init(state_dir: str) -> int:
    """Kill the container's init if it lives and wait for its death; returns its pid, 0 when the runtime
    doesn't know.

    `delete --force` would do it, but looks at it only every 100 ms. A pid that was reused since has another
    start time, and is looked at after the pidfd is open."""
    from .._reaper import pidfd_open, pidfd_send_signal

    pid, start = _recorded_init(state_dir)
    if not pid or _start_time(pid) != start:
        return pid
    try:
        fd = pidfd_open(pid)
    except OSError:
        return pid
    try:
        if _start_time(pid) == start:
            pidfd_send_signal(fd, SIGKILL)
            _wait_readable(fd, INIT_DEATH_TIMEOUT)
    except OSError as error:
        _warn("init of the container can't be killed", error, pid=pid)
    finally:
        os.close(fd)
    return pid


def _wait_readable(fd: int, seconds: float) -> bool:
    from select import POLLIN, poll

    poller = poll()
    poller.register(fd, POLLIN)
    return bool(poller.poll(seconds * 1000))


def _run_delete(runtime: Runtime, id: str, log: str) -> None:
    try:
        size = os.stat(log).st_size
    except OSError:
        size = 0
    try:
        status = _call(runtime.delete(id, force=True))
    except OSError as error:
        _warn("the runtime can't be run", error, binary=runtime.binary)
        return
    if status != 0:
        _warn("the runtime did not delete the container", last_error(read_log(log, size)[0]), id=id, status=status)


def _umount(rootfs: str) -> None:
    from ..mount import umount_recursive

    try:
        umount_recursive(rootfs)
    except (OSError, ShimError) as error:
        _warn("rootfs can't be unmounted", error, rootfs=rootfs)


def _remove_dead_socket(bundle: str, flags: Flags) -> None:
    """A shim that was killed leaves its socket; that of a group's living shim answers, and stays. A `start` that was killed
    may have left one before there was an address file."""
    from ..address import known_address, noted_socket_dir, remove_socket, socket_address, somebody_answers

    try:
        try:
            address = known_address(bundle)
        except NotFound:
            group, folder = _group(bundle, flags.id), noted_socket_dir(bundle)
            address = socket_address(flags.address, flags.namespace, group, socket_dir=folder)
        if not somebody_answers(address):
            remove_socket(address)
    except ShimError:
        pass  # an address that is none of a socket's
    except OSError as error:
        _warn("socket of a dead shim can't be removed", error)


def _warn(text: str, error: object, **fields: Any) -> None:
    from .. import logger

    logger.warn(text, **fields, **({"error": error} if error else {}))
