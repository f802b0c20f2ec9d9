"""Methods that stream, on the compiled server, with a client that writes its own frames."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import jobs
from shimcore._ttrpc import CLIENT_STREAM, COROUTINE, INLINE, POOL, SERVER_STREAM, Context
from shimcore.errors import Canceled, ShimError
from shimcore.ttrpc.codec import FrameParser, decode_response, encode_frame, encode_request
from tests.served import HANG, SERVICE, Rig, call, rig

__all__ = ["rig"]

REQUEST, RESPONSE, DATA = 1, 2, 3
CLOSED, OPEN, NO_DATA = 1, 2, 4


class Raw:
    def __init__(self, rig: Rig) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG)
        self.socket.connect(rig.path)
        self.parser = FrameParser()
        self.frames: list[Any] = []

    def open(self, stream: int, method: str, payload: bytes = b"", flags: int = OPEN, seconds: float = 0) -> None:
        request = encode_request(SERVICE, method, payload, int(seconds * 1e9), ())
        self.socket.sendall(encode_frame(stream, REQUEST, flags, request))

    def data(self, stream: int, value: bytes, flags: int = 0) -> None:
        self.socket.sendall(encode_frame(stream, DATA, flags, value))

    def close(self, stream: int) -> None:
        self.data(stream, b"", CLOSED | NO_DATA)

    def next(self) -> Any:
        while not self.frames:
            got = self.socket.recv(65536)
            assert got, "the server has closed"
            self.frames.extend(self.parser.feed(got))
        return self.frames.pop(0)


def total(requests: Iterator[BytesValue], context: Context) -> BytesValue:
    return BytesValue(value=b"".join(one.value for one in requests))


async def total_later(requests: AsyncIterator[BytesValue], context: Context) -> BytesValue:
    return BytesValue(value=b"".join([one.value async for one in requests]))


def count(request: BytesValue, context: Context) -> Iterator[BytesValue]:
    for number in range(int(request.value)):
        yield BytesValue(value=b"%d" % number)


async def count_later(request: BytesValue, context: Context) -> AsyncIterator[BytesValue]:
    for number in range(int(request.value)):
        yield BytesValue(value=b"%d" % number)


def echo(requests: Iterator[BytesValue], context: Context) -> Iterator[BytesValue]:
    yield from requests


async def echo_later(requests: AsyncIterator[BytesValue], context: Context) -> AsyncIterator[BytesValue]:
    async for one in requests:
        yield one


KINDS = [
    pytest.param(POOL, (total, count, echo), id="pool"),
    pytest.param(COROUTINE, (total_later, count_later, echo_later), id="coroutine"),
]


def serve(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> Raw:
    kinds = zip(("Total", "Count", "Echo"), handlers, (CLIENT_STREAM, SERVER_STREAM, 3), strict=True)
    rig.server.add_service(SERVICE, {name: (kind, handler, BytesValue, streams) for name, handler, streams in kinds})
    rig.start()
    return Raw(rig)


def message(value: bytes) -> bytes:
    return BytesValue(value=value).SerializeToString()


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_a_client_that_streams(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    raw = serve(rig, kind, handlers)
    raw.open(1, "Total")
    for part in b"a", b"b", b"c":
        raw.data(1, message(part))
    raw.close(1)
    frame = raw.next()
    assert (frame.stream_id, frame.type) == (1, RESPONSE)
    assert BytesValue.FromString(decode_response(frame.data).payload).value == b"abc"
    raw.data(1, message(b"late"))
    answer = decode_response(raw.next().data)
    assert (answer.code, answer.message) == (3, "StreamID is no longer active")


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_a_server_that_streams(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    raw = serve(rig, kind, handlers)
    raw.open(1, "Count", message(b"1000"), CLOSED)
    for number in range(1000):
        frame = raw.next()
        assert (frame.stream_id, frame.type, frame.flags) == (1, DATA, 0)
        assert BytesValue.FromString(frame.data).value == b"%d" % number
    frame = raw.next()
    assert (frame.type, frame.flags, frame.data) == (DATA, CLOSED | NO_DATA, b"")
    raw.open(3, "Count", message(b"no number"), CLOSED)
    assert decode_response(raw.next().data).code == 2


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_both_stream(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    raw = serve(rig, kind, handlers)
    raw.open(1, "Echo")
    for value in b"a", b"", b"x" * 100_000:
        raw.data(1, message(value))
        assert BytesValue.FromString(raw.next().data).value == value
    raw.data(1, message(b"last"), CLOSED)
    assert BytesValue.FromString(raw.next().data).value == b"last"
    assert raw.next().flags == CLOSED | NO_DATA


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_a_caller_that_goes_ends_its_handler(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    raw = serve(rig, kind, handlers)
    raw.open(1, "Echo", message(b"there"))
    assert BytesValue.FromString(raw.next().data).value == b"there"
    raw.socket.close()
    again = Raw(rig)
    again.open(1, "Total", message(b"x"), CLOSED)
    assert BytesValue.FromString(decode_response(again.next().data).payload).value == b"x"


def until(true: Any) -> None:
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_a_far_deadline_keeps_nothing_of_a_call_that_is_over(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    serve(rig, kind, handlers).socket.close()
    until(lambda: rig.server.stats()["connections"] == 0)
    before = descriptors()
    raw = Raw(rig)
    raw.open(1, "Echo", seconds=3600)
    for _ in range(3):
        raw.data(1, message(b"x"))
        raw.next()
    raw.close(1)
    assert raw.next().flags == CLOSED | NO_DATA
    raw.socket.close()
    until(lambda: descriptors() == before)


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_a_stream_ends_at_its_deadline(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    raw = serve(rig, kind, handlers)
    raw.open(1, "Echo", message(b"one"), seconds=0.05)
    frames = [raw.next()]
    if frames[0].type == DATA:  # it was quick enough
        frames.append(raw.next())
    answer = decode_response(frames[-1].data)
    assert (frames[-1].type, answer.code) == (RESPONSE, 4)


@pytest.mark.parametrize(("kind", "handlers"), KINDS)
def test_data_behind_the_end_fails_that_stream_alone(rig: Rig, kind: int, handlers: tuple[Any, Any, Any]) -> None:
    let_go = threading.Event()

    def hold(requests: Iterator[BytesValue], context: Context) -> BytesValue:
        assert let_go.wait(HANG)
        return BytesValue()

    rig.server.add_service(SERVICE, {"Hold": (POOL, hold, BytesValue, CLIENT_STREAM)})
    raw = serve(rig, kind, handlers)
    raw.open(1, "Hold")
    raw.close(1)
    raw.data(1, message(b"more"))
    frame = raw.next()
    assert (frame.stream_id, decode_response(frame.data).code) == (1, 3)
    let_go.set()
    raw.open(3, "Total", message(b"x"), CLOSED)
    frame = raw.next()
    assert (frame.stream_id, decode_response(frame.data).code) == (3, 0)


# ---- bounds ----


def test_what_a_handler_does_not_take_is_bounded_and_comes_in_the_end(session_root: Any) -> None:
    rig = Rig(session_root / f"unread-{time.monotonic_ns()}.sock", max_unread=65536)
    let_go = threading.Event()

    def late(requests: Iterator[BytesValue], context: Context) -> BytesValue:
        assert let_go.wait(HANG)
        return BytesValue(value=b"%d" % sum(1 for _ in requests))

    rig.server.add_service(SERVICE, {"Late": (POOL, late, BytesValue, CLIENT_STREAM)})
    rig.start()
    try:
        raw = Raw(rig)
        raw.open(1, "Late")
        raw.socket.setblocking(False)
        frame, sent, quiet = encode_frame(1, DATA, 0, message(b"x" * 1000)), 0, 0
        rest = b""
        while quiet < 20:  # until the server has stopped reading
            try:
                rest = rest or frame
                rest = rest[raw.socket.send(rest) :]
                sent, quiet = sent + (not rest), 0
                assert sent < 10_000, "the server takes all that it is sent"
            except BlockingIOError:
                quiet += 1
                time.sleep(0.01)
        with rig.client() as client, pytest.raises(ShimError):  # other connections are served
            call(client, "Nothing")
        let_go.set()
        raw.socket.settimeout(HANG)
        if rest:
            raw.socket.sendall(rest)
            sent += 1
        raw.close(1)
        assert int(BytesValue.FromString(decode_response(raw.next().data).payload).value) == sent
        raw.socket.close()
    finally:
        let_go.set()
        rig.stop()
        os.unlink(rig.path)


@pytest.mark.parametrize("kind", [pytest.param(POOL, id="pool"), pytest.param(COROUTINE, id="coroutine")])
def test_a_handler_waits_for_a_peer_that_does_not_read(session_root: Any, kind: int) -> None:
    rig = Rig(session_root / f"unsent-{time.monotonic_ns()}.sock", max_unsent=65536)
    made = 0

    def many(request: BytesValue, context: Context) -> Iterator[BytesValue]:
        nonlocal made
        for _ in range(2000):
            made += 1
            yield BytesValue(value=b"x" * 1000)

    async def many_later(request: BytesValue, context: Context) -> AsyncIterator[BytesValue]:
        for one in many(request, context):
            yield one

    handler = many if kind == POOL else many_later
    rig.server.add_service(SERVICE, {"Many": (kind, handler, BytesValue, SERVER_STREAM)})
    rig.start()
    try:
        raw = Raw(rig)
        raw.open(1, "Many", b"", CLOSED)
        seen, quiet = -1, 0
        while quiet < 20:
            quiet = quiet + 1 if made == seen and made else 0
            seen = made
            time.sleep(0.01)
        assert made < 2000
        frames = [raw.next() for _ in range(2001)]
        assert [len(frame.data) > 1000 for frame in frames] == [True] * 2000 + [False]
        raw.socket.close()
    finally:
        rig.stop()
        os.unlink(rig.path)


# ---- the context and interceptors ----


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_a_call_is_told_that_its_caller_has_gone(rig: Rig, end: str) -> None:
    """shutdown: the rest of the stream can't come, which is the same for its handler."""
    gone, began, over = threading.Event(), threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def echo_until_gone(requests: Iterator[BytesValue], context: Context) -> Iterator[BytesValue]:
        context.on_cancel(gone.set)
        began.set()
        try:
            yield from requests
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            over.set()

    rig.server.add_service(SERVICE, {"Echo": (POOL, echo_until_gone, BytesValue, 3)})
    rig.start()
    raw = Raw(rig)
    raw.open(1, "Echo")
    assert began.wait(HANG)
    assert not gone.is_set()
    if end == "close":
        raw.socket.close()
    else:
        raw.socket.shutdown(socket.SHUT_WR)
    assert gone.wait(HANG)
    assert over.wait(HANG)
    assert [type(one) for one in raised] == [Canceled]


def test_a_call_that_was_answered_is_told_nothing(rig: Rig) -> None:
    told: list[str] = []
    event = jobs.Event()

    def quick(request: BytesValue, context: Context) -> BytesValue:
        context.on_cancel(lambda: told.append(context.method))
        return BytesValue()

    async def parked(request: BytesValue, context: Context) -> BytesValue:
        context.on_cancel(lambda: told.append(context.method))
        await event
        return BytesValue()

    rig.add("Quick", INLINE, quick)
    rig.add("Parked", COROUTINE, parked)
    rig.start()
    raw = Raw(rig)
    raw.open(1, "Quick", flags=CLOSED)
    raw.next()
    raw.open(3, "Parked", flags=CLOSED)
    raw.open(5, "Quick", flags=CLOSED)
    raw.next()
    raw.socket.close()
    until(lambda: told)
    until(lambda: rig.server.stats()["connections"] == 0)
    assert told == ["Parked"]
    rig.core.post(event.set)


def test_interceptors_stand_around_every_kind_of_handler(session_root: Any) -> None:
    seen: list[tuple[str, str, str]] = []

    def named(name: str) -> Any:
        def interceptor(request: Any, context: Context, handler: Any) -> Any:
            seen.append((name, context.service, context.method))
            return handler(request, context)

        return interceptor

    def refuse(request: Any, context: Context, handler: Any) -> Any:
        if context.method == "Refused":
            raise Canceled("not this one")
        return handler(request, context)

    rig = Rig(session_root / f"around-{time.monotonic_ns()}.sock", interceptors=[named("outer"), named("inner"), refuse])
    rig.add("Unary", INLINE, lambda request, context: BytesValue(value=request.value))
    rig.add("Refused", INLINE, lambda request, context: BytesValue())
    try:
        raw = serve(rig, COROUTINE, (total_later, count_later, echo_later))
        with rig.client() as client:
            assert call(client, "Unary", b"x") == b"x"
            with pytest.raises(Canceled, match="not this one"):
                call(client, "Refused")
        raw.open(1, "Total", message(b"x"), CLOSED)
        assert BytesValue.FromString(decode_response(raw.next().data).payload).value == b"x"
        raw.open(3, "Count", message(b"0"), CLOSED)
        assert raw.next().flags == CLOSED | NO_DATA
        raw.socket.close()
    finally:
        rig.stop()
        os.unlink(rig.path)
    assert seen == [(name, SERVICE, method) for method in ("Unary", "Refused", "Total", "Count") for name in ("outer", "inner")]
