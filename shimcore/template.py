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
_LOCK_FD = 3
_CONNECTION_FD = 64  # the lowest number that the connection may have: below are those of a daemon
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


def _adopt(request: Request) -> None:
    """Be what a process would be that the launcher's caller had made. Raises OSError."""
    for signum in (_SIGTERM, _SIGCHLD):
        _signal.signal(signum, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)
    _reaper.set_limits(request.limits)
    os.umask(request.umask)
    _write_oom_score_adj(request.oom_score_adj)
    os.fchdir(request.cwd)
    os.close(request.cwd)
    os.environ.clear()
    for line in request.environ:
        name, equals, value = os.fsdecode(line).partition("=")
        if name and equals:
            os.environ[name] = value
    os.dup2(request.stdin, 0)
    os.close(request.stdin)
    sys.argv = [sys.argv[0], *map(os.fsdecode, request.argv[1:])]
    _entitle(sys.argv[1:])


def _entitle(arguments: list[str]) -> None:
    """Show these arguments, and the environment, in /proc. Where that is not allowed, ps shows the template's."""
    sys.orig_argv = [sys.executable, "-IS", sys.argv[0], *arguments]
    args = b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv)
    env = b"".join(name + b"=" + value + b"\0" for name, value in os.environb.items())
    try:
        _reaper.set_title(args, env, os.path.basename(sys.executable)[:15])
    except OSError:
        pass


def _write_oom_score_adj(value: int) -> None:
    with open("/proc/self/oom_score_adj", "rb+", buffering=0) as file:
        if int(file.read()) != value:
            file.write(str(value).encode())


class Guard:
    """Where a fork's result goes, in the place of stdout and stderr, which are the launcher's."""

    __slots__ = ("_connection", "_sent")

    def __init__(self, connection: _socket.socket) -> None:
        self._connection: _socket.socket | None = connection
        self._sent = False
        try:
            sink = os.open("log", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)

    def release(self) -> None:
        pass

    def result(self, data: bytes) -> None:
        """The launcher's stdout; it ends with 0. Only the first result or error counts. Raises OSError when it has gone."""
        self._send(0, data, b"")

    def error(self, line: str) -> None:
        try:
            self._send(1, b"", line.encode("utf-8", "replace") + b"\n")
        except OSError:
            pass

    def printed(self) -> bool:
        """Wait until the launcher has printed the result; whether it has."""
        connection, self._connection = self._connection, None
        if connection is None:
            return False
        try:
            return bool(connection.recv(1) == daemon.PRINTED)
        except OSError:
            return False
        finally:
            connection.close()

    def _send(self, status: int, out: bytes, err: bytes) -> None:
        if self._connection is None or self._sent:
            return
        self._sent = True
        head = b"".join(number.to_bytes(4, "little") for number in (status, len(out), len(err)))
        self._connection.sendall(head + out + err)


class _Ready:
    """Tells the launcher the address once the daemon serves, and hears that it is printed; see serve._Ready."""

    __slots__ = ("_guard", "_result", "_warm")

    def __init__(self, guard: Guard, result: bytes, warm: daemon.Warm) -> None:
        self._guard = guard
        self._result = result
        self._warm = warm

    def tell(self, words: bytes) -> None:
        if words != daemon.READY:
            return  # the error that it is about is on its way to the guard
        import gc

        from .address import write_address

        write_address(self._warm.address)
        try:
            self._guard.result(self._result)
        except OSError:  # it has gone, which `confirmed` finds out
            pass
        gc.enable()

    def confirmed(self) -> None:
        if not self._guard.printed():
            raise Unavailable("the launcher has gone, and told nobody this daemon's address")


def become(cls: type[Shim], runtime_id: str, config: Config, guard: Guard, result: bytes, warm: daemon.Warm) -> None:
    """Be the daemon that daemon.spawn promised; returns when it ends. Raises what made it fail before it served."""
    from . import bootstrap, serve
    from .address import remove_socket_silently

    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        log = daemon.log_fd()
        os.dup2(null, 0)
        os.dup2(null if log is None else log, 1)  # what an author prints goes to the log, too
        os.dup2(null if log is None else log, 2)
        os.close(null)
        if log is not None:
            os.close(log)
        os.dup2(warm.listener, daemon.SOCKET_FD, inheritable=False)
        os.close(warm.listener)
        os.environ.update(warm.environ)
        _entitle(warm.arguments)
        sys.argv[1:] = warm.arguments
        invocation = bootstrap.parse_invocation(warm.arguments, os.environ)
        serve.serve(cls, runtime_id, config, invocation, _Ready(guard, result, warm))
    except BaseException:
        remove_socket_silently(warm.address)
        raise


def _rehearse() -> None:
    """Do what an action will do, as far as it leaves no trace: the pages that it writes to are this process's own then, before
    anybody waits for it."""
    import _socket

    from . import _ttrpc, bootstrap
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
    _entitle(sys.argv[1:])
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
    core = _reaper.Core("n", "")
    server = _ttrpc.Server(core)
    register(server, Task())
    RemotePublisher(core, "n")


# --- the template


class _Template:
    __slots__ = ("_cgroup", "_changes", "_directory", "_listener", "_name", "_notes", "_run", "_signals", "_spares")

    def __init__(self, directory: int, name: str, run: Callable[[Guard], None]) -> None:
        self._directory = directory
        self._name = name
        self._run = run
        self._spares: set[int] = set()
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
            self._spares.discard(int.from_bytes(data[at : at + 4], "little"))

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
        _rehearse()
        fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        _reaper.set_death_signal(0)
        try:
            os.write(self._notes[1], os.getpid().to_bytes(4, "little"))
        except OSError:  # the template has gone
            pass
        high = _dup_above(fd, _CONNECTION_FD)
        os.close(fd)
        connection = _socket.socket(fileno=high)
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
            _adopt(request)
        except (OSError, ValueError):
            connection.send(b"N")
            return
        connection.send(b"R")
        if connection.recv(1) != b"G":
            return
        connection.settimeout(None)
        daemon.warm = daemon.Warm(request.parent)
        self._run(Guard(connection))

    def _outdated(self) -> bool:
        """Whether a file has changed, which the template sees as well, and ends; or somebody has moved us to another cgroup."""
        from select import POLLIN, poll

        poller = poll()
        poller.register(self._changes, POLLIN)
        return bool(poller.poll(0)) or _cgroup() != self._cgroup

    def _close_own(self) -> None:
        self._listener.close()
        for fd in (self._directory, self._changes, *self._notes, *self._signals):
            os.close(fd)


def _dup_above(fd: int, lowest: int) -> int:
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    return fcntl(fd, F_DUPFD_CLOEXEC, lowest)


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
    sys.argv[1:] = []
    try:
        cls = load(shim)
        cls.preload()
        _import_all()
        _check_own({0, 1, 2, _LOCK_FD, directory})
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


def _import_all() -> None:
    """What the actions import when they get there, now."""
    import _socket  # noqa: F401
    import faulthandler  # noqa: F401
    import fcntl  # noqa: F401
    import select  # noqa: F401
    import struct  # noqa: F401

    for name in (
        "_ttrpc", "address", "bootstrap", "cgroup", "debug", "jobs", "ledger", "logger", "mount", "publisher", "serve", "task",
        "util", "protos.task_pb2",
    ):  # fmt: skip
        __import__(f"{__package__}.{name}")
