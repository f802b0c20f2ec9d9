"""What a caller holds of one call: a Call, which has one answer, or a Stream, which has messages.

The protocol has no frame that cancels: a peer learns nothing of a cancelled call, and ends it when its deadline has passed or the
connection ends. Here its slot is free at once, and what still comes for it is dropped.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from shimcore._frames import decode_response
from shimcore.errors import (
    Canceled,
    Closed,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    ShimError,
    from_code,
)
from shimcore.ttrpc.codec import (
    FLAG_NO_DATA,
    FLAG_REMOTE_CLOSED,
    TYPE_DATA,
    TYPE_RESPONSE,
    DecodeError,
    Frame,
    Response,
)
from shimcore.ttrpc.connection import Connection


class MessageLike(Protocol):
    """A protobuf message, as far as a request needs it."""

    def SerializeToString(self) -> bytes: ...


R = TypeVar("R")


def serialized(message: bytes | MessageLike) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


class UnderWay(Generic[R]):
    """A call under way, with threads or with asyncio. `method` is its full name; stream_id is 0 until it has been sent."""

    def __init__(self, address: str, method: str, response_class: Any, deadline: float | None) -> None:
        self.method = method
        self.stream_id = 0
        self._address = address
        self._response_class = response_class
        self._deadline = deadline
        self._error: ShimError | None = None

    def _parsed(self, raw: bytes) -> R:
        if self._response_class is None:
            return raw  # type: ignore[return-value]
        message = self._response_class()
        try:
            message.ParseFromString(raw)
        except Exception as error:  # protobuf's DecodeError, not imported for a client of bytes
            raise Internal(f"{self.method}: answer does not parse: {error}") from None
        result: R = message
        return result

    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.method}: no answer from {self._address} in time")

    def left(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline is None else min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX)

    def _response(self, frame: Frame) -> Response:
        """The status and payload of a final frame. Raises what the call has failed with."""
        if frame.oversize:
            raise ResourceExhausted(f"{self.method}: answer of {frame.oversize} bytes is too long")
        if frame.type != TYPE_RESPONSE:
            raise Internal(f"{self.method}: a frame of type {frame.type} came where a response was due")
        try:
            response = decode_response(frame.data)
        except DecodeError as error:
            raise Internal(f"{self.method}: answer does not parse: {error}") from None
        if response.code:
            raise from_code(response.code, response.message)
        return response


class Call(UnderWay[R]):
    """A call with one answer. Any thread may wait for it, or cancel it."""

    def __init__(self, connection: Connection, method: str, response_class: Any, deadline: float | None) -> None:
        super().__init__(connection.address, method, response_class, deadline)
        self._connection = connection
        self._frame: Frame | None = None
        # One that had no time to begin with has failed, however quick the peer is.
        left = self.left()
        self._hopeless = left is not None and left <= 0
        # Held locked until the outcome is set.
        self._gate = threading.Lock()
        self._gate.acquire()

    def done(self) -> bool:
        """Whether it has been answered, has failed or was cancelled; result() then does not wait."""
        return self._frame is not None or self._error is not None

    def cancel(self) -> bool:
        """Give it up: result() raises Canceled. False: it was over already."""
        return self._give_up(Canceled(f"{self.method}: cancelled here"))

    def result(self) -> R:
        """Wait for the answer, until the call's deadline at most.

        Raises the error of shimcore.errors for the status that the server sent; DeadlineExceeded; Canceled; Closed when the
        connection ended; ResourceExhausted when the answer is too long; Internal for one that does not parse.
        """
        left = self.left()
        if left is None:
            self._gate.acquire()
            self._gate.release()
        elif left > 0 and self._gate.acquire(timeout=left):
            self._gate.release()
        else:
            self._give_up(self.late())
        if self._error is not None:
            raise copy.copy(self._error)
        assert self._frame is not None
        return self._parsed(self._response(self._frame).payload)

    def _give_up(self, error: ShimError) -> bool:
        with self._connection.lock:
            if self.done():
                return False
            self._error = error
            self._connection.forget(self)
            self._gate.release()
            return True

    # ---- for the connection, under its lock ----

    def take(self, frame: Frame) -> bool:
        if not self._hopeless:
            self._frame = frame
            self._gate.release()
        return True

    def fail(self, error: Closed) -> None:
        self._error = error
        self._gate.release()


class _Connection(Protocol):
    address: str

    def came(self, count: int) -> None: ...
    def took(self, count: int) -> None: ...
    def forget(self, exchange: Any) -> None: ...


class StreamState(UnderWay[R]):
    """What a stream is made of, with threads, under its connection's lock, or with asyncio."""

    _connection: _Connection

    def __init__(
        self,
        connection: _Connection,
        method: str,
        response_class: Any,
        deadline: float | None,
        *,
        client_streams: bool,
        server_streams: bool,
    ) -> None:
        super().__init__(connection.address, method, response_class, deadline)
        self._connection = connection
        self._sends = client_streams
        self._server_streams = server_streams
        self._messages: deque[bytes] = deque()
        self._over = False

    def _changed(self) -> None:
        """A message has come, or it is over: for whoever waits."""
        raise NotImplementedError

    def _may_send(self) -> None:
        if not self._sends:
            raise FailedPrecondition(f"{self.method}: nothing can be sent: the sending side is closed")
        if self._error is not None:
            raise copy.copy(self._error)
        if self._over:
            raise FailedPrecondition(f"{self.method}: the server has ended the call")

    def _next(self) -> bytes | None:
        """A message that has come, or None, the stream being over."""
        if not self._messages:
            if self._error is not None:
                raise copy.copy(self._error)
            return None
        raw = self._messages.popleft()
        self._connection.took(len(raw))
        return raw

    def _give_up(self, error: ShimError) -> bool:
        """False: it was over already."""
        was_over = self._over
        if not was_over:
            self._connection.forget(self)
            self._finish(error)
        return not was_over

    def _drop(self) -> None:
        self._connection.took(sum(map(len, self._messages)))
        self._messages.clear()

    def _finish(self, error: ShimError | None = None) -> None:
        self._error = error
        self._over = True
        self._changed()

    def take(self, frame: Frame) -> bool:
        if frame.type == TYPE_DATA and self._server_streams and not frame.oversize:
            if not frame.flags & FLAG_NO_DATA:
                self._came(frame.data)
            if frame.flags & FLAG_REMOTE_CLOSED:
                self._finish()
            return self._over
        try:
            payload = self._response(frame).payload
        except ShimError as error:
            self._finish(error)
        else:
            # Where the server streams, an empty answer says no more than that it is over.
            if payload or not self._server_streams:
                self._came(payload)
            self._finish()
        return True

    def _came(self, raw: bytes) -> None:
        self._messages.append(raw)
        self._connection.came(len(raw))
        self._changed()

    def fail(self, error: Closed) -> None:
        self._finish(error)


class Stream(StreamState[R]):
    """A call with messages, of which either side may send many. Sending and receiving may be done on two threads. A context
    manager, which cancels what is not over. To iterate over it is to receive until the end.

    The one answer of a method whose server does not stream is received like a message, and is the last one.
    """

    _connection: Connection

    def __init__(self, connection: Connection, method: str, response_class: Any, deadline: float | None, **sides: bool) -> None:
        super().__init__(connection, method, response_class, deadline, **sides)
        self._ready = threading.Condition(connection.lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        message = self.receive()
        if message is None:
            raise StopIteration
        return message

    def send(self, message: bytes | MessageLike) -> None:
        """Send one message; waits while the connection has more unsent than its max_unsent.

        Raises FailedPrecondition after close_send(), or when the server has ended the call; ResourceExhausted for a message
        that is too long; and what receive() raises.
        """
        raw = serialized(message)
        with self._connection.lock:
            self._may_send()
            self._wait(self._connection.room, lambda: not self._connection.full() or self._over)
            self._may_send()
            self._connection.send(self, 0, raw)

    def close_send(self) -> None:
        """Tell the server that nothing more comes. Idempotent."""
        with self._connection.lock:
            if self._sends and not self._over:
                self._connection.send(self, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b"")
            self._sends = False

    def receive(self) -> R | None:
        """Wait for the next message; None after the last one.

        Raises the error of shimcore.errors for the status that the server sent; DeadlineExceeded; Canceled; Closed when the
        connection ended; ResourceExhausted for a message that is too long; Internal for one that does not parse. Messages that
        came before an error are received first.
        """
        with self._connection.lock:
            self._wait(self._ready, lambda: bool(self._messages) or self._over)
            raw = self._next()
        return None if raw is None else self._parsed(raw)

    def cancel(self) -> bool:
        """Give it up: receive() and send() raise Canceled. False: it was over already; messages that came are dropped all the
        same."""
        with self._connection.lock:
            given_up = self._give_up(Canceled(f"{self.method}: cancelled here"))
            self._drop()
            return given_up

    # ---- under the connection's lock ----

    def _wait(self, condition: threading.Condition, holds: Callable[[], bool]) -> None:
        left = self.left()
        if ((left is not None and left <= 0) or not condition.wait_for(holds, left)) and self._give_up(self.late()):
            self._drop()

    def _changed(self) -> None:
        self._ready.notify_all()
        self._connection.room.notify_all()
