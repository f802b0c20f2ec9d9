"""Just enough of protobuf's wire format for `start`, `delete` and -info, which then need not import protobuf
(25 ms).

Source: the encoding chapter of protobuf's documentation. Readers raise ValueError on anything malformed, as
protobuf does.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELD = (1 << 29) - 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the message is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("a varint of more than ten bytes")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) in the order of the bytes: int for varints (unsigned, 64 bits), bytes for all
    else.

    Groups, which proto3 does not have, are malformed here.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if not 0 < number <= _MAX_FIELD:
            raise ValueError(f"no field can have the number {number}")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"field {number} has the unknown wire type {kind}")
        if size > len(data) - at:
            raise ValueError("the message is cut short")
        yield number, data[at : at + size]
        at += size


def signed(value: int) -> int:
    """A varint of type int32, int64 or enum: negative numbers are sent as 64-bit two's complement."""
    return value - (1 << 64) if value >> 63 else value


def varint(value: int) -> bytes:
    """One varint; negative numbers take ten bytes. Raises ValueError outside of 64 bits."""
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{value} has more than 64 bits")
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    """An int field; nothing for 0, proto3's default."""
    return varint(number << 3) + varint(value) if value else b""


def message(number: int, data: bytes) -> bytes:
    """A message field, written when empty too: an empty message is not an absent one."""
    return varint(number << 3 | _BYTES) + varint(len(data)) + data


def string(number: int, value: str | bytes) -> bytes:
    """A string or bytes field; nothing when empty."""
    return message(number, value.encode() if isinstance(value, str) else value) if value else b""


def any(type_url: str, value: bytes) -> bytes:
    """The content of a google.protobuf.Any."""
    return string(1, type_url) + string(2, value)


class Raw:
    """A message that is its bytes: in the place of a protobuf class, for who reads and writes them itself."""

    __slots__ = ("data",)

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    @classmethod
    def FromString(cls, data: bytes) -> Raw:
        return cls(data)

    def SerializeToString(self) -> bytes:
        return self.data
