"""The Task service that an author derives from: one method for each RPC of containerd.task.v2 and v3.

A method takes (request, context), a protobuf message of shimcore.protos.task_pb2 and a Context, and returns a response
message. What is not written answers Unimplemented, which containerd's clients understand. How a method is run follows from
how it is written:

    def kill(self, request, context)          on the small pool: it may block
    @inline
    def pids(self, request, context)          on the thread that read the request: quickest, must not block
    async def create(self, request, context)  a coroutine of shimcore.jobs: parks its RPC while it awaits a runtime call
"""

from __future__ import annotations

from ._ttrpc import COROUTINE, INLINE, POOL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeVar

    from ._reaper import Slot
    from ._ttrpc import Server

    F = TypeVar("F", bound=Callable[..., Any])

TASK_V2 = "containerd.task.v2.Task"
TASK_V3 = "containerd.task.v3.Task"

# The RPCs: the method that serves each, and the message that it takes. Written here too, so that a daemon can serve before it has
# imported protobuf.
RPCS = {
    "Create": ("create", "CreateTaskRequest"),
    "Start": ("start", "StartRequest"),
    "State": ("state", "StateRequest"),
    "Delete": ("delete", "DeleteRequest"),
    "Kill": ("kill", "KillRequest"),
    "Exec": ("exec", "ExecProcessRequest"),
    "Pids": ("pids", "PidsRequest"),
    "Pause": ("pause", "PauseRequest"),
    "Resume": ("resume", "ResumeRequest"),
    "Checkpoint": ("checkpoint", "CheckpointTaskRequest"),
    "Update": ("update", "UpdateTaskRequest"),
    "ResizePty": ("resize_pty", "ResizePtyRequest"),
    "CloseIO": ("close_io", "CloseIORequest"),
    "Wait": ("wait", "WaitRequest"),
    "Stats": ("stats", "StatsRequest"),
    "Connect": ("connect", "ConnectRequest"),
    "Shutdown": ("shutdown", "ShutdownRequest"),
}

_ASYNC = 0x80 | 0x200  # CO_COROUTINE and CO_ASYNC_GENERATOR of inspect, a module that costs ten milliseconds


def inline(method: F) -> F:
    """Mark a handler that never blocks: it runs on the thread that read its request."""
    method.__dict__["shimcore_inline"] = True
    return method


def kind_of(handler: Callable[..., Any]) -> int:
    """COROUTINE for `async def`, INLINE for what is marked so, POOL for the rest."""
    function = getattr(handler, "__func__", handler)
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & _ASYNC:
        return COROUTINE
    return INLINE if getattr(function, "shimcore_inline", False) else POOL


class Task:
    """Derive from it and write the methods of RPCS that the shim offers.

    native: State, Wait and Connect are answered in C from the core's exit table, to which the service gives every process that
    it makes (Core.open, Core.reserve); the methods of these names are then not called.
    """

    native = False
    teardown_timeout = 5.0  # seconds that an exit waits for `teardown`, if the author has written it

    def teardown(self, slot: Slot) -> Coroutine[Any, Any, None] | None:
        """Called on a pool thread (or awaited, when it is a coroutine) after a process has ended and before its exit is told.

        Write it to undo what must be undone by the time that containerd hears of the exit. When teardown_timeout has passed the
        exit is told all the same. For shims that give their processes to the exit table."""

    def on_exit(self, slot: Slot) -> Coroutine[Any, Any, None] | None:
        """Called on the RPC thread after the exit of a slot's process was told; must not block. It may be a coroutine, as on_pid
        and on_signal may."""

    def describe(self) -> dict[str, object]:
        """What a state dump says of this service: anything that JSON can hold, but no secrets (environments, arguments). Called
        on a pool thread while calls are being handled."""
        return {}

    def counters(self) -> dict[str, tuple[str, int]]:
        """Counters of this service for /metrics: name (`shimcore_` goes before it, `_total` behind) to help text and value.
        Called as describe is."""
        return {}

    def hand_over(self, trial: bool) -> dict[str, Any]:
        """What `take_over` needs in another image of this process, when the shim is upgraded in place (docs/upgrade.md). Not
        written, such an upgrade is refused.

        The exit table, its slots and Waits are taken over anyhow. Return what JSON can hold, or bytes; under `fds` a list of the
        fds that are to stay open under their numbers. Called on the RPC thread, with no call under way, and with `trial`
        beforehand, at any time: nothing is to be stopped then. After it nothing may be changed until `go_on`. Raise
        FailedPrecondition where there is what can't be taken over."""
        from .errors import FailedPrecondition

        raise FailedPrecondition(f"{type(self).__name__} has no hand_over() and take_over(): it can't be upgraded in place")

    def take_over(self, state: dict[str, Any]) -> None:
        """Be as the one that `hand_over` was called of, in the new code: before anything is served. Slots are found by Core.find.

        Also called by the trial, in a process that ends then, and in which the fds are not there: do nothing that can be seen
        from outside, and start no thread."""

    def go_on(self) -> None:
        """Go on: after `take_over`, once children are watched, or after a `hand_over` that has led to nothing."""

    def on_pid(self, pid: int, status: int) -> Coroutine[Any, Any, None] | None:
        """Called on the RPC thread when a child was reaped (not with `native`): status is its code, or 128 + signal."""

    def holds(self) -> bool:
        """Whether a SIGTERM must not end the shim yet for what is not in the exit table, a pod's sandbox for one. On the RPC
        thread; must not block."""
        return False

    def let_go(self) -> None:
        """For a service whose holds() has become false: ends the shim if a SIGTERM waits for that. On the RPC thread."""
        if self._let_go is not None:
            self._let_go()

    _let_go: Callable[[], None] | None = None  # set by who serves

    def on_signal(self, signum: int) -> Coroutine[Any, Any, None] | None:
        """Called on the RPC thread when the shim got SIGTERM, SIGINT or SIGPIPE, which have been logged; must not block."""

    def _served(self, name: str) -> Any:
        """The method of this name as a server is to call it, None: there is none. Another flavour gives its own (aio)."""
        return getattr(self, name, None)


def register(server: Server, task: Task, services: tuple[str, ...] = (TASK_V2, TASK_V3)) -> None:
    """Serve a task service under the given names. v3 has v2's messages, byte for byte, so one set of classes does for both."""
    from .protos.lazy import Message, task_pb2

    methods = {}
    for rpc, (name, message) in RPCS.items():
        handler = task._served(name)
        if handler is not None:
            methods[rpc] = (kind_of(handler), handler, Message(task_pb2, message))
    for service in services:
        server.add_service(service, methods)
    if task.native:
        server.native_task(*services)
