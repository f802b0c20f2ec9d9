"""The compiled framing for clients against the plain one: whatever either is given, they say the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shimcore import _frames
from shimcore.ttrpc import codec


def envelopes(rng: random.Random) -> bytes:
    words = ["", "s", "containerd.task.v2.Task", "Ünï", "x" * 300]
    pick = rng.choice
    if rng.random() < 0.5:
        pairs = [(pick(words), pick(words)) for _ in range(rng.randrange(4))]
        timeout = pick([0, 1, -1, 1 << 40, (1 << 63) - 1, -(1 << 63)])
        return codec.encode_request(pick(words), pick(words), rng.randbytes(rng.randrange(200)), timeout, pairs)
    code = pick([0, 0, 1, 16, -1, 0x7FFFFFFF])
    return codec.encode_response(rng.randbytes(rng.randrange(200)), code, pick(words) if code else "")


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        at = rng.randrange(len(out) + 1)
        if kind == 0 and out:
            out[at % len(out)] = rng.randrange(256)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 12))
        else:
            out[at:at] = rng.choice([b"\x33\x34", b"\x0a\x00", b"\x20" + b"\xff" * 9 + b"\x01", b"\x2a\x02\x0a\x00"])
    return bytes(out)


def said(decode: Any, data: bytes) -> Any:
    try:
        return decode(data)
    except codec.DecodeError:
        return None


@pytest.mark.parametrize("seed", range(4))
def test_decoding(seed: int) -> None:
    rng = random.Random(seed)
    taken = refused = 0
    for _ in range(5000):
        data = envelopes(rng)
        if rng.random() < 0.7:
            data = mutated(rng, data)
        for compiled, plain in (
            (_frames.decode_request, codec.decode_request),
            (_frames.decode_response, codec.decode_response),
        ):
            ours, theirs = said(compiled, data), said(plain, data)
            if theirs is None:  # the plain one is stricter in three cases
                refused += 1
            else:
                assert ours == theirs, data
                taken += 1
    assert taken > 2000 and refused > 1000


def test_what_both_refuse() -> None:
    for data in b"\x80", b"\x00", b"\x0a\x05x", b"\x0a\x01\xff", b"\x33", b"\x34", b"\x0e", b"\x33" * 10_001 + b"\x34" * 10_001:
        for decode in _frames.decode_request, codec.decode_request:
            with pytest.raises(codec.DecodeError):
                decode(data)
    for decode in _frames.decode_response, codec.decode_response:
        with pytest.raises(codec.DecodeError):
            decode(b"\x0a\x03\x12\x01\xff")


def test_encoding() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        request = codec.decode_request(codec.encode_request("s" * rng.randrange(300), "m", rng.randbytes(rng.randrange(300))))
        pairs = [("k" * rng.randrange(200), "ü" * rng.randrange(100)) for _ in range(rng.randrange(5))]
        timeout = rng.choice([0, 1, -1, 1 << 40, -(1 << 63)])
        arguments = (request.service, request.method, request.payload, timeout, pairs)
        assert _frames.encode_request(*arguments) == codec.encode_request(*arguments)
        answer = (request.payload, rng.choice([0, 5, -1]), "")
        assert _frames.encode_response(*answer) == codec.encode_response(*answer)
    assert _frames.encode_response(b"x", 5, "nöt") == codec.encode_response(b"x", 5, "nöt")
    with pytest.raises(UnicodeEncodeError):
        _frames.encode_request("s", "m", b"", 0, [("k", "\udc80")])


def test_frames() -> None:
    for arguments in (1, 1, 1, b"data"), (0xFFFFFFFF, 255, 255, b""), (7, 3, 0, bytes(codec.MESSAGE_MAX)):
        assert _frames.encode_frame(*arguments) == codec.encode_frame(*arguments)
    wrong: tuple[Any, ...]
    for wrong in (1 << 32, 1, 1, b""), (-1, 1, 1, b""), (1, 256, 1, b""), (1, 1, 1, bytes(codec.MESSAGE_MAX + 1)):
        for encode in _frames.encode_frame, codec.encode_frame:
            with pytest.raises(ValueError):
                encode(*wrong)


@pytest.mark.parametrize("seed", range(4))
def test_cutting(seed: int) -> None:
    rng = random.Random(seed)
    number, sizes = rng.randrange, [0, 3, 50, 900]
    frames = [(number(1 << 32), number(256), number(256), rng.randbytes(rng.choice(sizes))) for _ in range(500)]
    stream = b"".join(codec.encode_frame(*frame) for frame in frames)
    compiled, plain = _frames.FrameParser(500), codec.FrameParser(500)
    at = 0
    while at < len(stream):
        size = rng.choice([0, 1, 7, 60, 1000, 5000])
        piece = memoryview(stream)[at : at + size]
        assert compiled.feed(piece) == list(plain.feed(piece))
        assert compiled.pending == plain.pending
        at += size
    assert compiled.pending == 0
