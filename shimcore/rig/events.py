"""containerd's Events endpoint, as a shim meets it at TTRPC_ADDRESS: it can be up, slow, mute, frozen or
down.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError as ProtobufDecodeError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from shimcore.protos import anys, events_pb2, forward_pb2
from shimcore.ttrpc import codec

SERVICE = "containerd.services.events.ttrpc.v1.Events"

UP = "up"  # answers at once
SLOW = "slow"  # answers after `delay` seconds, one request after the other
MUTE = "mute"  # reads and notes everything, answers nothing
FROZEN = "frozen"  # a stopped process: the kernel takes connections and fills buffers, nobody reads
DOWN = "down"  # no socket at all, connections closed

_KINDS: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        events_pb2.TaskCreate, events_pb2.TaskStart, events_pb2.TaskExit, events_pb2.TaskDelete,
        events_pb2.TaskExecAdded, events_pb2.TaskExecStarted, events_pb2.TaskOOM, events_pb2.TaskPaused,
        events_pb2.TaskResumed, events_pb2.TaskCheckpointed,
    )
}  # fmt: skip


def message_of(packed: Any) -> Any:
    """The event in an envelope's Any; the Any itself when nobody has imported its kind. Raises DecodeError."""
    kind = _KINDS.get(anys.name(packed))
    if kind is None:
        try:
            kind = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(anys.name(packed)))
        except KeyError:
            return packed
    return kind.FromString(packed.value)


class EventError(Exception):
    """No such event came in time; the text lists those that did."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event that arrived.

    at: when its last byte was read, monotonic ns. sent: the envelope's own timestamp, ns since 1970.
    message: the event; of a kind that nobody has imported, the Any. answered: whether it was acknowledged.
    connection: number of the connection it came on, from 1. raw: the request's bytes as they came, envelope and all,
    so that a replay can be compared.
    """

    at: int
    topic: str
    namespace: str
    message: Any
    sent: int
    answered: bool
    connection: int
    raw: bytes = b""

    @property
    def container(self) -> str:
        """The container's id, "" when the message has none."""
        return str(getattr(self.message, "container_id", ""))

    @property
    def process(self) -> str:
        """ "" for init, else the id of the exec that the event is about."""
        message = self.message
        name = getattr(message, "exec_id", "") or getattr(message, "id", "")
        return "" if name == self.container else str(name)

    def __str__(self) -> str:
        fields = " ".join(
            f"{field.name}={value}"
            for field, value in self.message.ListFields()
            if field.name in ("exec_id", "id", "pid", "exit_status")
        )
        return f"{self.topic} {self.container} {fields}".rstrip()


class Events:
    """The endpoint. `address`: path of its socket. A context manager; starts in mode UP.

    All methods may be called from any thread.
    """

    def __init__(self, path: Path, *, mode: str = UP, delay: float = 0.1) -> None:
        """path: of the unix socket, 107 bytes at most. delay: seconds that SLOW waits before each answer."""
        self.address = str(path)
        self.delay = delay
        self.mode = DOWN
        self.malformed: list[str] = []
        self.refused: list[Event] = []
        #: Called with each event that is taken, on the thread of its connection, before it is answered.
        self.came: Callable[[Event], None] = lambda event: None
        self._refusals: list[int] = []
        self._path = path
        self._all: list[Event] = []
        # Guards everything here. Handed out by notify_all when an event came or the mode changed.
        self._changed = threading.Condition()
        self._listener: socket.socket | None = None
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._accepted = 0
        self._acceptor: threading.Thread | None = None
        self.set_mode(mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what came -----------------------------------------------------------------------------------------

    @property
    def all(self) -> list[Event]:
        """Every event so far, in the order of arrival."""
        with self._changed:
            return list(self._all)

    def of(self, container: str) -> list[Event]:
        """The events of one container so far."""
        return [event for event in self.all if event.container == container]

    def topics(self, container: str = "") -> list[str]:
        """Topics so far, of one container or of all."""
        return [event.topic for event in self.all if not container or event.container == container]

    def clear(self) -> None:
        """Forgets what came so far."""
        with self._changed:
            self._all = []

    def wait(
        self,
        topic: str = "",
        *,
        container: str = "",
        process: str | None = None,
        where: Callable[[Event], bool] | None = None,
        count: int = 1,
        timeout: float = 10.0,
    ) -> Event:
        """The `count`th event that fits all that is given, which may have come before the call.

        process: "" for init, an exec's id, None for either. timeout: seconds. Raises EventError.
        """

        def fits(event: Event) -> bool:
            return (
                (not topic or event.topic == topic)
                and (not container or event.container == container)
                and (process is None or event.process == process)
                and (where is None or where(event))
            )

        deadline = time.monotonic() + timeout
        with self._changed:
            looked, found = self._all, 0
            at = 0
            while True:
                if looked is not self._all:  # cleared meanwhile
                    looked, found, at = self._all, 0, 0
                while at < len(looked):
                    event = looked[at]
                    at += 1
                    found += fits(event)
                    if found == count:
                        return event
                left = deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                else:
                    came = "".join(f"\n  {event}" for event in self._all) or " nothing"
                    wanted = " ".join(filter(None, [topic, container, process]))
                    raise EventError(f"no event {wanted!r} within {timeout} s; what came:{came}")

    def count(self, topic: str = "") -> int:
        """How many events of a topic, or in all, have come so far."""
        with self._changed:
            return sum(not topic or event.topic == topic for event in self._all)

    # ---- how it behaves ------------------------------------------------------------------------------------

    def set_mode(self, mode: str, *, delay: float | None = None) -> None:
        """UP, SLOW, MUTE, FROZEN or DOWN. Connections live on except through DOWN; only DOWN removes the
        socket.
        """
        if mode not in (UP, SLOW, MUTE, FROZEN, DOWN):
            raise ValueError(f"no such mode: {mode!r}")
        with self._changed:
            self.mode = mode
            if delay is not None:
                self.delay = delay
            self._changed.notify_all()
        if mode == DOWN:
            self._go_down()
        elif self._listener is None:
            self._come_up()

    def refuse(self, count: int = 1, *, code: int = 14) -> None:
        """The next `count` events are not taken but put into `refused`: answered with an error of this code (that of
        shimcore.errors), or, with code 0, by closing the connection."""
        with self._changed:
            self._refusals += [code] * count

    def restart(self, away: float = 0.0) -> None:
        """Goes down, for `away` seconds, and comes up again on a new socket at the same path."""
        self.set_mode(DOWN)
        if away:
            time.sleep(away)
        self.set_mode(UP)

    def close(self) -> None:
        """Goes down for good. Idempotent."""
        self.set_mode(DOWN)

    def _come_up(self) -> None:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(self.address)
        os.chmod(self.address, 0o600)
        listener.listen(128)
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="events", daemon=True)
        self._acceptor.start()

    def _go_down(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._path.unlink(missing_ok=True)
        # shutdown(2) is what wakes accept and recv in another thread; close alone does not.
        listener.shutdown(socket.SHUT_RDWR)
        if self._acceptor:
            self._acceptor.join()
        listener.close()
        with self._changed:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join()

    # ---- threads -------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._changed:
                self._accepted += 1
                name = f"events {self._accepted}"
                thread = threading.Thread(target=self._serve, args=(connection, self._accepted), name=name, daemon=True)
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        parser = codec.FrameParser()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self.mode != FROZEN)
                data = connection.recv(1 << 18)
                at = time.monotonic_ns()
                if not data:
                    return
                for frame in parser.feed(data):
                    self._handle(connection, number, frame, at)
        except OSError:
            return
        finally:
            with self._changed:
                self._connections.pop(connection, None)
            connection.close()

    def _handle(self, connection: socket.socket, number: int, frame: codec.Frame, at: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.mode != FROZEN)
            mode = self.mode
        answer = self._take(frame, number, at, mode)
        if mode == SLOW:
            with self._changed:
                self._changed.wait_for(lambda: self.mode == DOWN, self.delay)
        if answer is not None and mode in (UP, SLOW):
            reply = codec.encode_frame(frame.stream_id, codec.TYPE_RESPONSE, 0, answer)
            connection.sendall(reply, socket.MSG_NOSIGNAL)

    def _take(self, frame: codec.Frame, number: int, at: int, mode: str) -> bytes | None:
        if frame.oversize:
            return codec.encode_response(code=8, message=f"message of {frame.oversize} bytes is too long")
        if frame.type != codec.TYPE_REQUEST:
            return None
        try:
            request = codec.decode_request(frame.data)
            if (request.service, request.method) != (SERVICE, "Forward"):
                return codec.encode_response(code=12, message=f"{request.service}/{request.method}")
            envelope = forward_pb2.ForwardRequest.FromString(request.payload).envelope
            message = message_of(envelope.event)
        except (codec.DecodeError, ProtobufDecodeError) as error:
            with self._changed:
                self.malformed.append(str(error))
            return codec.encode_response(code=3, message=str(error))
        event = Event(
            at=at,
            topic=envelope.topic,
            namespace=envelope.namespace,
            message=message,
            sent=envelope.timestamp.ToNanoseconds(),
            answered=mode in (UP, SLOW),
            connection=number,
            raw=frame.data,
        )
        with self._changed:
            if self._refusals:
                self.refused.append(event)
                code = self._refusals.pop(0)
                self._changed.notify_all()
                if not code:
                    raise ConnectionAbortedError
                return codec.encode_response(code=code, message="refused")
            self._all.append(event)
            self._changed.notify_all()
        self.came(event)
        return codec.encode_response()
