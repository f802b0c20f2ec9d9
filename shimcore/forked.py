"""The process that does an action while another one speaks to whoever ran the shim: a fork of the template, with the launcher
as the other one, or, without a template, the fork that `start` is divided into. Both sides of the latter are here.

The one that acts can so become the daemon when it has started: no second interpreter is booted, and the other one prints the
result once it serves. What goes over the connection: exit status, length of what goes to stdout and of what goes to stderr, 4
bytes each, then both; and back, when that is printed, daemon.PRINTED.
"""

from __future__ import annotations

import os
import sys

from . import _reaper, daemon
from .errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

    from .bootstrap import Config
    from .shim import Shim

RESULT_TIMEOUT = 90.0  # seconds; the launcher's, too
_CONNECTION_FD = 64  # the lowest number that the connection may have: below are those of a daemon
_SIGKILL = 9


def entitle(arguments: list[str], show: bool = True) -> None:
    """Have these arguments, here and, with `show`, in /proc, where the environment is shown, too. Where that is not allowed, ps
    shows what was there before."""
    sys.orig_argv = [*daemon.command(), *arguments]
    sys.argv[1:] = arguments
    if not show:
        return
    args = b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv)
    env = b"".join(name + b"=" + value + b"\0" for name, value in os.environb.items())
    try:
        _reaper.set_title(args, env, os.path.basename(sys.executable)[:15])
    except OSError:
        pass


def raised(fd: int) -> int:
    """The same connection under a number that no daemon needs. Raises OSError."""
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    high = fcntl(fd, F_DUPFD_CLOEXEC, _CONNECTION_FD)
    os.close(fd)
    return high


class Guard:
    """Where a fork's result goes: stdout and stderr, which are the launcher's, are the log."""

    __slots__ = ("_connection", "_sent")

    def __init__(self, connection: _socket.socket) -> None:
        self._connection: _socket.socket | None = connection
        self._sent = False

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
        self._connection.sendall(_message(status, out, err))


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
        from .address import write_address

        write_address(self._warm.address)
        try:
            self._guard.result(self._result)
        except OSError:  # it has gone, which `confirmed` finds out
            pass

    def confirmed(self) -> None:
        if not self._guard.printed():
            raise Unavailable("the launcher has gone, and told nobody this daemon's address")


def become(cls: type[Shim], runtime_id: str, config: Config, guard: Guard, result: bytes, warm: daemon.Warm) -> None:
    """Be the daemon that daemon.spawn promised; returns when it ends. Raises what made it fail before it served."""
    from . import bootstrap, serve
    from .address import remove_socket_silently

    try:
        if os.getsid(0) != os.getpid():  # a spare of the template's has one already
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
        warm.became()
        os.environ.update(warm.environ)
        entitle(warm.arguments)
        invocation = bootstrap.parse_invocation(warm.arguments, os.environ)
        serve.serve(cls, runtime_id, config, invocation, _Ready(guard, result, warm))
    except BaseException:
        remove_socket_silently(warm.address)
        raise


# --- without a template


_BOUND = 0xFFFFFFFF  # in the place of a status: not a result yet; an address is bound, and so many seconds are allowed from now


def divide(runtime_id: str, out: int, err: int) -> Guard:
    """Fork. The child returns, as the one that acts; this process prints its result to the fds `out` and `err`, and ends as it
    says. Only for a process with one thread, and before any code of an author's, since the child keeps no other fd."""
    import _socket

    caller = os.getppid()
    here, there = _socket.socketpair()
    pid = os.fork()
    if pid:
        there.close()
        _relay(here, pid, runtime_id, out, err)
    try:
        connection = _socket.socket(fileno=raised(there.detach()))
        here.close()
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        _reaper.bound_malloc()

        def bound(address: str, timeout: float) -> None:
            connection.sendall(_message(_BOUND, address.encode(), repr(timeout).encode()))

        daemon.warm = daemon.Warm(caller, bound)
        return Guard(connection)
    except BaseException:
        os._exit(1)


def _message(status: int, out: bytes, err: bytes) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (status, len(out), len(err))) + out + err


def _read_message(connection: _socket.socket) -> tuple[int, bytes, bytes]:
    """Raises Unavailable when the other one has ended, TimeoutError."""

    def read(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                raise Unavailable("the daemon ended before it served, without a word")
            data += piece
        return data

    head = read(12)
    status, out, err = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4, 8))
    return status, read(out), read(err)


def _relay(connection: _socket.socket, pid: int, runtime_id: str, out: int, err: int) -> NoReturn:
    status, limit, address = 1, RESULT_TIMEOUT, ""
    try:
        connection.settimeout(limit)
        wanted, words, more = _read_message(connection)
        if wanted == _BOUND:
            address, limit = words.decode(), float(more)
            connection.settimeout(limit)
            wanted, words, more = _read_message(connection)
        _print(out, words)
        _print(err, more)
        status = wanted
        connection.send(daemon.PRINTED)
    except TimeoutError:
        os.kill(pid, _SIGKILL)  # our child, which nobody has waited for: the pid is its own
        _fail(err, f"{runtime_id}: the daemon neither served nor ended within {limit:g} s", address)
    except Unavailable as error:
        _fail(err, f"{runtime_id}: {error}", address)
    except OSError:  # whoever ran us reads no more, and the child sees that; or it has ended, and needs no answer
        pass
    finally:
        os._exit(status)


def _fail(err: int, line: str, address: str) -> None:
    """Say it, and remove the socket of a daemon that could not."""
    if address:
        from .address import remove_socket_silently

        remove_socket_silently(address)
    try:
        _print(err, line.encode() + b"\n")
    except OSError:
        pass


def _print(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
