"""stdio that is copied: init gets pipes, and the relay's thread copies between them and the client's FIFOs and files.

It is for criu, which saves a process that has pipes, and not one that has files of the host. A process without copying has the
FIFO itself. To a client both are the same: both ends of its FIFO are ours (no SIGPIPE when a reader goes; one that comes late
finds a writer and what was written), and the end of the file comes when the process has ended, every writer has closed the pipe,
and all was read. What has no room in the FIFO stays in the pipe, but for the piece at hand, so a reader that has stopped makes
the process wait, and nobody else. stdin is read when what was read before is in the pipe, and ends when CloseIO has closed our
write end of its FIFO and the client has closed its own.

criu saves nothing of what is in a pipe that the process has only the write end of: that is the reader's, whom it still reaches.

Fields are under the relay's lock. Imported when somebody asks for copying.
"""

from __future__ import annotations

import os
import stat
from select import EPOLLERR, EPOLLIN, EPOLLOUT

from .. import logger
from .relay import ROOM, Carried, the_relay
from .stdio import Stream, unread_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .stdio import Stdio


class Output(Carried):
    """What a process writes, on its way from its pipe to `target`, a FIFO or a file. pipe: our read end, which this owns."""

    __slots__ = ("_held", "lost", "over", "pipe", "target")

    def __init__(self, pipe: int, target: int) -> None:
        super().__init__()
        self.pipe = pipe
        self.target = target
        self._held = b""  # read, and not yet written
        self.lost = 0  # bytes that could not be written: a full disk, for one
        self.over = False  # every writer has gone

    def wanted(self) -> dict[int, int]:
        if self._held:
            return {self.target: EPOLLOUT}
        return {} if self.over else {self.pipe: EPOLLIN}

    def ready(self, fd: int, events: int) -> None:
        self.step()

    def step(self) -> None:
        """Do what can be done now."""
        self._hand_on()
        if self._held or self.over:
            return
        try:
            self._held = os.read(self.pipe, ROOM)
        except BlockingIOError:
            return
        self.over = not self._held
        self._hand_on()

    def _hand_on(self) -> None:
        """A FIFO takes what it has room for, a file all."""
        while self._held:
            try:
                self._held = self._held[os.write(self.target, self._held) :]
            except BlockingIOError:
                return
            except OSError as error:
                if not self.lost:
                    logger.error("output of a process is lost", error=error.strerror)
                self.lost += len(self._held)
                self._held = b""

    def give_up(self) -> None:
        self.lost += len(self._held)
        self.over, self._held = True, b""

    def unread(self) -> int:
        """Bytes that the target has not got."""
        return len(self._held) + (0 if self.over else unread_bytes(self.pipe))

    @property
    def done(self) -> bool:
        """Nothing is left to be handed on, and nothing comes."""
        return self.over and not self._held

    def save(self) -> list[Any]:
        return [self.pipe, self._held, self.lost, self.over]

    @classmethod
    def restore(cls, target: int, pipe: int, held: bytes, lost: int, over: bool) -> Output:
        output = cls(pipe, target)
        output._held, output.lost, output.over = held, lost, over
        return output


class CopiedStream(Stream):
    """The client's FIFO, to which we copy. read_fd: -1: it is a file."""

    __slots__ = ("output",)

    carried = True
    holds = 2 * 65536 + ROOM  # in the FIFO, in the pipe, and between

    def __init__(self, name: str, read_fd: int, write_fd: int, output: Output) -> None:
        super().__init__(name, read_fd, write_fd)
        self.output = output

    def unread(self) -> bool:
        return self.read_fd >= 0 and super().unread()

    def process_ended(self) -> bool:
        return self.drained() and super().process_ended()

    def drained(self) -> bool:
        with the_relay().lock:
            return self.output.done

    def quiet(self) -> bool:
        return not self.behind()

    def behind(self) -> bool:
        with the_relay().lock:
            return self.output.unread() > 0

    def take(self, size: int) -> bytes:
        data = super().take(size)
        relay = the_relay()
        with relay.lock:  # what was behind it moves up
            self.output.step()
            relay.arm(self.output)
        return data

    def save(self) -> list[Any]:
        """While the relay is held."""
        return [self.name, self.read_fd, self.write_fd, self.output.save()]

    @classmethod
    def restore(cls, name: str, read_fd: int, write_fd: int, output: list[Any]) -> CopiedStream:
        """What save() has returned; its output is for carry_on()."""
        return cls(name, read_fd, write_fd, Output.restore(write_fd, *output))

    def close(self) -> None:
        relay, output = the_relay(), self.output
        with relay.lock:
            relay.disarm(output)
            left = output.lost + output.unread()
            output.over, output._held = True, b""
            os.close(output.pipe)
        if left:
            logger.warn("output of a process was lost", stream=self.name, bytes=left)
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)


class CopiedInput(Carried):
    """stdin of a process, on its way from the client's FIFO to its pipe. fifo: our read end; pipe: our write end; both are this
    one's, and -1 when it is over."""

    __slots__ = ("_held", "fifo", "pipe")

    streamed = False

    def __init__(self, fifo: int, pipe: int, held: bytes = b"") -> None:
        super().__init__()
        self.fifo = fifo
        self.pipe = pipe
        self._held = held

    def wanted(self) -> dict[int, int]:
        if self.pipe < 0:
            return {}
        if self._held:
            return {self.pipe: EPOLLOUT}
        return {self.fifo: EPOLLIN, self.pipe: 0}  # 0: EPOLLERR alone, when the process reads no more

    def ready(self, fd: int, events: int) -> None:
        if fd == self.pipe and events & EPOLLERR:
            self.end()
            return
        try:
            if not self._held:
                self._held = os.read(self.fifo, ROOM)
                if not self._held:
                    self.end()
                    return
            self._held = self._held[os.write(self.pipe, self._held) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.end()

    def end(self) -> None:
        """The process sees the end of the file, the client that nobody reads. Under the lock; idempotent."""
        if self.pipe >= 0:
            the_relay().disarm(self)
            os.close(self.pipe)
            os.close(self.fifo)
        self.pipe = self.fifo = -1
        self._held = b""

    def give_up(self) -> None:
        self.end()

    def close_soon(self) -> None:
        """CloseIO: the end comes by the FIFO."""

    def close(self) -> None:
        with the_relay().lock:
            self.end()

    def save(self) -> list[Any]:
        """While the relay is held. For CopiedInput()."""
        return [self.fifo, self.pipe, self._held]


def put_between(io: Stdio, owner: tuple[int, int]) -> None:
    """Give the process pipes for the FIFOs and files that were opened for it, and copy from now on. owner: uid and gid of the
    pipes of output. For the pool. Raises OSError; what was opened is io's."""
    relay = the_relay()
    if io._stdin is None and _is(stat.S_ISFIFO, io._child[0]):
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        stdin = io._stdin = CopiedInput(io._child[0], write_fd)
        io._child[0] = read_fd
        os.set_blocking(stdin.fifo, False)
        os.set_blocking(stdin.pipe, False)
        relay.begin(stdin)
    fifos = {stream.write_fd: stream for stream in io.streams if not stream.carried}
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = io._child[number]
        fifo = fifos.get(target)
        if fifo is None and not _is(stat.S_ISREG, target):
            continue
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        output = Output(read_fd, target)
        if fifo is None:
            io.streams.append(CopiedStream(name, -1, target, output))
        else:
            io.streams[io.streams.index(fifo)] = CopiedStream(name, fifo.read_fd, target, output)
        io._child[number] = write_fd
        os.set_blocking(output.pipe, False)
        os.set_blocking(output.target, False)
        if owner != (0, 0):
            os.fchown(write_fd, *owner)
        relay.begin(output)


# --- an upgrade in place (handover)


def copied(io: Stdio) -> list[Carried]:
    """What the relay carries of it."""
    found: list[Carried] = [stream.output for stream in io.streams if isinstance(stream, CopiedStream)]
    return [*found, io._stdin] if isinstance(io._stdin, CopiedInput) else found


def save(io: Stdio) -> tuple[dict[str, Any], list[int]]:
    """For restore(), and the fds that are to stay open which the rest of `io` does not have. While the relay is held."""
    streams = [stream.save() for stream in io.streams if isinstance(stream, CopiedStream)]
    stdin = io._stdin.save() if isinstance(io._stdin, CopiedInput) else None
    fds = [output[0] for _, _, _, output in streams] + ([] if stdin is None else stdin[:2])
    return {"streams": streams, "stdin": stdin}, fds


def restore(io: Stdio, saved: dict[str, Any]) -> None:
    """What it had is for carry_on()."""
    io.streams += [CopiedStream.restore(*one) for one in saved["streams"]]
    io._stdin = None if saved["stdin"] is None else CopiedInput(*saved["stdin"])


def _is(kind: Callable[[int], bool], fd: int) -> bool:
    return kind(os.fstat(fd).st_mode)
