"""Being asked about oneself: the listener for it. The answers are dump.py's, which is imported when somebody asks."""

from __future__ import annotations

import os
import stat
import time

from . import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from _thread import LockType

    from ._reaper import Core
    from ._ttrpc import Server
    from .flags import Flags
    from .task import Task


class Debug:
    """Whom the answers are about, and the socket to ask on.

    socket: path of the task socket; "": it has none, so there is no debug socket either. bundle: absolute path of the first
    container's bundle."""

    __slots__ = (
        "_listener", "bundle", "core", "ending", "followers", "id", "namespace", "runtime_id", "server", "socket", "started",
        "task",
    )  # fmt: skip

    def __init__(
        self, core: Core, server: Server, task: Task, *, runtime_id: str, flags: Flags, bundle: str, socket: str
    ) -> None:
        self.core = core
        self.server = server
        self.task = task
        self.runtime_id = runtime_id
        self.namespace = flags.namespace
        self.id = flags.id
        self.bundle = bundle
        self.socket = socket
        self.started = time.time()
        self._listener: _socket.socket | None = None
        self.followers: list[LockType] = []  # held while somebody is being told what is new
        self.ending = False

    @property
    def fd(self) -> int:
        """The listener's, -1: there is none."""
        return -1 if self._listener is None else self._listener.fileno()

    def adopt(self, fd: int) -> None:
        """Listen on a debug socket of this shim's that is open."""
        import _socket

        self._listener = _socket.socket(fileno=fd)
        self._listener.setblocking(False)
        self.core.ask_fd(fd)

    def listen(self) -> None:
        """Bind the debug socket. A shim serves without one where it can't be had, and logs that."""
        import _socket

        from .address import DEBUG_SUFFIX, start_listener

        if not self.socket:
            return
        path = self.socket + DEBUG_SUFFIX
        try:
            # Who owns the task socket owns this name: what is there is a dead shim's.
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        except OSError:
            pass
        try:
            self._listener = _socket.socket(fileno=start_listener("unix://" + path))
            self._listener.setblocking(False)
            self.core.ask_fd(self._listener.fileno())
        except Exception as error:  # no room on the disk, no fd, too long a path: nothing that a container needs
            logger.warn("no debug socket", path=path, error=str(error))

    def asked(self) -> None:
        """Somebody waits at the socket."""
        self.core.pool.submit(self._answer)

    def _answer(self) -> None:
        from . import dump

        if self._listener is not None:
            dump.answer(self, self._listener)

    def write(self) -> None:
        """Write the dump into the bundle."""
        self.core.pool.submit(self._write)

    def _write(self) -> None:
        from . import dump

        dump.write_dump(self)

    def close(self) -> None:
        """Before the task socket goes, with which the name becomes free for another shim."""
        if self._listener is None:
            return
        from .address import DEBUG_SUFFIX

        self.core.ask_fd(-1)
        try:
            os.unlink(self.socket + DEBUG_SUFFIX)
        except OSError:
            pass
        if self.followers:
            from .follow import end

            end(self)
        # Left open: a thread of the pool may be accepting on it, and the process is about to end.


CRASH_FILE = "shim.crash"
CRASH_MAX = 65536  # bytes, beyond which no more tracebacks are added

_crash_fd = -1


def watch_for_crashes(bundle: str) -> None:
    """Have a traceback written to `shim.crash` in the bundle when a signal such as SIGSEGV ends the process, and by `report`."""
    global _crash_fd
    import faulthandler

    try:
        _crash_fd = os.open(os.path.join(bundle, CRASH_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warn("crashes will leave no traceback", error=error.strerror)
    else:
        faulthandler.enable(_crash_fd)


def no_crash(bundle: str) -> None:
    """The shim ends as it should: the file goes, unless something was reported."""
    try:
        if _crash_fd >= 0 and os.fstat(_crash_fd).st_size == 0:
            os.unlink(os.path.join(bundle, CRASH_FILE))
    except OSError:
        pass


def report(error: BaseException, where: str) -> None:
    """Log an error that no code expected, and add its traceback to the crash file. Never raises."""
    try:
        logger.error("an error that was not expected", where=where, error=f"{type(error).__name__}: {error}")
        if _crash_fd < 0 or os.fstat(_crash_fd).st_size > CRASH_MAX:
            return
        from traceback import format_exception

        head = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}, {where}:\n"
        text = head + "".join(format_exception(error)) + "\n"
        os.write(_crash_fd, text.encode("utf-8", "backslashreplace")[:CRASH_MAX])
    except Exception:
        pass
