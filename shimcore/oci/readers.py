"""What becomes of output when its reader has gone (docs/stdio.md).

A process writes to a FIFO whose read end is ours as well, so that it meets no SIGPIPE when its reader goes; when the FIFO is
full, it waits. That is `block`, and costs nothing. With `drop` and `spill` the FIFO is looked at once in a while. Whether
anybody else has it open can't be asked, since we do; but inotify tells of every read and every open. So a reader has gone when
the FIFO was full and nobody has read a byte for as long as the policy says. From then on we take the oldest bytes ourselves, as
fast as they are written, so that the process goes on and the newest are there for a reader that comes; the first byte that
somebody else reads ends that.
"""

from __future__ import annotations

import os
import stat
from select import POLLOUT, poll

from .. import jobs, logger
from .._reaper import watch_readers
from ..errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from .stdio import Stdio, Stream

    class Readers(Protocol):
        """What tells of who reads a stream."""

        def somebody(self) -> bool: ...
        def close(self) -> None: ...

BLOCK, DROP, SPILL = "block", "drop", "spill"
COPY = "copy"  # by itself: block, and copy
ANNOTATION = "io.shimcore.stdio"  # of one container, in config.json
VARIABLE = "SHIMCORE_STDIO"  # of all, in containerd's environment

AFTER = 10.0  # seconds
SPILL_MAX = 16 << 20  # bytes of a stream

LOOK = 1.0  # the longest that a FIFO is not looked at, in seconds
FAST = 0.002  # between two looks at a process that writes to nobody
PIECE = 32768  # bytes taken at once: half of what a FIFO holds


class Policy:
    """action: BLOCK, DROP or SPILL. after: seconds that nobody reads. max: bytes of a stream that are kept on disk. copy: init
    gets pipes, and we copy (copying)."""

    __slots__ = ("action", "after", "copy", "max")

    def __init__(self, action: str = BLOCK, after: float = AFTER, max: int = SPILL_MAX, copy: bool = False) -> None:
        self.action = action
        self.after = after
        self.max = max
        self.copy = copy

    def __str__(self) -> str:
        return f"{self.action},{COPY}" if self.copy else self.action


def parse(text: str, where: str) -> Policy:
    """`spill,after=10,max=16777216`; "" is block, `copy` is `block,copy`. Raises InvalidArgument, which names `where`."""
    policy = Policy()
    policy.action, *settings = text.split(",") if text else [BLOCK]
    if policy.action == COPY:
        policy.action, policy.copy = BLOCK, True
    try:
        if policy.action not in (BLOCK, DROP, SPILL):
            raise ValueError
        for setting in settings:
            name, _, value = setting.partition("=")
            if name == "after":
                policy.after = float(value)
            elif name == "max":
                policy.max = int(value)
            elif setting == COPY:
                policy.copy = True
            else:
                raise ValueError
        if not (0.1 <= policy.after <= 86400 and 4096 <= policy.max <= 1 << 40):
            raise ValueError
    except ValueError:
        raise InvalidArgument(
            f"{where}: {text!r} is not block, drop, spill or copy;"
            " after=SECONDS (0.1 to 86400), max=BYTES (from 4096) and copy may follow it"
        ) from None
    return policy


def policy_of(spec: Mapping[str, object]) -> Policy:
    """A container's, from its config.json and our environment. Its author's `max` is not above the node's. Raises
    InvalidArgument."""
    node = parse(os.environ.get(VARIABLE, ""), VARIABLE)
    annotations = spec.get("annotations")
    text = annotations.get(ANNOTATION) if isinstance(annotations, dict) else None
    if not isinstance(text, str):
        return node
    own = parse(text, f"annotation {ANNOTATION}")
    own.max = min(own.max, node.max)
    return own


class Lost:
    """Bytes that no reader was given: counted for a container and, by `above`, for the shim."""

    __slots__ = ("_above", "dropped", "spilled")

    def __init__(self, above: Lost | None = None) -> None:
        self._above = above
        self.dropped = 0
        self.spilled = 0

    def add(self, dropped: int, spilled: int = 0) -> None:
        self.dropped += dropped
        self.spilled += spilled
        if self._above is not None:
            self._above.add(dropped, spilled)


class Spill:
    """What a stream's reader has not got, in two files of at most half of `max` each: the newest in `path`, what was before in
    path.1. For the pool."""

    __slots__ = ("_half", "path")

    def __init__(self, path: str, max: int) -> None:
        self.path = path
        self._half = max // 2

    def write(self, data: bytes) -> tuple[int, int]:
        """(bytes that are gone: these or older ones, bytes written)."""
        gone = written = 0
        try:
            fd = self._open()
            try:
                if os.fstat(fd).st_size + len(data) > self._half:
                    gone = _size(self.path + ".1")
                    os.replace(self.path, self.path + ".1")
                    os.close(fd)
                    fd = -1
                    fd = self._open()
                written = os.write(fd, data[-self._half :])
            finally:
                if fd >= 0:
                    os.close(fd)
        except OSError as error:
            logger.warn("output is not kept", path=self.path, error=error.strerror)
        return gone + len(data) - written, written

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileExistsError(17, "there is something else in its place", self.path)
        return fd


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def spill_folder(bundle: str) -> str:
    """containerd's folder for what a task leaves on disk: the bundle itself is memory, mostly."""
    work = os.path.join(bundle, "work")
    return work if os.path.isdir(work) else bundle


class Inotify:
    """Tells of reads and opens of a FIFO, our own as well."""

    __slots__ = ("_fd",)

    def __init__(self, read_fd: int) -> None:
        """Raises OSError."""
        self._fd = watch_readers(read_fd)

    def somebody(self) -> bool:
        """Whether it was read or opened since we asked last."""
        try:
            return bool(os.read(self._fd, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)


class _Tail:
    """One FIFO, or pipe, under watch."""

    __slots__ = ("_policy", "_since", "_watch", "gone", "lost", "pause", "spill", "stream")

    def __init__(self, stream: Stream, policy: Policy, lost: Lost, spill: Spill | None) -> None:
        self.stream = stream
        self.spill = spill
        self.lost = lost
        self.gone = False
        self.pause = min(LOOK, policy.after / 4)  # seconds until it is to be looked at again
        self._policy = policy
        self._watch: Readers | None = None  # while it is full
        self._since = 0.0

    def look(self) -> bytes:
        """What we have taken in the place of a reader; b"" mostly."""
        if not self._full():
            if not self.gone:
                self.close()
            elif self._somebody():
                self._back()
            else:
                self.pause = min(2 * self.pause, LOOK)
            return b""
        if self._watch is None:
            try:
                self._watch = self.stream.watch()
            except OSError as error:  # without it nobody can tell, and nothing may be taken
                logger.warn("readers of output can't be watched", error=error.strerror)
                return b""
            self._since = _now()
        elif self._somebody():
            self._back()
        elif self.gone or _now() - self._since >= self._policy.after:
            if not self.gone:
                logger.warn("nobody reads a container's output", stream=self.stream.name, policy=self._policy.action)
            self.gone = True
            self.pause = FAST
            return self.take()
        return b""

    def take(self) -> bytes:
        try:
            data = self.stream.take(PIECE)
        except BlockingIOError:
            data = b""
        self._somebody()  # that was us
        return data

    def rest(self) -> bytes:
        """All that there is now, when the process has ended, if it is to be kept and nobody has come for it. If not, what is in
        the way of newer bytes."""
        data = b""
        while (
            self.gone
            and (self.spill is not None or self.stream.behind())
            and not self._somebody()
            and len(data) < self.stream.holds
        ):
            piece = self.take()
            if not piece:
                break
            data += piece
        return data

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def _back(self) -> None:
        if self.gone:
            logger.info("a container's output has a reader again", stream=self.stream.name)
        self.gone = False
        self.pause = min(LOOK, self._policy.after / 4)
        self._since = _now()

    def _full(self) -> bool:
        ask = poll()
        ask.register(self.stream.write_fd, POLLOUT)
        return not ask.poll(0)

    def _somebody(self) -> bool:
        return self._watch is not None and self._watch.somebody()


class Watch:
    """The FIFOs of one process, under a policy that is not `block`. RPC thread only."""

    __slots__ = ("_io", "_over", "_rest", "_tails", "finished")

    def __init__(self, io: Stdio, policy: Policy, lost: Lost, folder: str) -> None:
        """folder: where to spill to; "": nowhere, which makes `spill` a `drop`."""
        keep = policy.action == SPILL and folder
        self._io = io
        self._tails = [
            _Tail(stream, policy, lost, Spill(os.path.join(folder, stream.name + ".spill"), policy.max) if keep else None)
            for stream in io.streams
        ]
        self._over = jobs.Event()
        self._rest: list[tuple[_Tail, bytes]] = []
        self.finished = jobs.Event()

    def gone(self) -> list[str]:
        """The streams that nobody reads; on any thread."""
        return [tail.stream.name for tail in self._tails if tail.gone]

    def process_ended(self) -> None:
        """Before anything is closed: what is unread stays for a reader that may come, or goes where the rest went."""
        if not self._over.is_set():
            self._rest = [(tail, tail.rest()) for tail in self._tails]
            self._over.set()

    async def run(self) -> None:
        try:
            while not self._over.is_set():
                for tail in self._tails:
                    if not self._over.is_set():
                        await self._lose(tail, tail.look())
                await self._over.within(min(tail.pause for tail in self._tails))
            for tail, data in self._rest:
                await self._lose(tail, data)
        finally:
            for tail in self._tails:
                tail.close()
            self.finished.set()

    async def _lose(self, tail: _Tail, data: bytes) -> None:
        if data:
            tail.lost.add(*((len(data), 0) if tail.spill is None else await jobs.in_pool(tail.spill.write, data)))


def _now() -> float:
    from time import monotonic

    return monotonic()
