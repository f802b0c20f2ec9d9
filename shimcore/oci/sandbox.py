"""The Sandbox service, containerd.runtime.sandbox.v1 (containerd 2.x): this shim is a pod's sandbox, without a pause container.

The pod's namespaces are held by a small process (launcher/pause.c), a job of the core's: it ends with us, however we end, and we
hear of it when somebody else ends it. It stays in the shim's own cgroup. containerd leaves the pod's files to who is the sandbox:
/etc/hosts, /etc/hostname, /etc/resolv.conf and /dev/shm are made in the sandbox's bundle and added to each container's mounts.

Handlers are coroutines on the RPC thread, as in service.
"""

from __future__ import annotations

import os

from .. import cgroup, jobs, logger, mount
from .._ttrpc import COROUTINE
from ..errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShimError, Unimplemented, Unknown
from ..protos.lazy import Message
from ..util import convert_to_timestamp, json_dumps, mkdir, now_ns, read_file_to_str, read_spec, write_str_to_file
from . import podconfig
from .shim import POD_FILES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .._reaper import Core, ExitSignal
    from .._ttrpc import Context, Server
    from ..protos import sandbox_pb2 as pb
else:
    from ..protos.lazy import sandbox_pb2 as pb

SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
PAUSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_bin", "pause")
CONTROL_FD = 3
READY_TIMEOUT = 20.0  # seconds for entering namespaces; the kernel may take long over a network's
FOREVER = 3e9  # seconds that the pause process may live: the core's jobs have a deadline each
STOP_TIMEOUT = 10.0
LEAVE_AFTER = 0.1

SHM = "shm"
SHM_OPTIONS = ("noexec", "nosuid", "nodev", "mode=1777", "size=65536k")

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"
# uname's names, where they are not Go's.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class Sandbox:
    """The one sandbox that a shim may be: its service. alive: from CreateSandbox to ShutdownSandbox."""

    def __init__(self, core: Core, exit: ExitSignal, on_end: Callable[[], None] = lambda: None) -> None:
        """on_end: called when `running` has become false."""
        self.core = core
        self._on_end = on_end
        self.id = ""
        self.exit = exit
        self.alive = False
        self.bundle = ""
        self.netns = ""
        self.config = podconfig.PodConfig()
        self.pid = 0
        self.created_at = self.exited_at = 0
        self.exit_status = 0
        self.ended = jobs.Event()
        self._control = -1  # our end of the pause process's socket: closed, it ends
        self._over = False
        self._words = ""  # why it could not be made
        self._lock = jobs.Lock()

    def _check(self, id: str) -> None:
        if not self.alive or id != self.id:
            raise NotFound(f"sandbox {id} is not there")

    @property
    def running(self) -> bool:
        """From CreateSandbox to its end, whoever ends it."""
        return self.alive and not self.ended.is_set()

    @property
    def _ready(self) -> bool:
        return self.pid != 0 and not self.ended.is_set()

    @property
    def _state(self) -> str:
        """As SandboxStatus spells it."""
        return READY if self._ready else NOT_READY

    def describe(self) -> dict[str, object] | None:
        """For the dump; None when there is no sandbox. Times are ns since the epoch. On any thread."""
        if not self.alive:
            return None
        facts: dict[str, object] = {"id": self.id, "state": self._state, "pid": self.pid, "netns": self.netns}
        facts["bundle"] = self.bundle
        if self.created_at:
            facts["created_at_ns"] = self.created_at
        if self.ended.is_set():
            facts |= {"exit_status": self.exit_status, "exited_at_ns": self.exited_at}
        return facts

    # --- the life of a sandbox

    async def create_sandbox(self, request: pb.CreateSandboxRequest, context: Context) -> pb.CreateSandboxResponse:
        if self.alive:
            raise AlreadyExists(f"this shim is the sandbox {self.id} already")
        if not request.sandbox_id or not request.bundle_path.startswith("/"):
            raise InvalidArgument("a sandbox needs an id and the absolute path of its bundle")
        if request.rootfs:
            raise Unimplemented("a sandbox with a root filesystem of its own")
        self.config = podconfig.from_any(request.options.type_url, request.options.value)
        if not request.netns_path and any(name.startswith("net.") for name in self.config.sysctls):
            raise InvalidArgument("sysctls of the network would be the node's: the pod has no network namespace")
        self.id, self.bundle, self.netns = request.sandbox_id, request.bundle_path, request.netns_path
        await jobs.in_pool(self._make_files)
        self.alive = True
        return pb.CreateSandboxResponse()

    async def start_sandbox(self, request: pb.StartSandboxRequest, context: Context) -> pb.StartSandboxResponse:
        self._check(request.sandbox_id)
        async with self._lock:
            if self.pid:
                raise FailedPrecondition(f"sandbox {self.id} was started already")
            self.pid = await self._pause()
            self.created_at = now_ns()
            self._tell()
        response = pb.StartSandboxResponse(pid=self.pid)
        convert_to_timestamp(self.created_at, response.created_at)
        return response

    async def stop_sandbox(self, request: pb.StopSandboxRequest, context: Context) -> pb.StopSandboxResponse:
        self._check(request.sandbox_id)
        await self._stop()
        return pb.StopSandboxResponse()

    async def wait_sandbox(self, request: pb.WaitSandboxRequest, context: Context) -> pb.WaitSandboxResponse:
        self._check(request.sandbox_id)
        await self.ended
        response = pb.WaitSandboxResponse(exit_status=self.exit_status)
        convert_to_timestamp(self.exited_at, response.exited_at)
        return response

    async def shutdown_sandbox(self, request: pb.ShutdownSandboxRequest, context: Context) -> pb.ShutdownSandboxResponse:
        """After it the shim ends, whatever is still there: containerd's `delete` clears that."""
        self._check(request.sandbox_id)
        await self._stop()
        await jobs.in_pool(self._remove_files)
        self.alive = False
        self.ended.set()  # of a sandbox that was never started: nobody may wait for ever
        jobs.Task(self.core, self._leave()).step()
        return pb.ShutdownSandboxResponse()

    async def _leave(self) -> None:
        """Go's ttrpc client may take a connection's end that is right behind an answer for the answer, and fail."""
        await jobs.sleep(LEAVE_AFTER)
        self.exit.signal()

    # --- questions

    async def ping_sandbox(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        self._check(request.sandbox_id)
        return pb.PingResponse()

    async def platform(self, request: pb.PlatformRequest, context: Context) -> pb.PlatformResponse:
        self._check(request.sandbox_id)
        machine = os.uname().machine
        response = pb.PlatformResponse()
        response.platform.os = "linux"
        response.platform.architecture = ARCHITECTURES.get(machine, machine)
        if machine == "armv7l":
            response.platform.variant = "v7"
        return response

    async def sandbox_status(self, request: pb.SandboxStatusRequest, context: Context) -> pb.SandboxStatusResponse:
        self._check(request.sandbox_id)
        response = pb.SandboxStatusResponse(sandbox_id=self.id, pid=self.pid, state=self._state)
        if self.created_at:
            convert_to_timestamp(self.created_at, response.created_at)
        if self.ended.is_set():
            convert_to_timestamp(self.exited_at, response.exited_at)
        if request.verbose:
            facts = {"pid": self.pid, "shim": os.getpid(), "netns": self.netns, "bundle": self.bundle}
            response.info["shim"] = json_dumps(facts)
        return response

    async def sandbox_metrics(self, request: pb.SandboxMetricsRequest, context: Context) -> pb.SandboxMetricsResponse:
        """Of the pod's cgroup, which is its containers' parent. Raises NotFound when the pod has none."""
        from . import stats

        self._check(request.sandbox_id)
        folders = await jobs.in_pool(pod_cgroups, self.config.cgroup_parent)
        if not folders:
            raise NotFound(f"sandbox {self.id} has no cgroup")
        url, value = await jobs.in_pool(stats.measure, folders)
        response = pb.SandboxMetricsResponse()
        response.metrics.id = self.id
        convert_to_timestamp(now_ns(), response.metrics.timestamp)
        response.metrics.data.type_url, response.metrics.data.value = url, value
        return response

    # --- the pause process

    def _arguments(self) -> list[str]:
        config = self.config
        arguments = [PAUSE, str(CONTROL_FD)]
        if self.netns:
            arguments += [f"net={self.netns}", f"uts={config.hostname}"]  # a pod in the node's network has its name too
        if config.ipc != podconfig.NODE:
            arguments.append("ipc")
        if config.pid == podconfig.POD:
            arguments.append("pid")
        return [*arguments, *(f"sysctl={name}={value}" for name, value in config.sysctls.items())]

    async def _pause(self) -> int:
        """Make it and return the pid whose namespaces the containers join. Raises Unknown with its reason."""
        import _socket

        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._control = ours.detach()
        self._over = False
        self._words = ""
        try:
            # The step makes the process; our copy of its end would hide its death.
            jobs.Task(self.core, self._watch(self._arguments(), theirs.fileno())).step()
            theirs.close()
            answer = await jobs.in_pool(_answer, self._control)
            word, _, pid = answer.partition(" ")
            if word != "ok" or not pid.isdigit():
                raise Unknown(f"the pod's namespaces: {answer or self._words or 'the pause process has ended without a word'}")
        except BaseException:
            self._let_go()
            raise
        return int(pid)

    async def _watch(self, argv: list[str], fd: int) -> None:
        """From its making to its end."""
        status = 255
        try:
            result = await jobs.run_job(argv, timeout=FOREVER, fds={CONTROL_FD: fd})
            status = result.status
        except OSError as error:
            self._words = f"{argv[0]} can't be started: {error.strerror}"
        finally:
            self._over = True
            self.exit_status, self.exited_at = status, now_ns()
            self._tell()

    def _tell(self) -> None:
        """Once it has been started and has ended, whichever was heard of first."""
        if self.pid and self._over:
            logger.info("the sandbox has ended", id=self.id, status=self.exit_status)
            self.ended.set()
            jobs.Task(self.core, self._say_end()).step()

    async def _say_end(self) -> None:
        await jobs.sleep(LEAVE_AFTER)
        self._on_end()

    def _let_go(self) -> None:
        fd, self._control = self._control, -1
        if fd >= 0:
            os.close(fd)

    async def _stop(self) -> None:
        """Idempotent. The end is told to those who wait before this returns."""
        async with self._lock:
            self._let_go()
            if self.pid and not await self.ended.within(STOP_TIMEOUT):
                raise Unknown(f"the pause process {self.pid} did not end within {STOP_TIMEOUT:g} s")

    # --- the pod's files, for the pool

    def _make_files(self) -> None:
        folder = os.path.join(self.bundle, POD_FILES)
        mkdir(folder)
        host = {name: _text_of(f"/etc/{name}") for name in ("hosts", "resolv.conf")}
        dns = "\n".join([*self.config.dns, ""]) if self.config.dns else host["resolv.conf"]
        hostname = (self.config.hostname if self.netns else "") or os.uname().nodename
        for name, text in (("hosts", host["hosts"]), ("resolv.conf", dns), ("hostname", hostname + "\n")):
            write_str_to_file(os.path.join(folder, name), text, 0o644)
        if self.config.ipc != podconfig.NODE:
            shm = os.path.join(folder, SHM)
            mkdir(shm)
            mount.mount_rootfs("tmpfs", "shm", SHM_OPTIONS, shm)

    def _remove_files(self) -> None:
        try:
            mount.umount_recursive(os.path.join(self.bundle, POD_FILES))
        except (OSError, ShimError) as error:
            logger.error("the pod's /dev/shm can't be unmounted", id=self.id, error=error)

    def add_mounts(self, bundle: str) -> None:
        """The pod's files among the mounts of a container's config.json, except those that it has from elsewhere."""
        spec = read_spec(bundle)
        mounts = spec.setdefault("mounts", [])
        has = {one.get("destination"): one for one in mounts}
        readonly = bool((spec.get("root") or {}).get("readonly"))
        folder = os.path.join(self.bundle, POD_FILES)
        wanted = {f"/etc/{name}": os.path.join(folder, name) for name in ("hosts", "hostname", "resolv.conf")}
        if (has.get("/dev/shm") or {"type": "tmpfs"}).get("type") == "tmpfs":  # each container's own, by default
            wanted["/dev/shm"] = os.path.join(folder, SHM) if self.config.ipc != podconfig.NODE else "/dev/shm"
            mounts[:] = [one for one in mounts if one.get("destination") != "/dev/shm"]
            has.pop("/dev/shm", None)
        for destination, source in wanted.items():
            if destination not in has:
                write = "ro" if readonly and destination != "/dev/shm" else "rw"
                entry = {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", write]}
                mounts.append(entry)
        write_str_to_file(os.path.join(bundle, "config.json"), json_dumps(spec))


def _answer(fd: int) -> str:
    """What the pause process says first, "" when it has ended; for the pool."""
    from select import POLLIN, poll

    poller = poll()
    poller.register(fd, POLLIN)
    if not poller.poll(READY_TIMEOUT * 1000):
        return f"the pause process did not answer within {READY_TIMEOUT:g} s"
    return os.read(fd, 4096).decode("utf-8", "replace")


def _text_of(path: str) -> str:
    try:
        return read_file_to_str(path)
    except OSError:
        return ""


def pod_cgroups(parent: str) -> dict[str, str]:
    """The directories of a pod's cgroup as stats.measure wants them, none when it is not there; for the pool.

    parent: cgroup_parent of the pod: a path below the hierarchies' tops, or a systemd slice, whose name holds its parents'
    (systemd.slice(5): a-b.slice is in a.slice)."""
    if not parent:
        return {}
    if parent.endswith(".slice") and "/" not in parent:
        parts = parent.removesuffix(".slice").split("-")
        parent = "/".join("-".join(parts[: at + 1]) + ".slice" for at in range(len(parts)))
    found = cgroup.hierarchies()
    unified = cgroup.mode(found) == cgroup.UNIFIED
    folders = {}
    for hierarchy in found:
        if hierarchy.v2 != unified:
            continue
        folder = hierarchy.directory("/" + parent.strip("/"))
        if folder is not None and os.path.isdir(folder):
            for name in hierarchy.controllers or ("",):
                folders[name] = folder
    return folders


# --- the service's place on the wire


def register(server: Server, sandbox: Sandbox) -> None:
    """Serve the sandbox under the service's name. UpdateSandbox is not offered, which containerd takes for what it is."""
    handlers = (
        ("CreateSandbox", "CreateSandboxRequest", sandbox.create_sandbox),
        ("StartSandbox", "StartSandboxRequest", sandbox.start_sandbox),
        ("Platform", "PlatformRequest", sandbox.platform),
        ("StopSandbox", "StopSandboxRequest", sandbox.stop_sandbox),
        ("WaitSandbox", "WaitSandboxRequest", sandbox.wait_sandbox),
        ("SandboxStatus", "SandboxStatusRequest", sandbox.sandbox_status),
        ("PingSandbox", "PingRequest", sandbox.ping_sandbox),
        ("ShutdownSandbox", "ShutdownSandboxRequest", sandbox.shutdown_sandbox),
        ("SandboxMetrics", "SandboxMetricsRequest", sandbox.sandbox_metrics),
    )
    server.add_service(SERVICE, {method: (COROUTINE, handler, Message(pb, kind)) for method, kind, handler in handlers})
