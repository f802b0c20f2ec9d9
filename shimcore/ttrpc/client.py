"""A synchronous, thread-safe ttrpc client: many calls at once over one unix-socket connection."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, Self, TypeVar, overload

from shimcore._frames import encode_request
from shimcore.errors import Closed, InvalidArgument
from shimcore.ttrpc.calls import Call, MessageLike, Stream, serialized
from shimcore.ttrpc.codec import FLAG_NO_DATA, FLAG_REMOTE_CLOSED, FLAG_REMOTE_OPEN, MESSAGE_MAX
from shimcore.ttrpc.connection import Connection

#: Metadata key that names the containerd namespace of a call.
NAMESPACE_KEY = "containerd-namespace-ttrpc"

MetadataLike = Mapping[str, str] | Iterable[tuple[str, str]]

_INT64_MAX = (1 << 63) - 1


class Parsed(Protocol):
    def ParseFromString(self, serialized: bytes, /) -> int: ...


R = TypeVar("R", bound=Parsed)


class Outgoing:
    """A call about to be made, as an interceptor sees it; it may change each field.

    metadata: all the pairs that will be sent, the client's own included. timeout: seconds, None for none. request: None where the
    client streams and sends nothing yet.
    """

    __slots__ = ("metadata", "method", "request", "response_class", "service", "timeout")

    def __init__(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None,
        response_class: Any,
        timeout: float | None,
        metadata: list[tuple[str, str]],
    ) -> None:
        self.service = service
        self.method = method
        self.request = request
        self.response_class = response_class
        self.timeout = timeout
        self.metadata = metadata

    @property
    def name(self) -> str:
        """Full name of the method."""
        return f"{self.service}/{self.method}"

    def encode(self) -> bytes:
        """The data of the Request. Raises InvalidArgument for text that is none."""
        if self.timeout == math.inf:
            self.timeout = None
        payload = b"" if self.request is None else serialized(self.request)
        # 0 means no deadline on the wire, and a caller's 0 does not.
        nanos = 0 if self.timeout is None else max(min(int(self.timeout * 1e9), _INT64_MAX), -_INT64_MAX) or -1
        try:
            return encode_request(self.service, self.method, payload, nanos, self.metadata)
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"{self.name}: {error}") from None

    def flags(self, client_streams: bool) -> int:
        """Of the Request's frame."""
        if not client_streams:
            return FLAG_REMOTE_CLOSED
        return FLAG_REMOTE_OPEN | (FLAG_NO_DATA if self.request is None else 0)

    def deadline(self) -> float | None:
        """Of time.monotonic(), if the call begins now."""
        return None if self.timeout is None else time.monotonic() + self.timeout


Proceed = Callable[[Outgoing], Any]
Interceptor = Callable[[Outgoing, Proceed], Any]


class Client:
    """One connection to a ttrpc server. Any number of threads may call at once; a context manager that closes it.

    address: `unix:///path`, a plain path, or `@name` (or NUL and the name) for an abstract socket.
    namespace: containerd namespace that every call carries as metadata; none when empty.
    metadata: further pairs that every call carries.
    connect_timeout: seconds for the connection to be made.
    message_max: longest answer accepted, in bytes, the envelope included.
    interceptors: each is called as interceptor(outgoing, proceed), the first one outermost, and returns what proceed(outgoing)
    returns: the answer of call(), the Call of start(), the Stream of stream().
    reconnect: make a new connection for the first call after the end of one. What was under way when it ended has failed with
    Closed all the same: nobody knows whether the server has done it.
    max_unread: bytes of streams' messages that may wait to be received; past it the peer is held up, for every call.
    max_unsent: bytes that may be queued before a stream's send() waits.

    Raises Closed when there is nobody at the address; ENOENT and ECONNREFUSED fail at once.
    """

    def __init__(
        self,
        address: str,
        *,
        namespace: str = "",
        metadata: MetadataLike = (),
        connect_timeout: float = 10.0,
        message_max: int = MESSAGE_MAX,
        interceptors: Iterable[Interceptor] = (),
        reconnect: bool = False,
        max_unread: int = 8 << 20,
        max_unsent: int = 8 << 20,
    ) -> None:
        self.address = address
        self._metadata = pairs(metadata)
        if namespace:
            self._metadata.append((NAMESPACE_KEY, namespace))
        self._interceptors = tuple(interceptors)
        self._connect = partial(Connection, address, connect_timeout, message_max, max_unread, max_unsent)
        self._connection = self._connect()
        self._reconnect = reconnect
        self._connecting = threading.Lock()
        self._callbacks: list[Callable[[Closed], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._connection.closed is not None

    def peer_credentials(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the process that listened, as it was then (SO_PEERCRED, unix(7)). Raises Closed."""
        return self._connection.peer_credentials()

    def on_close(self, callback: Callable[[Closed], None]) -> None:
        """Has `callback` called once, on the reader thread, when the connection ends; at once and here if it has. With
        `reconnect` it is called for the end of every connection.
        """
        with self._connecting:
            self._callbacks.append(callback)
            connection = self._connection
        connection.on_close(callback)

    @overload
    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike,
        response_class: type[R],
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R: ...

    @overload
    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> bytes: ...

    def call(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: type[R] | None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R | bytes:
        """Calls and waits for the answer.

        service, method: full name of the service, and of the method in it. request: a protobuf message, or
        one already encoded. response_class: class of the answer's message; without it the answer's bytes are
        returned. timeout: seconds for everything, queueing and writing included; None and math.inf wait for
        ever. The server is told it. metadata: pairs for this call, behind the client's own; keys are sent in
        lower case.

        Raises the error of shimcore.errors for the status that the server sent; DeadlineExceeded; Closed when
        the connection ended; ResourceExhausted when either message is too long; Internal for an answer that
        does not parse.
        """
        outgoing = self._outgoing(service, method, request, response_class, timeout, metadata)
        answer: R | bytes = intercepted(self._interceptors, lambda outgoing: self._start(outgoing).result(), outgoing)
        return answer

    @overload
    def start(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike,
        response_class: type[R],
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Call[R]: ...

    @overload
    def start(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: None = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Call[bytes]: ...

    def start(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike = b"",
        response_class: Any = None,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Call[Any]:
        """As call(), but does not wait: the Call that it returns has the answer, and can be cancelled. One that is neither
        answered nor cancelled, nor asked for its result, is kept for as long as the connection lives.
        """
        outgoing = self._outgoing(service, method, request, response_class, timeout, metadata)
        call: Call[Any] = intercepted(self._interceptors, self._start, outgoing)
        return call

    @overload
    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None,
        response_class: type[R],
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[R]: ...

    @overload
    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None = None,
        response_class: None = None,
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[bytes]: ...

    def stream(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None = None,
        response_class: Any = None,
        *,
        client_streams: bool,
        server_streams: bool,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> Stream[Any]:
        """Calls a method that streams.

        client_streams, server_streams: which side sends many messages, as the method's descriptor says. request: the one
        request of a method whose client does not stream; the first message, or None, of one whose client does. timeout: seconds
        for the whole stream. The rest is as for call().

        Raises Closed; ResourceExhausted when the request is too long.
        """

        def make(connection: Connection, name: str, response_class: Any, deadline: float | None) -> Stream[Any]:
            sides = {"client_streams": client_streams, "server_streams": server_streams}
            return Stream(connection, name, response_class, deadline, **sides)

        outgoing = self._outgoing(service, method, request, response_class, timeout, metadata)
        stream: Stream[Any] = intercepted(
            self._interceptors, lambda outgoing: self._open(outgoing, outgoing.flags(client_streams), make), outgoing
        )
        return stream

    def close(self) -> None:
        """Ends the connection and waits until callbacks have run; calls in flight fail with Closed. Idempotent."""
        with self._connecting:
            self._reconnect = False
        self._connection.close()

    # ---- how a call is made ----

    def _outgoing(
        self,
        service: str,
        method: str,
        request: bytes | MessageLike | None,
        response_class: Any,
        timeout: float | None,
        metadata: MetadataLike,
    ) -> Outgoing:
        return Outgoing(service, method, request, response_class, timeout, self._metadata + pairs(metadata))

    def _start(self, outgoing: Outgoing) -> Call[Any]:
        return self._open(outgoing, FLAG_REMOTE_CLOSED, Call)

    def _open(self, outgoing: Outgoing, flags: int, make: Callable[[Connection, str, Any, float | None], _E]) -> _E:
        name, data = outgoing.name, outgoing.encode()
        deadline = outgoing.deadline()
        connection = self._live()
        under_way = make(connection, name, outgoing.response_class, deadline)
        try:
            connection.open(under_way, flags, data)
        except Closed:
            if not self._reconnect:
                raise
            # It has ended since we looked, and nothing was sent.
            connection = self._live()
            under_way = make(connection, name, outgoing.response_class, deadline)
            connection.open(under_way, flags, data)
        return under_way

    def _live(self) -> Connection:
        """The connection, made anew if it has ended and may be."""
        connection = self._connection
        if connection.closed is None or not self._reconnect:
            return connection
        connection.settle()
        with self._connecting:
            if self._connection.closed is not None and self._reconnect:
                connection = self._connect()
                for callback in self._callbacks:
                    connection.on_close(callback)
                self._connection = connection
            return self._connection


_E = TypeVar("_E", Call[Any], Stream[Any])


def intercepted(interceptors: Iterable[Interceptor], proceed: Proceed, outgoing: Outgoing) -> Any:
    """What `proceed` returns, with the interceptors around it; the first one is the outermost."""
    for interceptor in reversed(tuple(interceptors)):
        proceed = _around(interceptor, proceed)
    return proceed(outgoing)


def _around(interceptor: Interceptor, proceed: Proceed) -> Proceed:
    return lambda outgoing: interceptor(outgoing, proceed)


def pairs(metadata: MetadataLike) -> list[tuple[str, str]]:
    items = metadata.items() if isinstance(metadata, Mapping) else metadata
    return [(key.lower(), value) for key, value in items]
