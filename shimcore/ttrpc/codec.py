"""ttrpc on the wire, in plain Python: bytes in, frames and envelopes out, no I/O.

The same rules are kept in C by the shim's own server; this module is the oracle that the C is tested against,
so it is written to be read. It takes what Go's protobuf takes, which is stricter than C++'s in one rule: a
varint of more than 64 bits is malformed.

A frame is a 10-byte big-endian header, then the data::

    u32 length of the data | u32 stream id | u8 type | u8 flags

A Request's data and a Response's data are two small protobuf messages, written and read here by hand::

    Request  { string service=1  string method=2  bytes payload=3  int64 timeout_nano=4
               repeated KeyValue metadata=5 }
    Response { Status status=1  bytes payload=2 }
    KeyValue { string key=1  string value=2 }
    Status   { int32 code=1  string message=2  repeated Any details=3 }
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HEADER_SIZE = 10
#: Longest data of a frame, in bytes, inclusive; the envelope counts.
MESSAGE_MAX = 4 << 20

TYPE_REQUEST = 1
TYPE_RESPONSE = 2
TYPE_DATA = 3

FLAG_REMOTE_CLOSED = 1
FLAG_REMOTE_OPEN = 2
FLAG_NO_DATA = 4

#: Unknown groups may nest so deep and no deeper (the limit of Go's protobuf).
GROUP_DEPTH_MAX = 10_000

_HEADER = struct.Struct(">IIBB")

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_FIELD_NUMBER_MAX = (1 << 29) - 1

Metadata = tuple[tuple[str, str], ...]


class DecodeError(ValueError):
    """An envelope that is no valid protobuf message of its kind."""


class Frame(NamedTuple):
    """One whole frame. `data` is empty, and `oversize` the announced length in bytes, when it was longer than
    allowed.
    """

    stream_id: int
    type: int
    flags: int
    data: bytes
    oversize: int = 0


class Request(NamedTuple):
    """The envelope of a call. `timeout_nano` is relative, in ns: 0 none, negative already expired."""

    service: str = ""
    method: str = ""
    payload: bytes = b""
    timeout_nano: int = 0
    metadata: Metadata = ()


class Response(NamedTuple):
    """The envelope of an answer. `code` 0 is OK whether or not the peer wrote a status."""

    code: int = 0
    message: str = ""
    payload: bytes = b""


# ---- frames ------------------------------------------------------------------------------------------------


def encode_frame(stream_id: int, type: int, flags: int, data: bytes) -> bytes:
    """Header and data of one frame.

    Raises ValueError when the data is longer than `MESSAGE_MAX` or a number does not fit its field.
    """
    if len(data) > MESSAGE_MAX:
        raise ValueError(f"message length {len(data)} exceed maximum message size of {MESSAGE_MAX}")
    try:
        return _HEADER.pack(len(data), stream_id, type, flags) + data
    except struct.error as error:
        raise ValueError(str(error)) from None


class FrameParser:
    """Cuts a byte stream into frames, however the bytes arrive.

    An over-long frame is reported at its header (see `Frame.oversize`) and its data is skipped without being
    kept, so that one bad message costs neither memory nor the connection.
    """

    __slots__ = ("_buffer", "_message_max", "_skip")

    def __init__(self, message_max: int = MESSAGE_MAX) -> None:
        """`message_max`: longest data accepted, in bytes."""
        self._buffer = bytearray()
        self._message_max = message_max
        self._skip = 0

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame that are held, or still to be skipped; 0 at a frame's boundary."""
        return len(self._buffer) + self._skip

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Takes any number of bytes and yields the frames that they complete. Must be exhausted before the
        next call.
        """
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER_SIZE:
                length, stream_id, type, flags = _HEADER.unpack_from(buffer, start)
                body = start + HEADER_SIZE
                if length > self._message_max:
                    start = min(body + length, len(buffer))
                    self._skip = body + length - start
                    yield Frame(stream_id, type, flags, b"", length)
                    continue
                if len(buffer) - body < length:
                    break
                start = body + length
                yield Frame(stream_id, type, flags, bytes(memoryview(buffer)[body:start]))
        finally:
            del buffer[:start]


# ---- protobuf, as far as the envelopes need it -------------------------------------------------------------


def encode_varint(value: int) -> bytes:
    """A varint; a negative number is written as its 64-bit two's complement (10 bytes), as protobuf's int32
    and int64 are.
    """
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, position: int) -> tuple[int, int]:
    """(unsigned 64-bit value, position after it). Raises DecodeError when it is cut short or longer than 64
    bits.
    """
    value = shift = 0
    while True:
        if position >= len(data):
            raise DecodeError("truncated varint")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise DecodeError("varint is longer than 10 bytes")
    if value >> 64:
        raise DecodeError("varint overflows 64 bits")
    return value, position


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of each field outside groups; groups are walked with a list, never by
    recursion.
    """
    position = 0
    groups: list[int] = []
    while position < len(data):
        tag, position = decode_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= _FIELD_NUMBER_MAX:
            raise DecodeError("invalid field number")
        value: int | bytes = b""
        if wire == _VARINT:
            value, position = decode_varint(data, position)
        elif wire in (_FIXED64, _FIXED32, _BYTES):
            length = 8 if wire == _FIXED64 else 4
            if wire == _BYTES:
                length, position = decode_varint(data, position)
            if length > len(data) - position:
                raise DecodeError("field runs past the end")
            value = data[position : position + length]
            position += length
        elif wire == _GROUP:
            if len(groups) >= GROUP_DEPTH_MAX:
                raise DecodeError("groups nest too deep")
            groups.append(number)
            continue
        elif wire == _GROUP_END:
            if not groups or groups.pop() != number:
                raise DecodeError("mismatched end of group")
            continue
        else:
            raise DecodeError(f"invalid wire type {wire}")
        if not groups:
            yield number, wire, value
    if groups:
        raise DecodeError("unterminated group")


def _text(value: int | bytes) -> str:
    assert isinstance(value, bytes)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise DecodeError("string field contains invalid UTF-8") from None


def encode_field(number: int, value: bytes) -> bytes:
    """A length-delimited field: tag, length, value."""
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(value)) + value


def _encode_text(number: int, value: str) -> bytes:
    return encode_field(number, value.encode()) if value else b""


# ---- envelopes ---------------------------------------------------------------------------------------------


def encode_request(
    service: str,
    method: str,
    payload: bytes = b"",
    timeout_nano: int = 0,
    metadata: Iterable[tuple[str, str]] = (),
) -> bytes:
    """A Request in canonical form: fields in order, default values left out. Raises UnicodeEncodeError on
    lone surrogates.
    """
    out = bytearray()
    out += _encode_text(1, service)
    out += _encode_text(2, method)
    if payload:
        out += encode_field(3, payload)
    if timeout_nano:
        out += encode_varint(4 << 3 | _VARINT) + encode_varint(timeout_nano)
    for key, value in metadata:
        out += encode_field(5, _encode_text(1, key) + _encode_text(2, value))
    return bytes(out)


def decode_request(data: bytes) -> Request:
    """Raises DecodeError. Of a repeated scalar the last counts; a field of an unexpected wire type is an
    unknown field. A byte of a metadata value that is not UTF-8 becomes U+FFFD.
    """
    service = method = ""
    payload = b""
    timeout_nano = 0
    metadata: list[tuple[str, str]] = []
    for number, wire, value in _fields(data):
        if wire == _BYTES:
            assert isinstance(value, bytes)
            if number == 1:
                service = _text(value)
            elif number == 2:
                method = _text(value)
            elif number == 3:
                payload = value
            elif number == 5:
                metadata.append(_decode_pair(value))
        elif wire == _VARINT and number == 4:
            assert isinstance(value, int)
            timeout_nano = _signed(value, 64)
    return Request(service, method, payload, timeout_nano, tuple(metadata))


def _decode_pair(data: bytes) -> tuple[str, str]:
    key = text = ""
    for number, wire, value in _fields(data):
        if wire == _BYTES and number == 1:
            key = _text(value)
        elif wire == _BYTES and number == 2:
            assert isinstance(value, bytes)
            text = value.decode("utf-8", "replace")
    return key, text


def encode_response(payload: bytes = b"", code: int = 0, message: str = "") -> bytes:
    """A Response in canonical form; as Go's, it has no status at all when `code` is 0 and there is no
    message.
    """
    out = bytearray()
    status = encode_varint(1 << 3 | _VARINT) + encode_varint(code) if code else b""
    status += _encode_text(2, message)
    if status:
        out += encode_field(1, status)
    if payload:
        out += encode_field(2, payload)
    return bytes(out)


def decode_response(data: bytes) -> Response:
    """Raises DecodeError. A status that comes twice is merged, as protobuf merges messages."""
    code = 0
    message = ""
    payload = b""
    for number, wire, value in _fields(data):
        if wire != _BYTES:
            continue
        assert isinstance(value, bytes)
        if number == 2:
            payload = value
        elif number == 1:
            for inner, inner_wire, inner_value in _fields(value):
                if inner == 1 and inner_wire == _VARINT:
                    assert isinstance(inner_value, int)
                    code = _signed(inner_value, 32)
                elif inner == 2 and inner_wire == _BYTES:
                    message = _text(inner_value)
                elif inner == 3 and inner_wire == _BYTES:
                    _check_any(inner_value)
    return Response(code, message, payload)


def _check_any(value: int | bytes) -> None:
    # Details are not kept, but a decoder that knows them would refuse a broken one, and so does this.
    assert isinstance(value, bytes)
    for number, wire, inner in _fields(value):
        if number == 1 and wire == _BYTES:
            _text(inner)
