"""The core's framing and RPC thread as Python sees them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from ._reaper import Core
from .trace import Trace

MAX_MESSAGE: Final[int]
INLINE: Final[int]
POOL: Final[int]
COROUTINE: Final[int]
CLIENT_STREAM: Final[int]
SERVER_STREAM: Final[int]
READABLE: Final[int]
WRITABLE: Final[int]

class Context:
    """What a handler is told about its call besides the request."""

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The pairs that the caller sent. A byte of a value that is not UTF-8 is U+FFFD."""
    @property
    def trace(self) -> Trace | None:
        """The W3C trace context that the caller sent; None: it sent none, or one that can't be read."""
    def get(self, key: str, default: str | None = None) -> str | None:
        """First value of a metadata key; case does not matter."""
    def get_all(self, key: str) -> list[str]: ...
    @property
    def remaining(self) -> float | None:
        """Seconds until the caller's deadline; None: it gave none."""
    @property
    def cancelled(self) -> bool:
        """Whether the caller's connection has gone, or its deadline passed."""
    @property
    def peer(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the peer (SO_PEERCRED)."""

    @property
    def place(self) -> tuple[int, int]:
        """The connection's fd, and the stream's id in it."""

    @property
    def service(self) -> str:
        """Full name of the service that was called."""
    @property
    def method(self) -> str:
        """Name of the method in it."""
    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have callback called once, on the thread that reads, when the caller's connection ends before its call is answered; at
        once and here if it has. It must not block."""
    def receive(self, wait: bool) -> bytes | Literal[False] | None:
        """For shimcore.streams: the peer's next message, None after the last one, False when it would have to wait."""
    def send(self, message: bytes, wait: bool) -> bool:
        """For shimcore.streams: False when it would have to wait."""
    def want(self, events: int, callback: Callable[[], None]) -> int:
        """For shimcore.streams: have callback called once on the thread that reads when it is READABLE or WRITABLE; not if the
        result is not 0, which is what it is already."""

class Server:
    """A ttrpc server whose reading thread is `run`'s. Frames are parsed in C without the GIL.

    max_message: bytes of one message, envelope included (ttrpc: 4 MiB). max_inflight: requests being handled, per connection.
    max_connections: more wait to be accepted. max_unsent: bytes that a peer may leave unread before its requests are. max_unread:
    bytes that handlers of a connection's streams may leave untaken before it is left unread. workers: threads of the pool for
    handlers that block. check_peer: only peers with our effective user and group (SO_PEERCRED). interceptors: called around each
    handler as interceptor(request, context, handler), the first one outermost; each returns what handler(request, context)
    returns."""

    @property
    def core(self) -> Core: ...
    @property
    def max_message(self) -> int: ...
    def __init__(
        self, core: Core, *, max_message: int = ..., max_inflight: int = ..., max_connections: int = ..., max_unsent: int = ...,
        max_unread: int = ..., workers: int = ..., check_peer: bool = True, interceptors: Sequence[Callable[..., Any]] = (),
    ) -> None: ...
    def add_listener(self, fd: int) -> None:
        """Accept connections from a listening stream socket; the server owns fd from now on."""
    def add_service(
        self, name: str, methods: Mapping[str, tuple[int, Callable[..., Any], Any] | tuple[int, Callable[..., Any], Any, int]]
    ) -> None:
        """methods: name on the wire -> (INLINE | POOL | COROUTINE, handler, request class) and, where it streams, CLIENT_STREAM |
        SERVER_STREAM. Handlers get (request, Context); see shimcore.streams."""
    def native_task(self, *names: str) -> None:
        """Answer State, Wait and Connect of these services in C from the core's exit table."""
    def on_note(self, callback: Callable[[tuple[Any, ...]], None]) -> None:
        """Called on the RPC thread for NOTE_TOLD, NOTE_PID and NOTE_SIGNAL."""
    def spawn_task(self, coro: Any) -> None:
        """Run a coroutine on the RPC thread, from any thread."""
    def run(self) -> None:
        """Serve until shutdown() has ended."""
    def catch_up(self) -> bool:
        """Handle the core's notes that are there; whether there were any. RPC thread."""
    def hold(self, on: bool) -> None:
        """While it is held nothing is accepted or read: who connects or asks waits. Calls that were taken are answered."""
    def under_way(self) -> list[tuple[int, int, str]]:
        """Calls that are being handled, Waits that the core answers left out: Context.place and "service/method". RPC thread."""
    def save(self) -> list[dict[str, Any]]:
        """The connections and their Waits, for another image of this process. RPC thread, held, with no other call under way."""
    def adopt(self, state: list[dict[str, Any]]) -> None:
        """Go on with them, before run(). Raises OSError."""
    def answer(self, fd: int, stream: int, payload: bytes) -> None:
        """Answer a call that an earlier image was asked, by its Context.place; nothing if its connection has gone."""
    def stats(self) -> dict[str, int]:
        """connections and in_flight (calls) now; calls, failures (answers with an error) and stood_in (times that the stand-in
        had to act) so far."""
    def shutdown(self, timeout: float = 5.0) -> bool:
        """No new connections or calls; calls in flight are answered for at most timeout seconds; then everything is closed.
        Whether the thread in run() has ended, for which it waits as many seconds once more."""
