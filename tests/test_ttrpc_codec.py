"""The pure-Python codec, which is the oracle of the compiled one: against protobuf, and against hostile
bytes."""

from __future__ import annotations

import random
import struct

import pytest
from google.protobuf.message import DecodeError as ProtobufDecodeError

from shimcore.protos import envelope_pb2
from shimcore.ttrpc import codec


def _random_request(rng: random.Random) -> envelope_pb2.Request:
    text = "".join(chr(rng.choice((0, 47, 65, 0xE9, 0x20AC, 0x1F600))) for _ in range(rng.randrange(6)))
    request = envelope_pb2.Request(
        service=text,
        method=text[::-1],
        payload=rng.randbytes(rng.randrange(200)),
        timeout_nano=rng.choice((0, 1, -1, 300, 1 << 40, (1 << 63) - 1, -(1 << 63))),
    )
    for _ in range(rng.randrange(4)):
        request.metadata.add(key=rng.choice(("", "k", "kk")), value=text)
    return request


def _plain(request: envelope_pb2.Request) -> codec.Request:
    metadata = tuple((pair.key, pair.value) for pair in request.metadata)
    return codec.Request(request.service, request.method, request.payload, request.timeout_nano, metadata)


def test_requests_as_protobuf_writes_and_reads_them() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        request = _random_request(rng)
        data = request.SerializeToString(deterministic=True)
        assert codec.encode_request(*_plain(request)) == data
        assert codec.decode_request(data) == _plain(request)


def test_responses_as_protobuf_writes_and_reads_them() -> None:
    rng = random.Random(2)
    for _ in range(1000):
        response = envelope_pb2.Response(payload=rng.randbytes(rng.randrange(100)))
        code, message = rng.choice((0, 5, 14, -1, (1 << 31) - 1)), rng.choice(("", "no\0 such"))
        if code or message:
            response.status.code, response.status.message = code, message
        data = response.SerializeToString(deterministic=True)
        assert codec.encode_response(response.payload, code, message) == data
        assert codec.decode_response(data) == codec.Response(code, message, response.payload)


def test_what_protobuf_refuses_is_refused_and_little_else() -> None:
    rng = random.Random(3)
    refused = accepted = 0
    for _ in range(30_000):
        data = bytearray(_random_request(rng).SerializeToString()[:60])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            if data and at < len(data) and rng.random() < 0.7:
                data[at] = rng.choice((rng.randrange(256), data[at] ^ 1 << rng.randrange(8)))
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 4))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data) + 1) :]
        try:
            wanted = _plain(envelope_pb2.Request.FromString(bytes(data)))
        except ProtobufDecodeError:
            refused += 1
            try:
                taken = codec.decode_request(bytes(data))
            except codec.DecodeError:
                continue
            # Here protobuf refuses the call, and we don't: a metadata value that is not UTF-8.
            assert any("\ufffd" in value for _, value in taken.metadata), data.hex()
        else:
            accepted += 1
            try:
                assert codec.decode_request(bytes(data)) == wanted, data.hex()
            except codec.DecodeError as error:
                # Here C++ drops the excess bits, and Go refuses, as we do.
                assert "overflows 64 bits" in str(error), data.hex()
    assert refused > 1000 and accepted > 1000


def test_groups_nest_without_recursion() -> None:
    deep = codec.GROUP_DEPTH_MAX
    start, end = b"\x33", b"\x34"  # field 6
    assert codec.decode_request(start * deep + end * deep + b"\x0a\x01s") == codec.Request("s")
    for data in (start * (deep + 1) + end * (deep + 1), start, end, b"\x33\x3c"):
        with pytest.raises(codec.DecodeError):
            codec.decode_request(data)


def test_parser_takes_bytes_as_they_come() -> None:
    rng = random.Random(4)
    frames = [
        codec.Frame(rng.randrange(1 << 32), rng.randrange(256), rng.randrange(256), rng.randbytes(rng.randrange(40)))
        for _ in range(200)
    ]
    stream = b"".join(codec.encode_frame(frame.stream_id, frame.type, frame.flags, frame.data) for frame in frames)
    for step in (1, 7, 10, 11, 4096, len(stream)):
        parser = codec.FrameParser()
        got = [f for at in range(0, len(stream), step) for f in parser.feed(stream[at : at + step])]
        assert got == frames and parser.pending == 0


def test_parser_skips_what_is_too_long() -> None:
    long = struct.pack(">IIBB", 50, 3, 1, 0) + bytes(50)
    good = codec.encode_frame(5, 1, 0, b"0123456789")
    for step in (1, 13, 1000):
        parser = codec.FrameParser(message_max=10)
        stream = good + long + good
        got = [f for at in range(0, len(stream), step) for f in parser.feed(stream[at : at + step])]
        assert [(f.stream_id, f.oversize, f.data) for f in got] == [
            (5, 0, b"0123456789"),
            (3, 50, b""),
            (5, 0, b"0123456789"),
        ]
    parser = codec.FrameParser()
    assert [f.oversize for f in parser.feed(struct.pack(">IIBB", 0xFFFFFFFF, 1, 1, 0))] == [0xFFFFFFFF]
    for _ in range(10):
        assert list(parser.feed(bytes(1 << 20))) == []
    assert parser.pending == 0xFFFFFFFF - (10 << 20)


def test_frames_that_can_not_be_written() -> None:
    assert len(codec.encode_frame(1, 1, 0, bytes(codec.MESSAGE_MAX))) == codec.MESSAGE_MAX + 10
    for args in ((1, 1, 0, bytes(codec.MESSAGE_MAX + 1)), (1 << 32, 1, 0, b""), (1, 256, 0, b"")):
        with pytest.raises(ValueError):
            codec.encode_frame(*args)
