"""wire.py against protobuf itself."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2, timestamp_pb2

from shimcore import wire


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)])
def test_integers(value: int) -> None:
    stamp = timestamp_pb2.Timestamp(seconds=value)
    assert wire.integer(1, value) == stamp.SerializeToString()
    assert [(n, wire.signed(int(v))) for n, v in wire.fields(stamp.SerializeToString())] == [(1, value)] * bool(value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_integers_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        wire.varint(value)


def test_any() -> None:
    wanted = any_pb2.Any(type_url="a.B", value=b"\x00" * 300)
    data = wire.any("a.B", b"\x00" * 300)
    assert data == wanted.SerializeToString()
    assert list(wire.fields(data)) == [(1, b"a.B"), (2, b"\x00" * 300)]
    assert wire.any("", b"") == b"" and wire.message(3, b"") == b"\x1a\x00"


def test_fixed_fields_are_passed_over_whole() -> None:
    assert list(wire.fields(b"\x09" + b"x" * 8 + b"\x15" + b"y" * 4 + b"\x18\x05")) == [
        (1, b"x" * 8),
        (2, b"y" * 4),
        (3, 5),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # no length
        b"\x0a\x05abc",  # too short
        b"\x09abc",
        b"\x08",  # no varint
        b"\x08\x80",
        b"\x08" + b"\x80" * 10 + b"\x01",  # eleven bytes
        b"\x00\x01",  # field 0
        b"\x0b",  # a group
        b"\x0e",  # wire type 6
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length of 2**64 - 1
        b"\x80\x80\x80\x80\x80\x01\x00",  # a field number of 2**32
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ValueError):
        list(wire.fields(data))
