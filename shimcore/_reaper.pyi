"""The core's processes and exits as Python sees them: subreaper, spawn with an fd map, pidfds, exit thread and table, jobs.

A function that enters a system call raises `OSError` with the call's name (`exc.filename` is the syscall).
Rules of the exit table come from shimcore/core/exits.h, which states them; ids are compared byte for byte.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

# Note kinds, first element of what Core.notes() returns
NOTE_JOB: Final[int]  # (NOTE_JOB, job): a runtime job has ended; job.result() answers
NOTE_TIMER: Final[int]  # (NOTE_TIMER, cookie)
NOTE_TOLD: Final[int]  # (NOTE_TOLD, slot): the slot's exit was told
NOTE_PID: Final[int]  # (NOTE_PID, pid, exit_status, exited_at_ns): a watched pid, or a slot's pid, was reaped
NOTE_SIGNAL: Final[int]  # (NOTE_SIGNAL, signum): SIGTERM, SIGINT, SIGPIPE or SIGUSR1 came in
NOTE_POST: Final[int]  # (NOTE_POST, callable): run it on the consuming thread
NOTE_TEARDOWN: Final[int]  # (NOTE_TEARDOWN, slot): the process has ended, its exit waits for slot.teardown_done()
NOTE_ASKED: Final[int]  # (NOTE_ASKED, fd): somebody connects to the listener of Core.ask_fd

# Phases of a slot, in the order of its life
RESERVED: Final[int]
OPENED: Final[int]
BOUND: Final[int]
EXITED: Final[int]
TOLD: Final[int]
DROPPED: Final[int]

# Task status on the wire (containerd.v1.types.Status)
CREATED: Final[int]
RUNNING: Final[int]
STOPPED: Final[int]
PAUSED: Final[int]
PAUSING: Final[int]

def kernel_check() -> None:
    """Raise OSError(ENOSYS) with one clear line when the kernel has no pidfd_open or waitid(P_PIDFD) (Linux 5.4)."""

def set_subreaper(enable: bool = True) -> None:
    """Make this process the parent of its orphaned descendants (prctl(2), PR_SET_CHILD_SUBREAPER)."""

def get_subreaper() -> bool:
    """Whether this process is a subreaper (PR_GET_CHILD_SUBREAPER)."""

def raise_nofile() -> tuple[int, int]:
    """Raise the soft RLIMIT_NOFILE to the hard limit; children spawned by this module get the old soft limit back.

    Returns (old soft, new soft)."""

def nofile_before(set: tuple[int, int] | None = None) -> tuple[int, int]:
    """Soft and hard RLIMIT_NOFILE that children get, which is what there was before raise_nofile(). set: say it, instead."""

def early_signals() -> None:
    """Remember SIGTERM, SIGINT, SIGPIPE and SIGUSR1 for install_signals(), and unblock them here."""

def handled() -> Any:
    """The call that this thread handles: a _ttrpc.Context; None outside of calls."""

def switch(call: Any) -> Any:
    """Have this thread handle that call, or None; returns the one before. The caller keeps `call` alive until then."""

def spawn(
    argv: Sequence[str | bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    fds: Mapping[int, int] | None = None,
    new_session: bool = False,
    new_group: bool = False,
) -> tuple[int, int]:
    """Start argv[0] (an absolute path, or looked up on PATH) and return (pid, pidfd); the caller closes the pidfd.

    fds maps the child's fd numbers to ours; any permutation will do. Of 0, 1 and 2 those not named are /dev/null; nothing
    else is inherited. The child has an empty signal mask, default dispositions and the original RLIMIT_NOFILE.
    Raises OSError with the errno of the failed exec or chdir. env None: our environment.
    """

def set_title(args: bytes, env: bytes, name: str) -> None:
    """What /proc/self/cmdline, environ and comm say: NUL-terminated strings one after the other, and a name of at most 15 bytes.
    For a process with one thread. Raises OSError, on kernels without CONFIG_CHECKPOINT_RESTORE always."""

def watch_files(paths: Iterable[str]) -> int:
    """An fd that is readable once one of these files has been written, replaced or removed (inotify). Raises OSError."""

def watch_readers(file: int) -> int:
    """A non-blocking fd that is readable once somebody, we included, has opened this open file's inode or read from it (inotify).
    Raises OSError."""

def set_limits(limits: Sequence[tuple[int, int]]) -> None:
    """(soft, hard) of each resource limit, by number, -1 for none; those that differ are set. Raises OSError."""

def set_environment(block: bytes) -> None:
    """libc's environment is these strings, each with its NUL; os.environ is not told. Only while there is one thread."""

def bound_malloc() -> None:
    """Two arenas at most for glibc's malloc (mallopt(3)): the exit thread's, and one for all others. Elsewhere nothing."""

def written_pages(pid: int) -> bytes:
    """What a fork of this process has written since, of that which both have mapped: for own_pages. Raises OSError."""

def own_pages(runs: bytes) -> None:
    """Make these pages this process's own, as a write would. Raises OSError (EINVAL: Linux before 5.14)."""

def set_death_signal(signum: int) -> None:
    """The signal that this process gets when the thread that made it ends (PR_SET_PDEATHSIG); 0: none."""

def pidfd_open(pid: int) -> int: ...
def pidfd_send_signal(pidfd: int, signum: int) -> None: ...
def wait_pidfd(pidfd: int) -> int | None:
    """The exit status of a child that has ended (reaping it), or None: it has not. Raises ChildProcessError."""

def cgroup_signal(procs: str, signum: int) -> int:
    """Signal every process of a cgroup.procs file and of those below its folder, through pidfds. Returns how many."""

def mount(source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None) -> None: ...
def mount_in(cwd: bytes, source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None) -> None:
    """mount(2) from a forked child whose cwd is `cwd` (for overlay options that must stay under a page)."""

def umount2(target: bytes, flags: int) -> None: ...
def exit_code(status: int) -> int:
    """A wait status as the exit status that containerd is told: the code, or 128 + signal."""

class ExitSignal:
    """Sticky signal from whoever ends the shim to everyone who waits for that; one lock-free flag and a futex."""

    def signal(self) -> None: ...
    def wait(self, timeout: float | None = None) -> bool:
        """Block until signalled; timeout in seconds. Returns whether it was signalled. Many threads may wait."""
    def is_set(self) -> bool: ...

class Slot:
    """One process of the exit table: a container's init (exec_id "") or an exec.

    Life: reserved -> opened -> bound -> exited -> told, or dropped. Made by Core.open and Core.reserve only."""

    container_id: str
    exec_id: str
    cookie: Any  # whatever the service keeps here
    @property
    def phase(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def status(self) -> int: ...
    @property
    def exit_status(self) -> int: ...
    @property
    def exited_at(self) -> int:
        """Wall-clock ns since the epoch at which the exit was reaped; 0 before."""
    def open(self) -> None:
        """reserved -> opened: call before the process is made. Raises FailedPrecondition when the container's init has exited."""
    def bind(self, pid: int) -> None:
        """opened -> bound: this pid is the slot's process, dead or alive. One that has gone without our having reaped it is told
        as 255. Raises OSError(EINVAL) when the slot is not opened."""
    def announce(self, topic: str = "", type_url: str = "", payload: bytes = b"") -> None:
        """Queue the event that makes this process known (TaskCreate, TaskExecStarted) and allow its exit to be told after it."""
    def hold(self) -> None:
        """Hold the telling of an exit back (counted) until release(): Start holds init from runc start to TaskStart."""
    def release(self, topic: str = "", type_url: str = "", payload: bytes = b"") -> None:
        """Queue an event, if one is given, then let go of one hold."""
    def set_status(self, status: int) -> None:
        """What State answers while the exit is not told (CREATED, RUNNING, PAUSED, PAUSING)."""
    def set_kill_rest(self, cgroup_procs: str, timeout: float = 10.0) -> None:
        """Init only: no private pid namespace; at its exit kill what is left in this cgroup.procs file (and below its folder)."""
    def set_ledger(self, path: str) -> None:
        """Init only: record the exits of this container and its execs in this file before they are told. May block: not on the
        RPC thread. Raises OSError."""
    def set_teardown(self, timeout: float) -> None:
        """At this process's exit NOTE_TEARDOWN comes first, and its telling waits for teardown_done(), at most timeout s."""
    def teardown_done(self) -> None: ...
    def watch_oom(self, folder: str, v2: bool) -> None:
        """Init only: tell TaskOOM for OOM kills in this cgroup (v1: the memory hierarchy's folder), before the exits they cause.
        Raises OSError."""
    def drop(self) -> None:
        """The runtime failed and there is no process: parked Waits are answered with 255, no exit is told. After bind: no-op."""
    def forget(self) -> None:
        """Take the slot out of the table (Delete); FailedPrecondition unless told, dropped or reserved. Init: execs too."""
    def kill(self, signum: int) -> None:
        """Signal through the pidfd. NotFound when exited (told or not), FailedPrecondition when there is no process yet."""

class JobResult:
    pid: int
    status: int  # exit code, or 128 + signal; 255 when it could not be learnt
    signaled: bool
    output: bytes  # stdout and stderr together, at most cap bytes
    truncated: bool
    timed_out: bool

class Job:
    cookie: Any
    def result(self) -> JobResult: ...

class Core:
    """The exit thread and all that it owns. One per process in a shim; tests make as many as they like.

    namespace: containerd namespace for the events' envelope. events_address: TTRPC_ADDRESS, a plain socket path ("" = nowhere).
    """

    teardown_timeout: float  # seconds; > 0: the exit of every slot made from now on waits for its NOTE_TEARDOWN to be handled
    pool: Any  # what jobs.in_pool submits to: an object with submit(callable)
    def __init__(self, namespace: str = "", events_address: str = "") -> None: ...
    def install_signals(self, sigchld: bool = True) -> None:
        """Handlers (no blocking of signals) for SIGCHLD, SIGTERM, SIGINT, SIGPIPE, SIGUSR1. One Core per process has them."""
    def run(self) -> bool:
        """Be the exit thread until stop(): call it on the thread-group leader; it releases the GIL for good. True: pause() has
        ended it, and it may be called again."""
    def pause(self, on: bool) -> None:
        """Have run() return, or not any more; any thread."""
    def busy(self) -> str | None:
        """Why the exit table can't be saved now; None: it can."""
    def save(self, whole: bool = True) -> dict[str, Any]:
        """For another image of this process: the exit table, the outbox, and, as `fds`, the numbers of their files. While run()
        is paused; not whole: at any time, and without the outbox."""
    def restore(self, state: dict[str, Any]) -> None:
        """Have what save() has seen, before run(): the outbox is the core's from now on; the slots are not watched or told yet.
        Raises OSError."""
    def resume(self, state: dict[str, Any]) -> None:
        """Go on with the slots, whose fds are the core's from now on; before install_signals()."""
    def stop(self) -> None: ...
    def drain(self, timeout: float) -> bool:
        """Wait until the outbox is empty (every event acknowledged), at most timeout seconds."""
    def open(self, container_id: str, state: bytes = b"") -> Slot:
        """Open init's slot of a new container, before the runtime is asked. state: the constant fields of its StateResponse,
        serialized. Raises AlreadyExists."""
    def reserve(self, container_id: str, exec_id: str, state: bytes = b"") -> Slot:
        """Reserve an exec id or, with "", the id of a container whose init Start will make. Raises NotFound (no such container),
        AlreadyExists."""
    def find(self, container_id: str, exec_id: str = "") -> Slot | None: ...
    def slots(self) -> list[Slot]: ...
    def publish(self, topic: str, type_url: str, payload: bytes, container_id: str = "", exec_id: str = "") -> None:
        """Queue an event for containerd, in order. container_id and exec_id are the key within which order is kept end to end."""
    def spill(self, path: str, cap: int = ...) -> int:
        """Where events wait that memory has no room for (bytes at most: cap). What an earlier shim left there is sent first;
        returns how many events that is. May block. Raises OSError."""
    def keep(self) -> int:
        """At the end: put what is unsent into the spill file; returns how many events. Raises OSError."""
    def watch(self, pid: int) -> None:
        """Own a child that is no task's process: it is waited for by pidfd and comes back as NOTE_PID."""
    def job(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout: float,
        cap: int = 65536,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        fds: Mapping[int, int] | None = None,
        cookie: Any = None,
        dies_with_thread: bool = False,
    ) -> Job:
        """Start a runtime call. Of 0, 1 and 2 those not in fds: 0 is /dev/null, 1 and 2 are captured together up to cap bytes.
        At the deadline (timeout, seconds) its process group is SIGKILLed. dies_with_thread: the kernel SIGKILLs the process when
        the calling thread ends, and so when this process is killed (PR_SET_PDEATHSIG). Ends as a NOTE_JOB."""
    def timer(self, seconds: float, cookie: Any) -> None: ...
    def post(self, callable: Any) -> None: ...
    def ask_fd(self, fd: int) -> None:
        """NOTE_ASKED, once, when somebody connects to this listener; each further call waits for the next one. -1: for nobody,
        and before the fd is closed. Raises OSError."""
    tell_pids: bool  # whether every reaped child, orphans included, comes back as NOTE_PID
    @property
    def notes_fd(self) -> int:
        """Readable when there are notes (eventfd)."""
    def take(self) -> list[tuple[Any, ...]]:
        """The notes that are there, without waiting."""
    def notes(self, timeout: float | None = None) -> list[tuple[Any, ...]]:
        """Block for notes and take them all; for a process with no RPC thread. timeout in seconds, None: no limit."""
    def stats(self) -> dict[str, int]: ...
    def events(self, after: int = 0, timeout: float = 0.0) -> list[tuple[int, bytes | None]]:
        """The last events queued for containerd (at most 128) with a number above `after`, which is counted from 1: each with the
        ttrpc Request that holds it, None for one that was too long to be kept.

        Waits up to `timeout` seconds while there is none. Blocks without the interpreter's lock."""
    def end_events(self) -> None:
        """From now on `events` waits for nothing."""
    def stamps(self) -> list[tuple[str, str, int, int, int, int, int]]:
        """The last exits told: (container_id, exec_id, pid, reaped, recorded, sent, acknowledged).

        Times in ns of CLOCK_MONOTONIC, 0 = not yet."""
