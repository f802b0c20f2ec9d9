"""The warm template: a process that has imported all that a shim needs, and forks once for each action of the shim's binary.

The other end is launcher/launcher.c, which is what is installed under the shim's name; docs/template.md describes both and says
what a fork has from its caller and what from here. This process has one thread and runs no author code but imports. It listens
through its spares: forks made in advance, each of which takes one launcher's request and does what it asks; one that is to be a
daemon becomes it. So no fork, and no copy of a page table, is on the way of a start.

It ends when nobody has asked for IDLE seconds, on SIGTERM, and when the code on disk is no longer what it has loaded. Those who
come then do without it, and the first of them starts another.
"""

from __future__ import annotations

import os
import sys

from . import _reaper, daemon
from .errors import FailedPrecondition, Unavailable
from .forked import Guard, entitle, raised
from .shim import print_to_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal as _signal
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .bootstrap import Config
    from .shim import Shim
else:
    import _signal  # the module signal wraps it in enums

IDLE = 600.0  # seconds; SHIMCORE_TEMPLATE_IDLE
SPARES = 3
REFILL = 0.02  # seconds after a request until its spare is replaced: its action goes first, where there are few cores
BACKLOG = 128
REQUEST_TIMEOUT = 5.0  # seconds that a launcher has for its request, and for its "go"
REQUEST_MAX = 8 << 20
REHEARSALS = 40  # CPython 3.11 specialises a function that was called 8 times, an instruction of it some runs later
_LOCK_FD = 3
_LIMITS = 16

_SIGTERM, _SIGCHLD, _SIGKILL = 15, 17, 9


class Request:
    """What a launcher has sent; see make_request there."""

    __slots__ = ("argv", "cwd", "environ", "limits", "oom_score_adj", "parent", "stdin", "umask")

    def __init__(self, data: bytes, stdin: int, cwd: int) -> None:
        numbers = [int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(0, 8 * (3 + 2 * _LIMITS), 8)]
        self.umask, self.oom_score_adj, self.parent = numbers[:3]
        self.limits = [(numbers[at], numbers[at + 1]) for at in range(3, len(numbers), 2)]
        rest = data[8 * len(numbers) :]
        self.argv, rest = _texts(rest)
        self.environ, _ = _texts(rest)
        self.stdin = stdin
        self.cwd = cwd


def _texts(data: bytes) -> tuple[list[bytes], bytes]:
    count = int.from_bytes(data[:8], "little")
    parts = data[8:].split(b"\0", count)
    if len(parts) != count + 1:
        raise ValueError("a request that is cut")
    return parts[:-1], parts[-1]


def _receive(connection: _socket.socket) -> Request:
    """Raises OSError, ValueError."""
    import _socket

    data, control, _, _ = connection.recvmsg(65536, 256)
    fds: list[int] = []
    for level, kind, body in control:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += [int.from_bytes(body[at : at + 4], "little") for at in range(0, len(body) - 3, 4)]
    if len(fds) != 2:
        raise ValueError(f"{len(fds)} fds where two were due")
    length = int.from_bytes(data[:8], "little") + 8
    if not 8 < length <= REQUEST_MAX:
        raise ValueError("a request of no sensible length")
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ValueError("a request that is cut")
        data += piece
    return Request(data[8:], *fds)


# --- a fork


def _take_over(request: Request) -> None:
    """What may be refused of what a process would be that the launcher's caller had made. Raises OSError."""
    for signum in (_SIGTERM, _SIGCHLD):
        _signal.signal(signum, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)
    _reaper.set_limits(request.limits)
    _write_oom_score_adj(request.oom_score_adj)
    os.fchdir(request.cwd)
    os.close(request.cwd)


def _dress(request: Request) -> None:
    """The rest of it."""
    os.umask(request.umask)
    os.dup2(request.stdin, 0)
    os.close(request.stdin)
    pairs = [(name, value) for name, equals, value in [line.partition(b"=") for line in request.environ] if name and equals]
    _reaper.set_environment(b"".join(name + b"=" + value + b"\0" for name, value in pairs))
    known: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]  # its methods would tell libc one by one
    known.clear()
    known.update(pairs)
    arguments = [os.fsdecode(word) for word in request.argv[1:]]
    entitle(arguments, show=arguments[-1:] != ["start"])  # ps is told by the daemon that it becomes in a millisecond


def _write_oom_score_adj(value: int) -> None:
    with open("/proc/self/oom_score_adj", "rb+", buffering=0) as file:
        if int(file.read()) != value:
            file.write(str(value).encode())


def _rehearse(spare: bool) -> None:
    """Do what an action will do, as far as it leaves no trace. In the template that has the interpreter specialise the code, so
    that no fork does; in a spare, the pages that an action writes to are its own before anybody waits for it."""
    import _socket

    from . import _ttrpc, bootstrap
    from .address import socket_address
    from .publisher import RemotePublisher
    from .task import Task, register
    from .util import json_loads

    here, there = _socket.socketpair()
    for end in (here, there):
        end.settimeout(REQUEST_TIMEOUT)
    numbers = [os.umask(0o022), 0, 0, *[-1] * (2 * _LIMITS)]
    os.umask(numbers[0])
    texts = [[b"shim", b"-namespace", b"n"], [name + b"=" + value for name, value in os.environb.items()]]
    body = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
    body += b"".join(len(list).to_bytes(8, "little") + b"".join(text + b"\0" for text in list) for list in texts)
    there.sendmsg([len(body).to_bytes(8, "little") + body], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"\1\0\0\0\2\0\0\0")])
    request = _receive(here)
    if spare:
        entitle(sys.argv[1:])
    _reaper.set_limits([])
    for fd in (request.stdin, request.cwd):
        os.close(fd)
    there.close()
    here.close()
    json_loads('{"annotations": {"a": "b"}, "process": {"args": ["a"], "env": ["A=b"]}, "mounts": [1, 2.5, true, null]}')
    arguments = ["-namespace", "n", "-id", "i", "-address", "/a", "start"]
    invocation = bootstrap.parse_invocation(arguments, {"TTRPC_ADDRESS": "/t"})
    invocation.start_opts()
    bootstrap.encode_address("unix:///a", invocation.generation)
    socket_address("/a", "n", "i")
    core = _reaper.Core("n", "")
    server = _ttrpc.Server(core)
    register(server, Task())
    RemotePublisher(core, "n")


# --- the template


class _Template:
    __slots__ = (
        "_cgroup", "_changes", "_daemons", "_directory", "_listener", "_name", "_notes", "_run", "_signals", "_spares",
        "_written",
    )  # fmt: skip

    def __init__(self, directory: int, name: str, run: Callable[[Guard], None]) -> None:
        self._directory = directory
        self._name = name
        self._run = run
        self._spares: set[int] = set()
        self._daemons: list[int] = []  # those that were spares, until we know what they write to
        self._written: bytes | None = None  # the pages that a daemon writes to in its first moments
        self._cgroup = _cgroup()
        # Readable once a file that we have loaded has changed; shared with the spares, and read by nobody.
        self._changes = _reaper.watch_files(_loaded_files())
        self._notes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # the pids of spares that have been asked
        self._signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listener = self._listen()

    def _path(self, suffix: str) -> str:
        return f"/proc/self/fd/{self._directory}/{self._name}{suffix}"

    def _listen(self) -> _socket.socket:
        import _socket

        try:
            os.unlink(self._name + ".sock", dir_fd=self._directory)
        except FileNotFoundError:
            pass
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(self._path(".sock"))
        listener.listen(BACKLOG)
        return listener

    def serve(self, idle: float) -> None:
        """Until it is to end."""
        from select import POLLIN, poll

        stop = False

        def on_signal(signum: int, _: Any) -> None:
            nonlocal stop
            stop = stop or signum == _SIGTERM

        for signum in (_SIGTERM, _SIGCHLD):
            _signal.signal(signum, on_signal)
        _signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        poller = poll()
        poller.register(self._notes[0], POLLIN)
        poller.register(self._signals[0], POLLIN)
        poller.register(self._changes, POLLIN)
        last = _now() - REFILL
        while not stop:
            now = _now()
            while len(self._spares) < SPARES and (not self._spares or now - last >= REFILL):
                self._learn()
                self._fork()
            left = last + idle - now
            if left <= 0:
                break
            for fd, _ in poller.poll(1000 * (left if len(self._spares) == SPARES else REFILL)):
                if fd == self._changes:
                    stop = True
                elif fd == self._notes[0]:
                    last = _now()
                    self._take_notes()
                else:
                    os.read(fd, 4096)
                    self._bury()

    def _take_notes(self) -> None:
        data = os.read(self._notes[0], 4 * 1024)
        for at in range(0, len(data), 4):
            pid = int.from_bytes(data[at : at + 4], "little")
            self._spares.discard(pid)
            if pid & daemon.DAEMON and self._written is None:
                self._daemons.append(pid & ~daemon.DAEMON)

    def _learn(self) -> None:
        """Which pages a start writes to: spares that are made from now on have them, and wait for no copy then."""
        while self._daemons and self._written is None:
            try:
                self._written = _reaper.written_pages(self._daemons.pop()) or None  # none: it has ended
            except OSError:  # it has gone
                pass
        self._daemons.clear()

    def _bury(self) -> None:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._spares.discard(pid)

    def end(self) -> None:
        """Nobody connects any more; spares that nobody has asked end with this process."""
        try:
            os.unlink(self._name + ".sock", dir_fd=self._directory)
        except OSError:
            pass

    def _fork(self) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._spares.add(pid)
            return
        try:
            self._be_spare(parent)
        finally:
            os._exit(1)

    def _be_spare(self, parent: int) -> None:
        import _socket
        from struct import unpack

        _reaper.set_death_signal(_SIGKILL)
        if os.getppid() != parent:
            return
        _rehearse(True)
        # Now: a session has a scheduling group of its own (sched(7), autogroup), and who enters a new one waits for its turn.
        os.setsid()
        daemon.make_threads(2)
        if self._written:
            try:
                _reaper.own_pages(self._written)
            except OSError:  # an older kernel: each is copied when it is written to
                pass
        fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        _reaper.set_death_signal(0)
        daemon.tell_template(self._notes[1])
        connection = _socket.socket(fileno=raised(fd))
        _, uid, _ = unpack("3i", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            return
        connection.settimeout(REQUEST_TIMEOUT)
        request = _receive(connection)
        if self._outdated():
            connection.send(b"S")
            return
        self._close_own()
        try:
            _take_over(request)
        except OSError:
            connection.send(b"N")
            return
        connection.send(b"R")
        _dress(request)  # while the launcher thinks
        if connection.recv(1) != b"G":
            return
        connection.settimeout(None)
        if sys.argv[-1] == "start":
            daemon.warm = daemon.Warm(request.parent, template=self._notes[1])
        else:  # no daemon comes of it
            os.close(self._notes[1])
            daemon.warm = daemon.Warm(request.parent)
        print_to_log()
        self._run(Guard(connection))

    def _outdated(self) -> bool:
        """Whether a file has changed, which the template sees as well, and ends; or somebody has moved us to another cgroup."""
        from select import POLLIN, poll

        poller = poll()
        poller.register(self._changes, POLLIN)
        return bool(poller.poll(0)) or _cgroup() != self._cgroup

    def _close_own(self) -> None:
        self._listener.close()
        for fd in (self._directory, self._changes, self._notes[0], *self._signals):
            os.close(fd)


def _now() -> float:
    from time import monotonic

    return monotonic()


def _cgroup() -> bytes:
    with open("/proc/self/cgroup", "rb", buffering=0) as file:
        return file.readall()


def _loaded_files() -> list[str]:
    """The file of every module that has one."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return [path for path in files if isinstance(path, str) and os.path.exists(path)]


def _refuse(directory: int, name: str, reason: str) -> NoReturn:
    """Leave a word on why there will be no template, so that nobody starts another one in vain."""
    fd = os.open(name + ".no", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=directory)
    os.write(fd, reason.encode("utf-8", "backslashreplace") + b"\n")
    os.close(fd)
    os._exit(1)


def _check_own(allowed: set[int]) -> None:
    """No thread and no fd but those that this process has made itself: a fork would share or lose them. Raises
    FailedPrecondition."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise FailedPrecondition(f"the shim's module makes threads when it is imported: {threads - 1}")
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in allowed:
            try:
                what = os.readlink(f"/proc/self/fd/{name}")
            except OSError:  # listdir's own
                continue
            raise FailedPrecondition(f"the shim's module opens files when it is imported: {what}")


def main(runtime_id: str, shim: type[Shim] | str, config: Config, arguments: list[str]) -> NoReturn:
    """Be the template. arguments: the directory and the name that the launcher has computed. Its lock is fd 3."""
    import gc

    from .shim import act, load

    path, name = arguments
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise Unavailable(f"{path} is not a directory of ours alone")
    os.set_inheritable(_LOCK_FD, False)
    os.chdir("/")
    sys.orig_argv = daemon.command()
    sys.argv[1:] = []
    _reaper.bound_malloc()
    try:
        cls = load(shim)
        cls.preload()
        import_all()
        _check_own({0, 1, 2, _LOCK_FD, directory})
        for _ in range(REHEARSALS):
            _rehearse(False)
    except BaseException as error:
        _refuse(directory, name, f"{type(error).__name__}: {error}")
    idle = os.environ.get("SHIMCORE_TEMPLATE_IDLE", "")
    gc.collect()
    gc.freeze()
    gc.disable()
    template = _Template(directory, name, lambda guard: act(runtime_id, cls, config, guard))
    os.close(_LOCK_FD)
    try:
        template.serve(float(idle) if idle.replace(".", "", 1).isdigit() else IDLE)
    finally:
        template.end()
        os._exit(0)


def import_all() -> None:
    """What the actions import when they get there, now."""
    import _socket  # noqa: F401
    import faulthandler  # noqa: F401
    import fcntl  # noqa: F401
    import select  # noqa: F401
    import struct  # noqa: F401

    for name in (
        "_ttrpc", "address", "bootstrap", "cgroup", "debug", "jobs", "ledger", "logger", "mount", "publisher", "serve", "task",
        "upgrade", "util", "protos.task_pb2",
    ):  # fmt: skip
        __import__(f"{__package__}.{name}")
