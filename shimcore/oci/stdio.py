"""stdin, stdout and stderr of a process, handed to it directly: no byte passes through the shim, but for a terminal's (relay),
those of containerd's streams (streaming), and those of who asked for copying.

FIFOs (a plain path, or fifo://). Of stdout and stderr we open the read end first, then the write end, so that
neither open waits for containerd; both are ours while the process lives. So its writes never meet a FIFO
without a reader (no SIGPIPE when containerd goes away), and a reader that comes late finds a writer. When the
process has ended and what it wrote has been read, our write end is closed, and the reader sees the end of the
file. What is unread keeps the write end open until Delete: a reader that opens a FIFO without a writer would
wait for ever, and its bytes go when the last end is closed. Of stdin we hold the write end, so that the end
of the file comes from CloseIO alone.

binary:// is a program that reads both (binlog). file:// is opened for appending and made 0644 if need be; "" is
/dev/null; a plain path to a file or device that is there is opened for appending as it is.

Every FIFO is looked at by an O_PATH descriptor and opened through /proc/self/fd, so that all opens get the
one that was looked at. Opening may hang where the file system does: it is for the pool.
"""

from __future__ import annotations

import os
import stat

from ..errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .binlog import Logger
    from .copying import CopiedInput
    from .readers import Readers
    from .relay import Console
    from .streaming import InputStream, Streams

FIONREAD = 0x541B  # termios.FIONREAD, without termios
SCHEME = "ttrpc+unix"  # of containerd's streams
_NULL = "/dev/null"
_NULL_DEVICE = os.makedev(1, 3)


def _split(uri: str) -> tuple[str, str]:
    """(scheme, path) of what a client names: "", "fifo", "file", and with the URI as path "binary" and SCHEME. Raises
    InvalidArgument."""
    if not uri:
        return "", ""
    scheme, separator, path = uri.partition("://")
    if not separator:
        scheme, path = "fifo", uri
    if scheme in ("binary", SCHEME):
        return scheme, uri
    if scheme not in ("fifo", "file"):
        raise InvalidArgument(f"unknown scheme of stdio {uri!r}")
    path = path.partition("?")[0] if separator else path
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"stdio is not an absolute path: {uri!r}")
    return scheme, path


def check(stdin: str, stdout: str, stderr: str, streams: Callable[[], Streams] | None = None) -> None:
    """Refuse what we can't do before anything is made. streams: gives the shim's streams; None: it has none. Raises
    InvalidArgument."""
    for uri in (stdin, stdout, stderr):
        if _split(uri)[0] == SCHEME:
            _streams(streams, uri).check(uri)
    if _split(stdin)[0] in ("file", "binary"):
        raise InvalidArgument(f"stdin can't be a {_split(stdin)[0]}:// URI")
    if _split(stderr)[0] == "binary" != _split(stdout)[0]:
        raise InvalidArgument("a logging binary for stderr takes stdout as well")
    if _split(stdout)[0] == "binary":
        from .binlog import parse

        parse(stdout)


def unread_bytes(fd: int) -> int:
    """What is in a pipe."""
    from fcntl import ioctl

    return int.from_bytes(ioctl(fd, FIONREAD, b"\0\0\0\0"), "little")


def _streams(streams: Callable[[], Streams] | None, uri: str) -> Streams:
    if streams is None:
        raise InvalidArgument(f"this shim serves no streams: {uri!r}")
    return streams()


class Stream:
    """One FIFO of output: our read end, and our write end, which the process has too. name: stdout or stderr."""

    __slots__ = ("name", "read_fd", "write_fd")

    carried = False  # by the relay, which reads what the process writes to a pipe
    streamed = False  # to a client that calls us
    holds = 65536  # bytes that wait for a reader, at most

    def __init__(self, name: str, read_fd: int, write_fd: int) -> None:
        self.name = name
        self.read_fd = read_fd
        self.write_fd = write_fd

    def unread(self) -> bool:
        return unread_bytes(self.read_fd) > 0

    def process_ended(self) -> bool:
        """Close our write end if it can be; whether it was."""
        if self.unread():
            return False
        fd, self.write_fd = self.write_fd, -1
        os.close(fd)
        return True

    def drained(self) -> bool:
        """Whether Delete need not wait for a reader."""
        return True

    def quiet(self) -> bool:
        """The same, but more may come."""
        return True

    def watch(self) -> Readers:
        """Tells of who reads. Raises OSError."""
        from .readers import Inotify

        return Inotify(self.read_fd)

    def take(self, size: int) -> bytes:
        """The oldest bytes, in the place of a reader. Raises BlockingIOError."""
        return os.read(self.read_fd, size)

    def behind(self) -> bool:
        """Whether there is more than the FIFO has room for."""
        return False

    def close(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
        os.close(self.read_fd)


class Stdio:
    """The open ends for one process. Made by open_stdio on the pool, then owned by the RPC thread."""

    __slots__ = ("_child", "_closed", "_console", "_input", "_output", "_stdin", "_stdin_hold", "logger", "streams")

    def __init__(self) -> None:
        self._child: dict[int, int] = {}  # the child's fd -> ours
        # With a terminal: what the client writes and reads, and what carries it.
        self._input = -1
        self._output = -1
        self._console: Console | None = None
        self.streams: list[Stream] = []
        self._stdin_hold = -1
        self._stdin: InputStream | CopiedInput | None = None
        self.logger: Logger | None = None
        self._closed = False

    def child_fds(self) -> dict[int, int]:
        """What to hand to the runtime as 0, 1 and 2; all three are there, so that none is captured."""
        return dict(self._child)

    def started(self) -> None:
        """The runtime has ended: the process has its own copies of what only it needs."""
        kept = [stream.write_fd for stream in self.streams]
        for fd in set(self._child.values()):
            if fd not in kept:
                os.close(fd)
        self._child = {}

    def attach(self, master: int, size: tuple[int, int] | None) -> None:
        """The terminal has come, and is carried from now on. size: width and height, if it was set before. For the pool."""
        from .relay import carry

        self._console = carry(master, self._input, self._output)
        if size is not None:
            self._console.resize(*size)

    def resize(self, width: int, height: int) -> bool:
        """Set the size of the terminal; whether there is one. Raises OSError."""
        if self._console is None:
            return False
        self._console.resize(width, height)
        return True

    @property
    def streamed(self) -> bool:
        """Whether some of it is a stream of containerd's."""
        return (self._stdin is not None and self._stdin.streamed) or any(stream.streamed for stream in self.streams)

    @property
    def copied(self) -> bool:
        """Whether some of it goes between pipes and the client's FIFOs."""
        streams = any(stream.carried and not stream.streamed for stream in self.streams)
        return streams or (self._stdin is not None and not self._stdin.streamed)

    @property
    def passes(self) -> bool:
        """Whether there is a logging binary, or output that goes through the shim."""
        return self.logger is not None or self._console is not None or any(stream.carried for stream in self.streams)

    def drained(self) -> bool:
        """Whether all that was written to the terminal is in the client's FIFO or file, or on its way to a client that streams,
        and nobody can write more; and whether a logging binary has ended."""
        if self._console is not None and not self._console.drained:
            return False
        return (self.logger is None or self.logger.ended()) and all(stream.drained() for stream in self.streams)

    def quiet(self) -> bool:
        """The same, but some program may still have the terminal, or the other end of a pipe."""
        if self._console is not None and not self._console.quiet():
            return False
        return (self.logger is None or self.logger.ended()) and all(stream.quiet() for stream in self.streams)

    def close_stdin(self) -> None:
        """CloseIO: the process reads to the end of what was written and then sees the end of the file.
        Idempotent."""
        fd, self._stdin_hold = self._stdin_hold, -1
        if fd >= 0:
            os.close(fd)
        if self._stdin is not None:
            self._stdin.close_soon()

    def process_ended(self) -> bool:
        """Close our write end of each stream that has been read up; whether none is left. Call it again while
        there are."""
        self._end_stdin()
        if self._console is not None and not self._console.drained:
            return False
        if self.logger is not None and self._output >= 0:  # of a terminal: now the logger sees the end
            fd, self._output = self._output, -1
            os.close(fd)
        left = False
        for stream in self.streams:
            if stream.write_fd < 0:
                continue
            fd = stream.write_fd
            if not stream.process_ended():
                left = True
            elif fd == self._output:
                self._output = -1
        return not left

    def _end_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
            self._stdin = None
        self.close_stdin()

    def close(self) -> None:
        """Delete, or the way back from a failed Create or Start. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.started()
        self._end_stdin()
        if self._console is not None:
            self._console.close()
        owned = [stream.write_fd for stream in self.streams]
        for fd in (self._input, self._output):
            if fd >= 0 and fd not in owned:
                os.close(fd)
        self._input = self._output = -1
        for stream in self.streams:
            stream.close()
        self.streams = []
        if self.logger is not None:
            self.logger.close()

    # --- opening

    def _open_null(self, number: int) -> None:
        self._child[number] = os.open(_NULL, (os.O_RDONLY if number == 0 else os.O_WRONLY) | os.O_CLOEXEC)

    def _for_terminal(self) -> None:
        """What was opened for the process is the terminal's; the runtime itself gets /dev/null."""
        for number in (0, 1):
            fd = self._child[number]
            found = os.fstat(fd)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == _NULL_DEVICE:  # nothing to read, nobody to write to
                continue
            if number == 0 and not stat.S_ISFIFO(found.st_mode):
                raise InvalidArgument("stdin of a terminal is neither a FIFO nor empty")
            if number == 0:
                self._input = fd
            else:
                self._output = fd
            del self._child[number]
            self._open_null(number)

    def _open_input(self, path: str, hold: bool) -> None:
        def as_fifo(name: str) -> None:
            first = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if hold:
                    self._stdin_hold = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
                    self._child[0] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                    return
                # CloseIO came before Start. Without a writer a blocking open would wait for one, so one is
                # there for its time.
                writer = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    self._child[0] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                finally:
                    os.close(writer)
            finally:
                os.close(first)

        def as_file(name: str) -> None:
            self._child[0] = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)

        _through_path(path, as_fifo, as_file)

    def _open_input_stream(self, streams: Callable[[], Streams] | None, uri: str, hold: bool) -> None:
        self._child[0], self._stdin = _streams(streams, uri).open_input(uri)
        if not hold:
            self._stdin.close_soon()

    def _open_output_stream(
        self, streams: Callable[[], Streams] | None, number: int, uri: str, owner: tuple[int, int]
    ) -> None:
        stream = _streams(streams, uri).open_output(uri, "stdout" if number == 1 else "stderr", owner)
        self.streams.append(stream)
        self._child[number] = stream.write_fd

    def _open_logger(self, uri: str, id: str, namespace: str) -> None:
        from .binlog import Logger

        self.logger = Logger(uri, id, namespace)
        self._child[1], self._child[2] = self.logger.stdout, self.logger.stderr

    def _open_output(self, number: int, scheme: str, path: str, owner: tuple[int, int]) -> None:
        if scheme == "file":
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            fd = os.open(path, flags, 0o644)
            self._child[number] = fd
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidArgument(f"stdio is not a regular file: {path}")
            os.set_blocking(fd, True)
            return

        def as_fifo(name: str) -> None:
            read_fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                write_fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
            except BaseException:
                os.close(read_fd)
                raise
            self.streams.append(Stream("stdout" if number == 1 else "stderr", read_fd, write_fd))
            self._child[number] = write_fd
            if owner != (0, 0):
                os.fchown(write_fd, *owner)

        def as_file(name: str) -> None:
            self._child[number] = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)

        _through_path(path, as_fifo, as_file)


def _through_path(path: str, as_fifo: Callable[[str], None], as_file: Callable[[str], None]) -> None:
    """Look at the path once, then open what was looked at, under its name in /proc."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"stdio can't be opened: {path}: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        name = f"/proc/self/fd/{fd}"
        if stat.S_ISFIFO(mode):
            as_fifo(name)
        elif stat.S_ISREG(mode) or stat.S_ISCHR(mode):
            as_file(name)
        else:
            raise InvalidArgument(f"stdio is neither a FIFO nor a file: {path}")
    except OSError as error:
        # /proc/self/fd/N tells a client nothing.
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def open_stdio(
    stdin: str,
    stdout: str,
    stderr: str,
    *,
    hold_stdin: bool = True,
    owner: tuple[int, int] = (0, 0),
    terminal: bool = False,
    id: str = "",
    namespace: str = "",
    streams: Callable[[], Streams] | None = None,
    copy: bool = False,
) -> Stdio:
    """Open everything for one process; for the pool.

    terminal: they are for a terminal, which attach() brings; stderr is not used then. hold_stdin: False when CloseIO came
    before the process. owner: uid and gid of the FIFOs of output (io_uid, io_gid). id, namespace: what a logging binary is told.
    streams: gives the shim's streams; not called unless there is a URI of one. copy: the process gets pipes, if not a terminal,
    and the relay copies. Raises InvalidArgument, OSError, what Logger and Streams raise; nothing is left open then."""
    io = Stdio()
    try:
        scheme, path = _split(stdin)
        if scheme == SCHEME:
            io._open_input_stream(streams, path, hold_stdin)
        elif scheme:
            io._open_input(path, hold_stdin)
        else:
            io._open_null(0)
        for number, uri in ((1, stdout), (2, "" if terminal else stderr)):
            scheme, path = _split(uri)
            if number == 2 and io.logger is not None:
                if terminal:  # which has one stream
                    os.close(io._child[2])
                    io._open_null(2)
            elif scheme == "binary":
                io._open_logger(uri, id, namespace)
            elif scheme == SCHEME:
                io._open_output_stream(streams, number, uri, owner)
            elif scheme:
                io._open_output(number, scheme, path, owner)
            else:
                io._open_null(number)
        if terminal:
            io._for_terminal()
        elif copy:
            from .copying import put_between

            put_between(io, owner)
    except BaseException:
        io.close()
        raise
    return io
