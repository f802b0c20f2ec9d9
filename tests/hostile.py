"""What a peer may send to a ttrpc server and should not: each class a case of one table, played by `Peer`, which writes its own
bytes. The server that it is played to serves NAME with the methods of Victim."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore.errors import NotFound
from shimcore.ttrpc.codec import (
    MESSAGE_MAX,
    Frame,
    FrameParser,
    Response,
    decode_response,
    encode_field,
    encode_frame,
    encode_request,
    encode_varint,
)
from tests.served import HANG

NAME = "hostile.Victim"
REQUEST, RESPONSE, DATA = 1, 2, 3
CLOSED, OPEN, NO_DATA = 1, 2, 4
MAX_INFLIGHT = 100
LARGE = 64 * 1024
OK, UNKNOWN, INVALID, EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 2, 3, 8, 12, 13


def _service() -> ServiceDescriptor:
    kind = ".google.protobuf.BytesValue"
    file = descriptor_pb2.FileDescriptorProto(name="tests/hostile.proto", package="hostile", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    service = file.service.add(name="Victim")
    for name, client, server in [
        ("Echo", False, False),
        ("Quick", False, False),
        ("Slow", False, False),
        ("Raise", False, False),
        ("Total", True, False),
        ("Deaf", True, False),
        ("Count", False, True),
        ("Both", True, True),
    ]:
        service.method.add(name=name, input_type=kind, output_type=kind, client_streaming=client, server_streaming=server)
    pool = descriptor_pool.Default()
    return pool.AddSerializedFile(file.SerializeToString()).services_by_name["Victim"]


SERVICE = _service()


class Victim:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.cancelled = threading.Event()

    def echo(self, request: BytesValue, context: Any) -> BytesValue:
        return request

    def quick(self, request: BytesValue, context: Any) -> BytesValue:
        return request

    def slow(self, request: BytesValue, context: Any) -> BytesValue:
        context.on_cancel(self.cancelled.set)
        assert self.gate.wait(HANG)
        return request

    def raise_(self, request: BytesValue, context: Any) -> Any:
        if request.value == b"exit":
            raise SystemExit(3)
        if request.value == b"surrogates":
            raise NotFound("no \udc80 such \ud800 thing")
        if request.value == b"nothing":
            return None
        return BytesValue(value=bytes(MESSAGE_MAX))

    def total(self, requests: Iterator[BytesValue], context: Any) -> BytesValue:
        return BytesValue(value=b"".join(one.value for one in requests))

    def deaf(self, requests: Iterator[BytesValue], context: Any) -> BytesValue:
        assert self.gate.wait(HANG)
        return BytesValue(value=b"%d" % sum(1 for _ in requests))

    def count(self, request: BytesValue, context: Any) -> Iterator[BytesValue]:
        for number in range(int(request.value)):
            yield BytesValue(value=b"%d" % number)

    def both(self, requests: Iterator[BytesValue], context: Any) -> Iterator[BytesValue]:
        yield from requests


def message(value: bytes) -> bytes:
    return BytesValue(value=value).SerializeToString()


class Peer:
    """One connection to the server at `path`, with the implementation behind it at hand."""

    def __init__(self, path: str, victim: Victim) -> None:
        self.path = path
        self.victim = victim
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG)
        self.socket.connect(path)
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def open(self, stream: int, method: str, value: bytes = b"", flags: int = CLOSED, **request: Any) -> None:
        self.say(opening(stream, method, value, flags, **request))

    def data(self, stream: int, value: bytes, flags: int = 0) -> None:
        self.say(encode_frame(stream, DATA, flags, value))

    def frame(self) -> Frame | None:
        """The server's next frame; None: it has closed."""
        while not self._frames:
            try:
                got = self.socket.recv(1 << 20)
            except ConnectionResetError:
                return None
            if not got:
                return None
            self._frames += self._parser.feed(got)
        return self._frames.pop(0)

    def response(self, stream: int) -> Response:
        frame = self.frame()
        assert frame is not None, "the server has closed"
        assert (frame.stream_id, frame.type, frame.flags) == (stream, RESPONSE, 0)
        return decode_response(frame.data)

    def answered(self, stream: int, code: int, text: str | None = None) -> None:
        answer = self.response(stream)
        assert answer.code == code and (text is None or answer.message == text), answer

    def echoed(self, stream: int, value: bytes = b"x") -> None:
        answer = self.response(stream)
        assert (answer.code, BytesValue.FromString(answer.payload).value) == (OK, value), answer

    def echoes(self, stream: int) -> None:
        """The connection still serves."""
        self.open(stream, "Echo", b"still here")
        self.echoed(stream, b"still here")


def opening(stream: int, method: str, value: bytes = b"", flags: int = CLOSED, **request: Any) -> bytes:
    return raw_opening(stream, encode_request(NAME, method, message(value), **request), flags)


def raw_opening(stream: int, envelope: bytes, flags: int = CLOSED) -> bytes:
    return encode_frame(stream, REQUEST, flags, envelope)


def header(length: int, stream: int = 1, type: int = REQUEST, flags: int = CLOSED) -> bytes:
    return length.to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes([type, flags])


def names(service: bytes, method: bytes) -> bytes:
    return encode_field(1, service) + encode_field(2, method)


CASES: list[Any] = []


def case(play: Callable[[Peer], None]) -> Callable[[Peer], None]:
    CASES.append(pytest.param(play, id=play.__name__))
    return play


# ---- frames and their lengths ------------------------------------------------------------------------------


@case
def a_byte_at_a_time(peer: Peer) -> None:
    for byte in opening(1, "Echo", b"x"):
        peer.say(bytes([byte]))
    peer.echoed(1)


@case
def many_frames_in_one_send(peer: Peer) -> None:
    peer.say(b"".join(opening(stream, "Echo", b"x") for stream in range(1, 401, 2)))
    seen = {frame.stream_id for frame in (peer.frame() for _ in range(200)) if frame is not None}
    assert seen == set(range(1, 401, 2))


@case
def the_end_in_a_header(peer: Peer) -> None:
    peer.say(header(10)[:7])
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.frame() is None


@case
def the_end_in_a_body(peer: Peer) -> None:
    peer.say(opening(1, "Echo", b"x")[:-1])
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.frame() is None


@case
def the_longest_message(peer: Peer) -> None:
    filling = MESSAGE_MAX - len(encode_request(NAME, "Quick")) - 10
    peer.open(1, "Quick", bytes(filling))
    assert len(peer.response(1).payload) > filling


@case
def one_byte_too_long(peer: Peer) -> None:
    peer.say(header(MESSAGE_MAX + 1) + bytes(MESSAGE_MAX + 1))
    peer.answered(1, EXHAUSTED, "message length 4194305 exceed maximum message size of 4194304")
    peer.echoes(3)


@case
def the_longest_length(peer: Peer) -> None:
    peer.say(header(0xFFFFFFFF))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.say(bytes(100_000))
    answer = peer.frame()
    assert answer is None or decode_response(answer.data).code == EXHAUSTED


@case
def a_header_that_never_ends(peer: Peer) -> None:
    peer.say(header(100)[:3])
    other = Peer(peer.path, peer.victim)
    other.echoes(1)
    other.socket.close()


# ---- stream ids --------------------------------------------------------------------------------------------


@case
def even_ids(peer: Peer) -> None:
    for stream in 0, 2, 0xFFFFFFFE:
        peer.open(stream, "Echo")
        peer.answered(stream, INVALID, "StreamID must be odd for client initiated streams")
    peer.echoes(1)


@case
def ids_that_fall(peer: Peer) -> None:
    peer.echoes(5)
    for stream in 5, 3, 1:
        peer.open(stream, "Echo")
        peer.answered(stream, INVALID, "StreamID cannot be re-used and must increment")
    peer.echoes(7)


@case
def an_id_that_is_being_answered(peer: Peer) -> None:
    peer.open(1, "Slow", b"mine")
    peer.open(1, "Echo", b"other")
    peer.answered(1, INVALID, "StreamID cannot be re-used and must increment")
    peer.victim.gate.set()
    peer.echoed(1, b"mine")
    peer.echoes(3)


@case
def the_last_id_then_the_first(peer: Peer) -> None:
    peer.echoes(0xFFFFFFFF)
    peer.open(1, "Echo")
    peer.answered(1, INVALID, "StreamID cannot be re-used and must increment")


# ---- types and flags ---------------------------------------------------------------------------------------


@case
def types_that_are_none(peer: Peer) -> None:
    for type in 0, 2, 4, 255:
        peer.say(encode_frame(1, type, 0, b"\xff\xff"))
    peer.echoes(1)


@case
def every_flag_of_a_unary_request(peer: Peer) -> None:
    for flags in range(256):
        peer.open(2 * flags + 1, "Echo", b"x", flags)
        peer.echoed(2 * flags + 1)


# ---- envelopes ---------------------------------------------------------------------------------------------


def envelopes(peer: Peer, bad: list[bytes], code: int) -> None:
    for number, envelope in enumerate(bad):
        peer.say(raw_opening(2 * number + 1, envelope))
        answer = peer.response(2 * number + 1)
        assert answer.code == code, (envelope[:40], answer)
    peer.echoes(2 * len(bad) + 1)


@case
def an_empty_request(peer: Peer) -> None:
    peer.say(raw_opening(1, b""))
    peer.answered(1, UNIMPLEMENTED, "service ")
    peer.echoes(3)


@case
def malformed_requests(peer: Peer) -> None:
    start = encode_request(NAME, "Echo")
    bad = [
        b"\x80",  # a varint cut short
        b"\x20" + b"\xff" * 10 + b"\x01",  # one of eleven bytes
        b"\x00\x00",  # field number 0
        b"\x0a\x05x",  # a length past the end
        b"\x1a" + b"\xff" * 9 + b"\x01",  # one that overflows
        b"\x2a\x04\x0a\x09k",  # the same in metadata
        b"\x0c",  # the end of a group that has no start
        b"\x33" * 10_001 + b"\x34" * 10_001,  # groups too deep
        b"\x33",  # a group without an end
    ]
    envelopes(peer, [start + one for one in bad], INVALID)


@case
def text_that_is_no_text(peer: Peer) -> None:
    pair = encode_field(5, encode_field(1, b"\xff") + encode_field(2, b"v"))
    bad = [names(b"\xff", b"Echo"), names(NAME.encode(), b"\xed\xa0\x80"), names(NAME.encode(), b"Echo") + pair]
    envelopes(peer, bad, INVALID)


@case
def a_metadata_value_that_is_no_text(peer: Peer) -> None:
    """Go refuses the call. Its handler may not even look at metadata: ours is called, and sees U+FFFD."""
    for number, value in enumerate([b"\xff", b"\xed\xa0\x80", b"a\xc3", b"\0" * 3]):
        pair = encode_field(5, encode_field(1, b"traceparent") + encode_field(2, value))
        peer.say(raw_opening(2 * number + 1, encode_request(NAME, "Echo", message(b"x")) + pair))
        peer.echoed(2 * number + 1)


@case
def what_go_takes(peer: Peer) -> None:
    start = encode_request(NAME, "Echo", message(b"x"))
    good = [
        b"\x08\x01" + start,  # a wrong wire type is an unknown field
        start + b"\x7a\x03abc",  # as is a number that is none
        start + b"\x33" * 10_000 + b"\x34" * 10_000,
        encode_field(1, b"other") + start,  # the last one counts
        start + b"\x20" + b"\xff" * 9 + b"\x01" + b"\x20\x00",  # a timeout of -1, then none
    ]
    for number, envelope in enumerate(good):
        peer.say(raw_opening(2 * number + 1, envelope))
        peer.echoed(2 * number + 1)


@case
def names_that_are_odd(peer: Peer) -> None:
    for number, name in enumerate(["\0", "/", "..", "a\0b", "hostile.Victim/Echo"]):
        peer.say(raw_opening(2 * number + 1, names(name.encode(), b"Echo")))
        peer.answered(2 * number + 1, UNIMPLEMENTED, f"service {name}")
    peer.say(raw_opening(21, names(NAME.encode(), b"../Echo")))
    peer.answered(21, UNIMPLEMENTED, "method ../Echo")


@case
def a_name_of_megabytes(peer: Peer) -> None:
    peer.say(raw_opening(1, names(b"s" * (MESSAGE_MAX - 100), b"m")))
    answer = peer.response(1)
    assert answer.code == UNIMPLEMENTED and answer.message.startswith("service sss") and len(answer.message) < 5000
    peer.echoes(3)


@case
def metadata_without_measure(peer: Peer) -> None:
    pair = encode_field(5, encode_field(1, b"key") + encode_field(2, b"value"))
    peer.say(raw_opening(1, encode_request(NAME, "Echo", message(b"x")) + pair * 100_000))
    peer.echoed(1)


@case
def timeouts_at_the_ends(peer: Peer) -> None:
    for number, nanos in enumerate([-1, (1 << 63) - 1, -(1 << 63)]):
        envelope = encode_request(NAME, "Echo", message(b"x")) + b"\x20" + encode_varint(nanos & ((1 << 64) - 1))
        peer.say(raw_opening(2 * number + 1, envelope))
        if nanos > 0:
            peer.echoed(2 * number + 1)
        else:
            assert peer.response(2 * number + 1).code in (OK, 4)


@case
def a_payload_that_is_garbage(peer: Peer) -> None:
    peer.say(raw_opening(1, names(NAME.encode(), b"Echo") + encode_field(3, b"\xff\xff\xff")))
    assert peer.response(1).code == INTERNAL
    peer.echoes(3)


# ---- streams -----------------------------------------------------------------------------------------------


@case
def data_where_none_is_due(peer: Peer) -> None:
    peer.data(1, message(b"x"))
    peer.answered(1, INVALID, "StreamID is no longer active")
    peer.open(3, "Slow", b"mine")
    peer.data(3, message(b"x"))
    peer.data(3, b"", CLOSED | NO_DATA)
    peer.victim.gate.set()
    peer.echoed(3, b"mine")
    peer.data(3, message(b"late"))
    peer.answered(3, INVALID, "StreamID is no longer active")
    peer.echoes(5)


@case
def data_behind_the_end(peer: Peer) -> None:
    peer.open(1, "Deaf", flags=OPEN | NO_DATA)
    peer.data(1, b"", CLOSED | NO_DATA)
    peer.data(1, message(b"late"))
    assert peer.response(1).code == INVALID
    peer.victim.gate.set()
    peer.echoes(3)


@case
def half_closed_twice(peer: Peer) -> None:
    peer.open(1, "Deaf", flags=OPEN | NO_DATA)
    for _ in range(2):
        peer.data(1, b"", CLOSED | NO_DATA)
    peer.victim.gate.set()
    peer.echoed(1, b"0")
    peer.echoes(3)


@case
def flags_of_data_that_contradict(peer: Peer) -> None:
    peer.open(1, "Total", flags=OPEN | NO_DATA)
    peer.data(1, b"", NO_DATA)  # says nothing at all
    peer.data(1, message(b"no"), NO_DATA)  # says that it says nothing
    peer.data(1, message(b"yes"), CLOSED)
    peer.echoed(1, b"yes")
    peer.echoes(3)


@case
def a_streaming_method_called_unary(peer: Peer) -> None:
    peer.open(1, "Total", b"x", CLOSED)
    peer.echoed(1)
    peer.open(3, "Both", b"x", CLOSED)
    frame = peer.frame()
    assert frame is not None and (frame.type, BytesValue.FromString(frame.data).value) == (DATA, b"x")
    frame = peer.frame()
    assert frame is not None and (frame.type, frame.flags) == (DATA, CLOSED | NO_DATA)


@case
def a_unary_method_called_as_a_stream(peer: Peer) -> None:
    peer.open(1, "Echo", b"x", OPEN)
    peer.echoed(1)
    peer.data(1, message(b"more"))
    peer.answered(1, INVALID, "StreamID is no longer active")
    peer.echoes(3)


@case
def ten_thousand_messages_for_a_handler_that_does_not_read(peer: Peer) -> None:
    peer.open(1, "Deaf", flags=OPEN | NO_DATA)
    block = b"".join(encode_frame(1, DATA, 0, message(bytes(1000))) for _ in range(100))

    def send() -> None:
        for _ in range(100):
            peer.say(block)
        peer.data(1, b"", CLOSED | NO_DATA)

    sending = threading.Thread(target=send)
    sending.start()
    other = Peer(peer.path, peer.victim)
    other.echoes(1)
    other.socket.close()
    peer.victim.gate.set()
    peer.echoed(1, b"10000")
    sending.join(HANG)
    assert not sending.is_alive()


# ---- ends --------------------------------------------------------------------------------------------------


@case
def a_client_that_never_reads(peer: Peer) -> None:
    block = b"".join(opening(stream, "Echo", bytes(LARGE)) for stream in range(1, 2001, 2))
    peer.socket.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(block):
            sent += peer.socket.send(block[sent:])
    other = Peer(peer.path, peer.victim)
    other.echoes(1)
    other.socket.close()


@case
def more_slow_calls_than_are_let_in(peer: Peer) -> None:
    count = 50_000
    block = b"".join(opening(2 * number + 1, "Slow") for number in range(count))
    sending = threading.Thread(target=peer.say, args=(block,))
    sending.start()
    for _ in range(count - MAX_INFLIGHT):
        frame = peer.frame()
        assert frame is not None and decode_response(frame.data).code == EXHAUSTED
    sending.join(HANG)
    peer.victim.gate.set()
    for _ in range(MAX_INFLIGHT):
        frame = peer.frame()
        assert frame is not None and decode_response(frame.data).code == OK
    peer.echoes(2 * count + 1)


@case
def no_more_is_sent_in_mid_call(peer: Peer) -> None:
    peer.open(1, "Slow", b"mine")
    peer.socket.shutdown(socket.SHUT_WR)
    peer.victim.gate.set()
    peer.echoed(1, b"mine")
    assert peer.frame() is None


@case
def closed_in_mid_call(peer: Peer) -> None:
    peer.open(1, "Slow")
    other = Peer(peer.path, peer.victim)
    other.echoes(1)  # so the call is being handled
    peer.socket.close()
    assert peer.victim.cancelled.wait(HANG)
    peer.victim.gate.set()
    other.echoes(3)
    other.socket.close()


@case
def closed_while_it_is_written_to(peer: Peer) -> None:
    for stream in range(1, 41, 2):
        peer.open(stream, "Count", b"10000")
    assert peer.frame() is not None
    peer.socket.close()


@case
def what_handlers_do(peer: Peer) -> None:
    for number, (value, code, text) in enumerate(
        [
            (b"exit", UNKNOWN, None),
            (b"surrogates", 5, None),
            (b"nothing", UNKNOWN, None),
            (b"large", EXHAUSTED, None),
        ]
    ):
        peer.open(2 * number + 1, "Raise", value)
        peer.answered(2 * number + 1, code, text)
    peer.echoes(101)


@case
def large_answers_never_interleave(peer: Peer) -> None:
    def send() -> None:
        for stream in range(1, 401, 2):
            peer.open(stream, "Echo", bytes([stream % 251]) * LARGE)

    sending = threading.Thread(target=send)
    sending.start()
    seen = set()
    for _ in range(200):
        frame = peer.frame()
        assert frame is not None
        value = BytesValue.FromString(decode_response(frame.data).payload).value
        assert value == bytes([frame.stream_id % 251]) * LARGE
        seen.add(frame.stream_id)
    sending.join(HANG)
    assert seen == set(range(1, 401, 2))


@case
def file_descriptors_with_the_bytes(peer: Peer) -> None:
    for stream in range(1, 101, 2):
        inside, outside = os.pipe()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [inside, outside]))]
        data = opening(stream, "Echo", b"x")
        assert peer.socket.sendmsg([data], rights) == len(data)
        os.close(inside)
        os.close(outside)
        peer.echoed(stream)
