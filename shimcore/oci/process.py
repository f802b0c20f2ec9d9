"""One process of a container as the service keeps it: its slot in the exit table, its stdio, and what Start
needs.

Everything here is touched on the RPC thread only, except the functions that say "for the pool".
"""

from __future__ import annotations

import os

from .. import jobs
from .._reaper import TOLD
from ..errors import InvalidArgument
from ..util import json_dumps, json_loads, read_pid_from_file, write_str_to_file
from .runc import INIT_PID_FILE, read_log
from .stdio import Stdio, open_stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .._reaper import Core, Slot
    from .readers import Lost, Policy, Watch
    from .streaming import Streams
    from .terminal import ConsoleSocket

# Seconds between two looks at whether what an ended process wrote has been read: the first, and the longest.
DRAIN_FIRST = 0.002
DRAIN_LONGEST = 1.0
# Seconds within which what was written to a terminal can be read.
DRAIN_QUIET = 0.03


class Process:
    """A container's init (exec_id "") or an exec."""

    __slots__ = (
        "bundle",
        "console_socket",
        "exec_id",
        "io",
        "size",
        "slot",
        "spec",
        "stderr",
        "stdin",
        "stdin_closed",
        "stdout",
        "streams",
        "terminal",
        "told",
        "watch",
    )

    def __init__(
        self, slot: Slot, bundle: str, stdin: str, stdout: str, stderr: str, spec: bytes = b"", *, terminal: bool = False,
        streams: Callable[[], Streams] | None = None,
    ) -> None:  # fmt: skip
        """streams: as open_stdio has it."""
        self.slot = slot
        self.exec_id = slot.exec_id
        self.bundle = bundle
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.spec = spec  # an exec's JSON Process, until it has been started
        self.io: Stdio | None = None
        self.stdin_closed = False
        self.told = jobs.Event()
        self.watch: Watch | None = None  # on readers that may go
        self.terminal = terminal
        self.streams = streams
        self.console_socket: ConsoleSocket | None = None  # while the runtime makes the process
        self.size: tuple[int, int] | None = None  # width and height that were asked for before there was a terminal

    def open_io(self, owner: tuple[int, int] = (0, 0), namespace: str = "", copy: bool = False) -> None:
        """For the pool."""
        self.io = open_stdio(
            self.stdin, self.stdout, self.stderr, hold_stdin=not self.stdin_closed, owner=owner, terminal=self.terminal,
            id=self.exec_id or self.slot.container_id, namespace=namespace, streams=self.streams, copy=copy,
        )  # fmt: skip
        if self.terminal:
            from .terminal import ConsoleSocket

            self.console_socket = ConsoleSocket(self.bundle)

    @property
    def console_path(self) -> str:
        """Where the runtime is to send the terminal; "" without one."""
        return self.console_socket.path if self.console_socket is not None else ""

    def child_fds(self) -> dict[int, int]:
        """What the runtime is given as 0, 1 and 2, and the folder of the console socket."""
        fds = {} if self.io is None else self.io.child_fds()
        if self.console_socket is not None:
            fds.update(self.console_socket.fds)
        return fds

    def take_terminal(self) -> None:
        """The runtime has made the process: fetch its terminal, if it has one, and look whether its logging binary lives. For the
        pool. Raises Unknown."""
        if self.io is not None and self.io.logger is not None:
            self.io.logger.check()
        if self.console_socket is None or self.io is None:
            return
        master = self.console_socket.receive()
        self._close_console_socket()
        self.io.attach(master, self.size)

    def _close_console_socket(self) -> None:
        if self.console_socket is not None:
            self.console_socket.close()
            self.console_socket = None

    def resize(self, width: int, height: int) -> None:
        """ResizePty; before there is a terminal it is kept for then. Raises OSError."""
        if self.io is None or not self.io.resize(width, height):
            self.size = (width, height)

    def io_started(self, core: Core, policy: Policy, lost: Lost, folder: str = "") -> None:
        """The process runs. folder: where output goes that nobody reads, if the policy is `spill`."""
        if self.io is not None:
            self.io.started()
            if self.stdin_closed:  # CloseIO came while the runtime was at work
                self.io.close_stdin()
            self.watch_readers(core, policy, lost, folder)

    def watch_readers(self, core: Core, policy: Policy, lost: Lost, folder: str) -> None:
        if policy.action != "block" and self.io is not None and self.io.streams:
            from .readers import Watch

            self.watch = Watch(self.io, policy, lost, folder)
            jobs.Task(core, self.watch.run()).step()

    def close_stdin(self) -> None:
        """CloseIO; before Start it is kept for then."""
        self.stdin_closed = True
        if self.io is not None:
            self.io.close_stdin()

    def close_io(self) -> None:
        self._close_console_socket()
        if self.watch is not None:
            self.watch.process_ended()
        if self.io is not None:
            self.io.close()

    def forget(self) -> None:
        """Take the slot out of the exit table. Raises FailedPrecondition while its exit is not told.

        The slot and this are then freed at once, without waiting for a collection: a shim lives through millions of execs."""
        self.slot.forget()
        self.slot.cookie = None

    def ended(self, core: Core) -> None:
        """The exit was told: whoever waits for it goes on, and the write ends of what has been read are
        closed."""
        self.told.set()
        if self.watch is not None:
            self.watch.process_ended()
        if self.io is not None and not self.io.process_ended():
            jobs.Task(core, self._drain(self.io)).step()

    async def _drain(self, io: Stdio) -> None:
        pause = DRAIN_FIRST
        while True:
            await jobs.sleep(pause)
            if io.process_ended():
                return
            pause = min(2 * pause, DRAIN_LONGEST)

    async def drained(self, seconds: float) -> None:
        """Wait until what the process wrote to its terminal, to a stream of containerd's or to a logging binary has been handed
        on, at most so long; it has ended.

        Programs that it has left behind may hold the terminal, or a pipe, open for ever: then until nothing is to be read, twice,
        since the kernel hands a terminal's bytes on by a worker of its own."""
        if self.watch is not None:
            await self.watch.finished.within(seconds)
        if self.io is None or not self.io.passes:
            return
        pause, quiet = DRAIN_FIRST, 0
        while seconds > 0 and not self.io.drained():
            quiet = quiet + 1 if pause >= DRAIN_QUIET and self.io.quiet() else 0
            if quiet == 2:
                return
            await jobs.sleep(pause)
            seconds -= pause
            pause = min(2 * pause, DRAIN_LONGEST)

    async def wait_told(self, seconds: float) -> bool:
        """Wait until the exit was told, at most so long; whether it was."""
        await self.told.within(seconds)
        return self.slot.phase == TOLD


class ExecFiles:
    """An exec's files in the bundle. <exec_id>.pid is the contract's; the other two are gone when Start has
    ended."""

    __slots__ = ("log", "pid", "spec")

    def __init__(self, bundle: str, exec_id: str) -> None:
        base = os.path.join(bundle, exec_id)
        # An exec may be called "init".
        self.pid = base + (".pid" if exec_id + ".pid" != INIT_PID_FILE else ".exec.pid")
        self.spec = base + ".process.json"
        self.log = base + ".log.json"

    def write_spec(self, spec: bytes) -> None:
        """For the pool."""
        unlink(self.pid)
        unlink(self.log)
        write_str_to_file(self.spec, spec)

    def collect(self) -> int:
        """The pid of the process that was made; for the pool. Raises OSError and InvalidArgument."""
        pid = read_pid_from_file(self.pid)
        self.tidy()
        return pid

    def read_log(self) -> bytes:
        """For the pool."""
        return read_log(self.log)[0]

    def tidy(self) -> None:
        """For the pool."""
        unlink(self.spec)
        unlink(self.log)

    def remove(self) -> None:
        """For the pool."""
        self.tidy()
        unlink(self.pid)


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def check_id(id: str, what: str) -> None:
    """Ids become file names in the bundle and arguments of the runtime. Raises InvalidArgument."""
    if not id or id in (".", "..") or "/" in id or "\0" in id or id.startswith("-"):
        raise InvalidArgument(f"{what} {id!r} can't be used")


def exec_spec(value: bytes, terminal: bool) -> bytes:
    """The JSON Process to hand to the runtime; the request's terminal is what counts. Raises
    InvalidArgument."""
    try:
        spec = json_loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the process of exec is not JSON: {error}") from None
    if not isinstance(spec, dict):
        raise InvalidArgument("the process of exec is not a JSON object")
    if bool(spec.get("terminal")) == terminal:
        return value  # as it came: numbers and unknown fields survive
    spec["terminal"] = terminal
    return json_dumps(spec).encode()
