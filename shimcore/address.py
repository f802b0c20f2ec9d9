"""The shim's address: its name, the listener behind it, and the file that tells containerd of it.

The name is a hash, since a unix socket's path is at most 107 bytes and namespaces and ids are not (unix(7));
two starts that hash the same are the same group, and the second is answered with the first's address.

A socket that is bound but does not listen yet refuses connections just as a dead one's file does. So binding,
listening and the probe of an address in use are done under a lock on the directory: without it two starts of
one group at the same moment can each take the other's socket for a dead one. The lock is held for
microseconds and no author's code runs under it.
"""

from __future__ import annotations

import os
import stat
from errno import EADDRINUSE, EAGAIN, ECONNREFUSED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOENT, ENOMEM, ENOTSOCK

from .errors import AlreadyExists, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket as _socket

SOCKET_DIR = "/run/containerd/s"
ADDRESS_FILE = "address"
BOOTSTRAP_FILE = "bootstrap.json"  # of containerd 2: what `start` answered, or would have
SOCKET_DIR_FILE = "socket_dir"
DEBUG_SUFFIX = ".debug"  # what is added to the task socket's path for the socket that debug.py listens on
# Go's shim refuses a longer one: 108 bytes of sun_path, less the NUL and one to spare.
MAX_PATH = 106
BACKLOG = 4096

UNIX, ABSTRACT, VSOCK, HVSOCK = "unix", "abstract", "vsock", "hvsock"


# --- names


def _digest(path: str, namespace: str, id: str) -> str:
    # As Go joins paths: empty parts left out, then cleaned.
    joined = os.path.normpath("/".join([part for part in (path, namespace, id) if part]) or ".")
    if joined.startswith("//"):  # POSIX keeps two leading slashes, Go does not
        joined = joined[1:]
    return sha256_hex(os.fsencode(joined))


def sha256_hex(data: bytes) -> str:
    """Without hashlib where that can be: it loads OpenSSL."""
    try:
        from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]  # up to 3.11
    except ImportError:
        try:
            from _sha2 import sha256  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            from hashlib import sha256
    return str(sha256(data).hexdigest())


def socket_address(path: str, namespace: str, id: str, *, socket_dir: str = SOCKET_DIR) -> str:
    """Address of the shim of a container or group: unix://<socket_dir>/<sha256 hex of path/namespace/id>.

    path: containerd's gRPC address (-address); id: the container's, or its group's. socket_dir:
    BootstrapParams.socket_dir from containerd 2.3 on. Source: SocketAddress in containerd's shim package.
    """
    return f"unix://{socket_dir.rstrip('/')}/{_digest(path, namespace, id)}"


def pipe_address(path: str, namespace: str, id: str) -> str:
    """Windows: name of the pipe that a shim serves on, by the same hash. Pure; source: socket_address in the
    Rust crate.
    """
    return rf"\\.\pipe\containerd-shim-{_digest(path, namespace, id)}-pipe"


def parse_sockaddr(address: str) -> tuple[str, str]:
    """(kind, rest): ("unix", path), ("vsock", "cid:port"), ("hvsock", "path:port"), or ("abstract", name)
    without a scheme.

    Raises InvalidArgument for another scheme, an empty rest or a NUL. Source: AnonDialer in containerd's shim
    package.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        # Some callers name abstract sockets as they are printed or passed to bind(2).
        kind, rest = ABSTRACT, address.removeprefix("\0")
    elif scheme in (UNIX, VSOCK, HVSOCK):
        kind = scheme
    else:
        raise InvalidArgument(f"unknown scheme of address {address!r}")
    if not rest or "\0" in rest:
        raise InvalidArgument(f"bad address {address!r}")
    return kind, rest


def _local_name(address: str) -> tuple[str | None, bytes]:
    """(path or None when abstract, what bind(2) and connect(2) take)."""
    kind, rest = parse_sockaddr(address)
    name = os.fsencode(rest)
    if kind not in (UNIX, ABSTRACT):
        raise InvalidArgument(f"not a unix socket: {address!r}")
    if len(name) > MAX_PATH:
        raise InvalidArgument(f"socket path of {len(name)} bytes is longer than {MAX_PATH}: {rest}")
    return (rest, name) if kind == UNIX else (None, b"\0" + name)


# --- the listener


def _new_socket(flags: int = 0) -> _socket.socket:
    import _socket

    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | flags)  # type: ignore[return-value]


def _make_parents(path: str) -> None:
    """mkdir -p of the path's directory; what is made is 0700 whatever the umask, what is there is left alone.
    """
    parent = os.path.dirname(path)
    if not parent:
        return
    try:
        os.mkdir(parent, 0o700)
    except FileExistsError:
        if not os.path.isdir(parent):
            raise
        return
    except FileNotFoundError:
        _make_parents(parent)
        os.mkdir(parent, 0o700)
    if stat.S_IMODE(os.lstat(parent).st_mode) != 0o700:
        os.chmod(parent, 0o700)


class _Lock:
    """An exclusive flock(2) on the directory of a socket; nothing for an abstract one."""

    __slots__ = ("_fd",)

    def __init__(self, path: str | None) -> None:
        self._fd = -1
        if path is None:
            return
        from fcntl import LOCK_EX, flock

        self._fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flock(self._fd, LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _in_use(path: str | None, address: str) -> Exception:
    if path is not None:
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            mode = stat.S_IFSOCK
        if not stat.S_ISSOCK(mode):
            return AlreadyExists(f"cannot listen on {path}: a file that is not a socket is there")
    return OSError(EADDRINUSE, os.strerror(EADDRINUSE), address)


def _listen(path: str | None, name: bytes, address: str) -> int:
    sock = _new_socket()
    try:
        if path is not None:
            # The mode of the file that bind makes is the socket inode's less the umask (unix(7) has it only
            # for BSD's sake): set before, it leaves no moment in which others may connect.
            os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(name)
        except OSError as error:
            if error.errno == EADDRINUSE:
                raise _in_use(path, address) from None
            raise OSError(error.errno, os.strerror(error.errno or 0), path or address) from None
        if path is not None and stat.S_IMODE(os.lstat(path).st_mode) != 0o600:
            os.chmod(path, 0o600)  # the umask took away even our own access
        sock.listen(BACKLOG)
        return sock.detach()
    except BaseException:
        sock.close()
        raise


def start_listener(address: str) -> int:
    """Bind and listen; returns the fd, close-on-exec and blocking. The caller owns it.

    The directory is made if need be, 0700; the socket is 0600 whatever the umask. Raises InvalidArgument
    (scheme, or a path over 106 bytes), AlreadyExists (something that is no socket is in the way; it is left
    alone), OSError EADDRINUSE when a socket is bound there, alive or dead, and other OSErrors.
    """
    path, name = _local_name(address)
    if path is not None:
        _make_parents(path)
    with _Lock(path):
        return _listen(path, name, address)


def _probe(address: str) -> bool:
    """Whether somebody listens there. Raises OSError where that can't be told."""
    _, name = _local_name(address)
    import _socket

    sock = _new_socket(_socket.SOCK_NONBLOCK)
    try:
        sock.connect(name)
    except OSError as error:
        # EAGAIN: listening, its backlog full. A unix socket's connect is never "in progress".
        if error.errno == EAGAIN:
            return True
        if error.errno in (ECONNREFUSED, ENOENT):
            return False
        raise
    finally:
        sock.close()
    return True


_TRANSIENT = (EMFILE, ENFILE, ENOBUFS, ENOMEM, EINTR)


def wait_socket_working(address: str, interval_ms: int = 5, count: int = 200) -> bool:
    """Whether a shim listens at the address, by connecting.

    A dead socket and a missing one are refused at once and answer False at once: it is the lack of fds or
    memory on our side alone that is tried again, `count` times with `interval_ms` between. Raises OSError
    when it can't be told: False would make the caller remove the socket of a live shim.
    """
    for left in range(count - 1, -1, -1):
        try:
            return _probe(address)
        except OSError as error:
            if left == 0 or error.errno not in _TRANSIENT:
                raise
        import time

        time.sleep(interval_ms / 1000)
    raise InvalidArgument("count must be at least 1")


# A ttrpc request (stream 1, type 1) for a service and method of no name that any server has: whoever lives refuses it.
_KNOCK = b"\0\0\0\x0c\0\0\0\x01\x01\0" + b"\n\x05knock\x12\x03who"
KNOCK_TIMEOUT = 1.0  # seconds; a shim that is stopped lives


def somebody_answers(address: str) -> bool:
    """Whether a shim lives at the address. That it takes a connection is no proof: a process that is being killed, and a fork of
    its own that has not become another program yet, hold the listener for a moment longer, and the connection ends with them.
    Raises as wait_socket_working does."""
    if not wait_socket_working(address):
        return False
    _, name = _local_name(address)
    sock = _new_socket(0)
    try:
        sock.settimeout(KNOCK_TIMEOUT)
        sock.connect(name)
        sock.sendall(_KNOCK)
        return bool(sock.recv(1))
    except (TimeoutError, BlockingIOError):  # stopped; or its backlog is full
        return True
    except (ConnectionError, FileNotFoundError):
        return False
    finally:
        sock.close()


def remove_socket(address: str) -> bool:
    """Unlink the address's socket, and the debug socket beside it; whether there was the former. What is no
    socket is left alone. Raises OSError, InvalidArgument.
    """
    kind, path = parse_sockaddr(address)
    if kind != UNIX:
        return False
    try:
        _unlink_socket(path + DEBUG_SUFFIX)
    except OSError:  # not worth the task socket
        pass
    return _unlink_socket(path)


def _unlink_socket(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_socket_silently(address: str) -> None:
    """remove_socket whose errors are logged, for the way out."""
    try:
        remove_socket(address)
    except Exception as error:
        from . import logger

        logger.warn("cannot remove socket", address=address, error=error)


def bind_or_reuse(address: str) -> tuple[int | None, bool]:
    """(fd, False) of a new listener, or (None, True) when a shim serves there already.

    An address in use is probed; a dead socket is removed and bound again, once. Raises as start_listener and
    wait_socket_working do. Source: containerd's shim package and the Rust crate's spawn.
    """
    path, name = _local_name(address)
    if path is not None:
        _make_parents(path)
    with _Lock(path):
        try:
            return _listen(path, name, address), False
        except OSError as error:
            if error.errno != EADDRINUSE:
                raise
        if wait_socket_working(address):
            return None, True
        remove_socket(address)
        return _listen(path, name, address), False


# --- the address file


def write_address(address: str, bundle: str = ".") -> None:
    """Write the file `address` in the bundle: the address byte for byte, no newline, in one step. Raises
    OSError.

    containerd 1.6 and 1.7 find a shim by it after their restart, so it is written when an existing shim is
    reused, too.
    """
    from .util import write_str_to_file

    write_str_to_file(os.path.join(bundle, ADDRESS_FILE), address)


def withdraw_address() -> None:
    """Undo write_address in the bundle that is our cwd, since nobody was told. A bundle that containerd is about to remove, which
    it renames to `.ID` first, goes too: if the address was written in the middle of that, it has not gone."""
    try:
        os.unlink(ADDRESS_FILE)
        bundle = os.getcwd()
        if os.path.basename(bundle).startswith("."):
            os.rmdir(bundle)
    except OSError:  # there is none, or more is in it
        pass


def read_address(bundle: str = ".") -> str:
    """The address in the bundle, byte for byte. Raises NotFound (no file, or an empty one), OSError."""
    path = os.path.join(bundle, ADDRESS_FILE)
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    if not data:
        raise NotFound(f"{path}: empty")
    return os.fsdecode(data)


def known_address(bundle: str = ".") -> str:
    """The address in the bundle, in our own file or in the one that containerd 2 writes.

    A container that has joined a pod's shim without a `start` of its own has the latter alone. Raises NotFound, OSError."""
    from .util import json_loads, read_file_to_str

    try:
        return read_address(bundle)
    except NotFound:
        try:
            found = json_loads(read_file_to_str(os.path.join(bundle, BOOTSTRAP_FILE)))
        except (FileNotFoundError, ValueError, RecursionError):
            found = None
        known = found.get("address") if isinstance(found, dict) else None
        if not isinstance(known, str) or not known:
            raise
        return known


def note_socket_dir(socket_dir: str, bundle: str = ".") -> None:
    """Keep in the bundle where the socket will be, if containerd 2.3 or later wants it elsewhere than in SOCKET_DIR.

    `delete` is not told of it, and a `start` that is killed leaves no address. Raises OSError."""
    from .util import write_str_to_file

    if socket_dir.rstrip("/") != SOCKET_DIR:
        write_str_to_file(os.path.join(bundle, SOCKET_DIR_FILE), socket_dir)


def noted_socket_dir(bundle: str = ".") -> str:
    """What note_socket_dir has kept, else SOCKET_DIR. Raises OSError."""
    from .util import read_file_to_str

    try:
        return read_file_to_str(os.path.join(bundle, SOCKET_DIR_FILE)) or SOCKET_DIR
    except (FileNotFoundError, NotADirectoryError):
        return SOCKET_DIR


def listening_path(fd: int) -> str:
    """The path of the socket that this fd is, "" when it has none. Raises OSError: it is no socket."""
    import _socket

    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise OSError(ENOTSOCK, os.strerror(ENOTSOCK))
    listener = _socket.socket(fileno=os.dup(fd))
    name = listener.getsockname()
    listener.close()
    return name if isinstance(name, str) else ""
