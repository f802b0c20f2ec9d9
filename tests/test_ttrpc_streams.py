"""Methods that stream, on the compiled server, with a client that writes its own frames."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore._ttrpc import CLIENT_STREAM, COROUTINE, POOL, SERVER_STREAM, Context
from shimcore.ttrpc.codec import FrameParser, decode_response, encode_frame, encode_request
from tests.served import HANG, SERVICE, Rig, rig

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

    def open(self, stream: int, method: str, payload: bytes = b"", flags: int = OPEN) -> None:
        self.socket.sendall(encode_frame(stream, REQUEST, flags, encode_request(SERVICE, method, payload, 0, ())))

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
