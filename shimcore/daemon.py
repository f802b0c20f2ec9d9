"""The daemon: made by `start`, from this same executable.

The parent binds the listener, so there is no race for the address and connections queue in the backlog at once; the child gets
it as SOCKET_FD. Over a socketpair the child tells its parent that it serves, or with which words it ended, so that `start` never
prints the address of a daemon that is dead already; and the parent tells the child once the address is printed, so that no daemon
lives on whose address nobody was told, since containerd had killed `start`.
"""

from __future__ import annotations

import os
import sys

from . import _reaper, address
from .errors import DeadlineExceeded, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterable

    from .bootstrap import StartOpts

SOCKET_FD = 3
_READY_FD = 4
READY_ENV = "SHIMCORE_READY_FD"
READY = b"R"
PRINTED = b"P"
# A daemon that neither serves nor ends. containerd's own limit on `start` is its caller's, often none.
READY_TIMEOUT = 60.0
_MESSAGE_MAX = 65536


class Warm:
    """In a fork that acts (forked.py): who ran the shim; once `spawn` was called, the daemon that this process is to become."""

    __slots__ = ("address", "arguments", "bound", "caller", "environ", "listener", "template")

    def __init__(self, caller: int, bound: Callable[[str, float], None] | None = None, template: int = -1) -> None:
        self.caller = caller
        self.bound = bound  # told the address, and spawn's ready_timeout
        self.template = template  # an fd to it, or -1
        self.listener = -1
        self.address = ""
        self.arguments: list[str] = []
        self.environ: dict[str, str] = {}

    def became(self) -> None:
        """This process is a daemon from now on: the template, if there is one, is told."""
        if self.template >= 0:
            tell_template(self.template, DAEMON)
            os.close(self.template)
            self.template = -1


DAEMON = 1 << 31  # beside a pid: it is a daemon now; without it, it has been asked


def tell_template(fd: int, what: int = 0) -> None:
    try:
        os.write(fd, (os.getpid() | what).to_bytes(4, "little"))
    except OSError:  # it has gone
        pass


warm: Warm | None = None

STACK = 512 * 1024  # bytes, of each thread
_idle: list[tuple[LockType, list[Callable[[], object]]]] = []


def make_threads(count: int) -> None:
    """Have this many threads wait for start_thread, with what a thread allocates first."""
    from _thread import allocate_lock, stack_size, start_new_thread

    def wait(lock: LockType, bodies: list[Callable[[], object]]) -> None:
        bytes(4096)  # by malloc, which makes a heap for its thread
        lock.acquire()
        bodies.pop()()

    _widen()
    stack_size(STACK)
    for _ in range(count):
        lock = allocate_lock()
        lock.acquire()
        bodies: list[Callable[[], object]] = []
        start_new_thread(wait, (lock, bodies))
        _idle.append((lock, bodies))


def _widen() -> None:
    """Room for a shim's fds: a table that threads share already takes the kernel milliseconds to enlarge."""
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    try:
        os.close(fcntl(0, F_DUPFD_CLOEXEC, 255))
    except OSError:  # a lower limit
        pass


def start_thread(body: Callable[[], object]) -> None:
    """Run it on a thread of its own. Raises RuntimeError when none can be made."""
    from _thread import stack_size, start_new_thread

    if _idle:
        lock, bodies = _idle.pop()
        bodies.append(body)
        lock.release()
    else:
        stack_size(STACK)
        start_new_thread(body, ())


_unprinted: list[int] = []  # sockets to daemons whose addresses are still to be printed


def printed() -> None:
    """`start` has printed its result: the daemons that it made stay."""
    while _unprinted:
        fd = _unprinted.pop()
        try:
            os.write(fd, PRINTED)
        except OSError:
            pass  # it has ended already
        os.close(fd)


def caller() -> int:
    """Pid of the process that ran this shim's binary: containerd's, where containerd did."""
    return warm.caller if warm is not None else os.getppid()


def command() -> list[str]:
    """How this process was started, without its arguments: the interpreter, its options and the script."""
    head = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return [sys.executable, *head[1:]]


def log_fd() -> int | None:
    """The write end of the bundle's log FIFO, for the daemon's stderr; None: nobody reads it."""
    try:
        return os.open("log", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None


def _pair() -> tuple[int, int]:
    import _socket

    return tuple(end.detach() for end in _socket.socketpair())  # type: ignore[return-value]


def _wait_ready(ready: int, timeout: float) -> tuple[bool, str]:
    """(it serves, its last words) from the socketpair. Raises DeadlineExceeded."""
    from select import POLLIN, poll

    poller = poll()
    poller.register(ready, POLLIN)
    words = b""
    while len(words) < _MESSAGE_MAX:
        if not poller.poll(timeout * 1000):
            raise DeadlineExceeded(f"the daemon neither served nor ended within {timeout:g} s")
        piece = os.read(ready, _MESSAGE_MAX)
        if piece == READY and not words:
            return True, ""
        if not piece:
            break
        words += piece
    return False, words.decode("utf-8", "replace").strip()


def spawn(
    opts: StartOpts, grouping: str = "", vars: Iterable[tuple[str, str]] = (), *, ready_timeout: float = READY_TIMEOUT
) -> tuple[int, str]:
    """Make the daemon that serves this container, or find the one that does; write the file `address`; return (pid, address).

    grouping: what stands for the id in the socket's name, so that one daemon serves a whole group; "" is opts.id. vars: more
    environment for the daemon. pid is 0 when a live daemon was found under the address. In a fork that acts (forked.py), as run()
    mostly makes one, it is this process's own, which becomes the daemon when start_shim has returned.

    The daemon leads a session of its own; its stdin and stdout are /dev/null, its stderr is the bundle's log. It has been
    serving when this returns, and ends again when this process ends without having printed the address, as run() does. Raises
    Unavailable with the daemon's own words when it ends before it serves, DeadlineExceeded when it does not get there in
    ready_timeout seconds, and what address.bind_or_reuse raises.
    """
    socket_dir = opts.socket_dir or address.SOCKET_DIR
    where = address.socket_address(opts.address, opts.namespace, grouping or opts.id, socket_dir=socket_dir)
    address.note_socket_dir(socket_dir)
    listener, reused = address.bind_or_reuse(where)
    if reused or listener is None:
        address.write_address(where)
        return 0, where
    pid = 0
    pidfd = ready = told = -1
    arguments = ["-namespace", opts.namespace, "-id", opts.id, "-address", opts.address, *(["-debug"] if opts.debug else [])]
    if warm is not None and warm.listener < 0:
        warm.listener, warm.address, warm.arguments = listener, where, arguments
        warm.environ = {**dict(vars), "TTRPC_ADDRESS": opts.ttrpc_address}
        if warm.bound is not None:
            warm.bound(where, ready_timeout)
        return os.getpid(), where
    log = log_fd()
    try:
        ready, told = _pair()
        argv = [*command(), *arguments]
        fds = {SOCKET_FD: listener, _READY_FD: told}
        if log is not None:
            fds[2] = log
        env = {**os.environ, **dict(vars), "TTRPC_ADDRESS": opts.ttrpc_address, READY_ENV: str(_READY_FD)}
        pid, pidfd = _reaper.spawn(argv, env=env, fds=fds, new_session=True)
        os.close(told)
        told = -1
        serves, words = _wait_ready(ready, ready_timeout)
        if not serves:
            raise Unavailable(words or "the daemon ended before it served, without a word")
        address.write_address(where)
        _unprinted.append(ready)
        ready = -1
    except BaseException:
        if pidfd >= 0:
            try:
                _reaper.pidfd_send_signal(pidfd, 9)
            except OSError:
                pass
        address.remove_socket_silently(where)
        raise
    finally:
        for fd in (listener, log, ready, told, pidfd):
            if fd is not None and fd >= 0:
                os.close(fd)
    return pid, where
