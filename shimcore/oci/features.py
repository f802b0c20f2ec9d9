"""What a runtime's `features` command says, kept for the next time: it is asked whenever containerd 2.x looks at the runtime's
name, and the answer changes with the binary alone.

Kept in a directory that is its user's alone (0700, not reached through a link), one file for each path of a runtime: a line that
names the binary by its path, device, inode, size and times, then the JSON. A file that is not ours alone, not whole, or about
another binary is as none, and is replaced. Nobody is told of trouble with it: the runtime is asked then, as without.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = "/run/shimcore"
VARIABLE = "SHIMCORE_FEATURES_DIR"  # another directory; empty: nothing is kept
SIZE_MAX = 1 << 20  # bytes; runc's are 8 KiB


def resolve(binary: str) -> str:
    """The path that execvp(3) would run: as it is if it has a slash, else the first on PATH that may be executed. As it is, too,
    when there is none: whoever runs it says so."""
    if "/" in binary:
        return binary
    for folder in os.environ.get("PATH", "/bin:/usr/bin").split(":"):
        path = os.path.join(folder or ".", binary)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return binary


def cached(path: str, ask: Callable[[], bytes | None]) -> bytes | None:
    """The features of the runtime at `path`: the kept ones, else what ask() returns, which is kept unless it is None.

    path: what resolve() gave. Raises what ask() raises."""
    identity = _identity(path)
    directory = _open_directory() if identity else -1
    if directory < 0:
        return ask()
    try:
        name = _file_name(path)
        features = _read(directory, name, identity)
        if features is None:
            features = ask()
            # One that was replaced meanwhile may be either.
            if features is not None and len(features) <= SIZE_MAX and _identity(path) == identity:
                _write(directory, name, _head(identity, features) + features)
        return features
    finally:
        os.close(directory)


def _identity(path: str) -> bytes:
    """b"" when there is no such file. The change time is what tells a binary that was written to in place and had its time of
    modification set back."""
    try:
        found = os.stat(path)
    except OSError:
        return b""
    numbers = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    # The path last: it may hold anything but NUL, and a line's end is written as one that isn't.
    return b" ".join([*(b"%d" % number for number in numbers), os.fsencode(os.path.abspath(path)).replace(b"\n", b"\0")])


def _head(identity: bytes, features: bytes) -> bytes:
    from binascii import crc32

    return b"shimcore-features-1 %d %08x %b\n" % (len(features), crc32(features), identity)


def _file_name(path: str) -> str:
    from ..address import sha256_hex

    return f"features-{sha256_hex(os.fsencode(os.path.abspath(path)))}"


def _open_directory() -> int:
    """-1 when there is none that is ours alone."""
    path = os.environ.get(VARIABLE, DIRECTORY)
    if not path:
        return -1
    try:
        os.mkdir(path, 0o700)
    except OSError:  # it is there, mostly
        pass
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1
    if _is_ours(os.fstat(fd)):
        return fd
    os.close(fd)
    return -1


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _read(directory: int, name: str, identity: bytes) -> bytes | None:
    try:
        # Without O_NONBLOCK a FIFO in its place would be waited for.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _is_ours(found) or found.st_size > 2 * SIZE_MAX:
            return None
        head, _, features = os.pread(fd, found.st_size, 0).partition(b"\n")
    except OSError:
        return None
    finally:
        os.close(fd)
    return features if features and head + b"\n" == _head(identity, features) else None


def _write(directory: int, name: str, data: bytes) -> None:
    temporary = f"{name}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError:
        return
    try:
        whole = os.write(fd, data) == len(data)
        if whole:
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        whole = False
    finally:
        os.close(fd)
    if not whole:
        try:
            os.unlink(temporary, dir_fd=directory)
        except OSError:
            pass
