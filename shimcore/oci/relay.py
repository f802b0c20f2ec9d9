"""The bytes that pass through a shim, carried by one thread: those of terminals, between a console and its FIFOs (Console),
those of containerd's streams (streaming), and those that are copied between pipes and FIFOs (copying).

The thread is made with the first of them. Nothing is read that has no room: a reader that has stopped makes the console's
program wait, as a terminal does, and delays no other. When the last process has closed the terminal, what is left of its output
is handed on, and then the console has hung up (`over`).
"""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, POLLIN, epoll, poll

from .. import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ROOM = 65536  # bytes that are held of each direction


class Carried:
    """What the relay's thread looks after; all of it under the relay's lock."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: dict[int, int] = {}  # fd -> what epoll is asked for

    def wanted(self) -> dict[int, int]:
        """What to wait for now, by fd."""
        raise NotImplementedError

    def ready(self, fd: int, events: int) -> None:
        """What was waited for has come."""
        raise NotImplementedError

    def give_up(self) -> None:
        """ready() has raised: it will not be called again."""

    def flush(self) -> None:
        """Write to an fd that epoll has no use for: a file, which takes all at once."""


class Console(Carried):
    """One terminal under way. master: the console's fd, which this owns. input, output: fds or -1; the caller's, and open until
    `over` is true or close() has returned."""

    __slots__ = ("_from", "_out", "_relay", "closed", "input", "lost", "master", "output", "over")

    def __init__(self, relay: Relay, master: int, input: int, output: int) -> None:
        super().__init__()
        self._relay = relay
        self._from = b""  # on its way to the program
        self._out = b""  # on its way to the reader
        self.master = master
        self.input = input
        self.output = output
        self.lost = 0  # bytes of output that could not be written: a full disk, for one
        self.closed = False
        self.over = False

    def save(self) -> dict[str, Any]:
        """While the relay is held."""
        return {
            "master": self.master, "input": self.input, "output": self.output, "from": self._from, "out": self._out,
            "lost": self.lost, "over": self.over,
        }  # fmt: skip

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> Console:
        """What save() has returned; for carry_on()."""
        console = cls(the_relay(), saved["master"], saved["input"], saved["output"])
        console._from, console._out = saved["from"], saved["out"]
        console.lost, console.over = saved["lost"], saved["over"]
        return console

    def resize(self, width: int, height: int) -> None:
        """Set the window's size, in characters; the program gets SIGWINCH. Raises OSError."""
        with self._relay.lock:
            if not self.closed:
                set_size(self.master, width, height)

    def close(self) -> None:
        """Hang up: what is left of the program's session gets SIGHUP. Idempotent."""
        self._relay.close(self)

    # --- the relay's thread, under its lock

    def wanted(self) -> dict[int, int]:
        """What to wait for now."""
        want: dict[int, int] = {}
        if self.input >= 0 and len(self._from) < ROOM and not self.over:
            want[self.input] = EPOLLIN
        if self.output >= 0 and self._out:
            want[self.output] = EPOLLOUT
        if not self.over:
            events = (EPOLLIN if len(self._out) < ROOM else 0) | (EPOLLOUT if self._from else 0)
            if events:
                want[self.master] = events
        return want

    def ready(self, fd: int, events: int) -> None:
        if fd == self.master:
            if events & (EPOLLIN | EPOLLHUP | EPOLLERR) and len(self._out) < ROOM:
                self._read_master()
            if events & EPOLLOUT and self._from and not self.over:
                self._from = _write(fd, self._from)
        elif fd == self.input:
            data = _read(fd)
            if data == b"":
                self.input = -1  # CloseIO, and no writer is left: a terminal goes on without input
            elif data is not None:
                self._from += data
        elif fd == self.output and self._out:
            self._hand_on()

    def flush(self) -> None:
        while self._out:
            self._hand_on()

    def give_up(self) -> None:
        self.over, self._out = True, b""

    def _hand_on(self) -> None:
        """Write what there is for the reader. What can never be written is given up, counted, and logged once."""
        try:
            self._out = self._out[os.write(self.output, self._out) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if not self.lost:
                logger.error("output of a terminal is lost", error=error.strerror)
            self.lost += len(self._out)
            self._out = b""

    def _read_master(self) -> None:
        data = _read(self.master)
        if data is None:
            return
        if data == b"":
            self.over = True  # nobody has the terminal open any more
            self._from = b""
        elif self.output >= 0:
            self._out += data
            self._hand_on()

    @property
    def drained(self) -> bool:
        """Nothing is left to be handed on, and nothing comes."""
        return self.over and not self._out

    def quiet(self) -> bool:
        """Nothing is left to be handed on now; more may come of programs that still have the terminal."""
        with self._relay.lock:
            if self.closed or self.drained:
                return True
            look = poll()
            look.register(self.master, POLLIN)
            return not self._out and not look.poll(0)


def _read(fd: int) -> bytes | None:
    """None: nothing yet; b"": the end."""
    try:
        return os.read(fd, ROOM)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:  # EIO: the other side of a console is closed
        return b""


def _write(fd: int, data: bytes) -> bytes:
    """What is left of it. Of a terminal that nobody has open any more, nothing."""
    try:
        return data[os.write(fd, data) :]
    except (BlockingIOError, InterruptedError):
        return data
    except OSError:
        return b""


def set_size(master: int, width: int, height: int) -> None:
    """TIOCSWINSZ: rows and columns as two 16-bit numbers, and two for pixels. Raises OSError."""
    from fcntl import ioctl

    tiocswinsz = 0x5414
    ioctl(master, tiocswinsz, b"".join(n.to_bytes(2, "little") for n in (height & 0xFFFF, width & 0xFFFF, 0, 0)))


class Relay:
    """The thread, its epoll, and what it carries."""

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self._epoll = epoll()
        self._owner: dict[int, Carried] = {}
        self._running = False

    def add(self, master: int, input: int, output: int) -> Console:
        """Carry a console; from now on it owns `master`. All fds are made non-blocking."""
        for fd in (master, input, output):
            if fd >= 0:
                os.set_blocking(fd, False)
        console = Console(self, master, input, output)
        self.begin(console)
        return console

    def begin(self, carried: Carried) -> None:
        with self.lock:
            self.arm(carried)

    def close(self, console: Console) -> None:
        with self.lock:
            if console.closed:
                return
            console.closed = True
            self.disarm(console)
            os.close(console.master)
            if console.lost:
                logger.error("output of a terminal was lost", bytes=console.lost)

    def arm(self, carried: Carried) -> None:
        """Wait for what it wants now. Under the lock."""
        want = carried.wanted()
        have = carried._events
        for fd in [fd for fd in have if fd not in want]:
            del have[fd], self._owner[fd]
            self._epoll.unregister(fd)
        for fd, events in want.items():
            if fd not in have:
                try:
                    self._epoll.register(fd, events)
                except PermissionError:  # a file, which takes all at once
                    carried.flush()
                    continue
                self._owner[fd] = carried
            elif have[fd] != events:
                self._epoll.modify(fd, events)
            have[fd] = events
        if not self._running:
            self._running = True
            start_new_thread(self._run, ())

    def disarm(self, carried: Carried) -> None:
        """Wait for nothing of it any more; before its fds are closed. Under the lock."""
        for fd in carried._events:
            del self._owner[fd]
            self._epoll.unregister(fd)
        carried._events.clear()

    def _run(self) -> None:
        while True:
            for fd, events in self._epoll.poll():
                with self.lock:
                    carried = self._owner.get(fd)
                    if carried is None:  # closed since
                        continue
                    try:
                        carried.ready(fd, events)
                        self.arm(carried)
                    except Exception as error:  # one's trouble is not the others'
                        logger.error("a process's input or output is given up", error=repr(error))
                        self.disarm(carried)
                        carried.give_up()


_relay: Relay | None = None
_relay_lock = allocate_lock()


def the_relay() -> Relay:
    """This process's."""
    global _relay
    with _relay_lock:
        if _relay is None:
            _relay = Relay()
    return _relay


def carry(master: int, input: int, output: int) -> Console:
    """Carry a console's bytes by this process's relay. See Relay.add."""
    return the_relay().add(master, input, output)


def hold(on: bool) -> None:
    """Keep all bytes where they are, or let them go on."""
    lock = the_relay().lock
    if on:
        lock.acquire()
    elif lock.locked():
        lock.release()


def carry_on(all: list[Carried]) -> None:
    """Carry these, which restore() has made."""
    for carried in all:
        the_relay().begin(carried)
