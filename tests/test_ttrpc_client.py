"""The pure-Python ttrpc client and codec: against protobuf's own encoder, and against peers that
misbehave."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shimcore.errors import Closed, DeadlineExceeded, Internal, InvalidArgument, NotFound, ResourceExhausted
from shimcore.protos import task_pb2
from shimcore.ttrpc import Client, codec

Handler = Callable[["Conn"], None]


class Conn:
    """The peer's end of one connection, with the codec on top."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._parser = codec.FrameParser()
        self._frames: list[codec.Frame] = []

    def frame(self) -> codec.Frame | None:
        while not self._frames:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._frames += self._parser.feed(data)
        return self._frames.pop(0)

    def request(self) -> tuple[int, codec.Request]:
        frame = self.frame()
        assert frame is not None
        assert (frame.type, frame.flags) == (codec.TYPE_REQUEST, codec.FLAG_REMOTE_CLOSED)
        return frame.stream_id, codec.decode_request(frame.data)

    def reply(self, stream_id: int, payload: bytes = b"", code: int = 0, message: str = "") -> None:
        data = codec.encode_response(payload, code, message)
        self.sock.sendall(codec.encode_frame(stream_id, codec.TYPE_RESPONSE, 0, data))

    def echo(self) -> None:
        """Answers each request with its payload until the client goes."""
        while (frame := self.frame()) is not None:
            self.reply(frame.stream_id, codec.decode_request(frame.data).payload)


class Peer:
    """A server that gives each connection to `handler` on a thread of its own."""

    def __init__(self, path: Path, handler: Handler, buffer: int = 0) -> None:
        self.address = f"unix://{path}"
        self.errors: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)
        if buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self._listener.bind(str(path))
        self._listener.listen()
        self._handler = handler
        self._conns: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._conns.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._handler(Conn(sock))
        except OSError:
            pass
        except BaseException as error:
            self.errors.append(error)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._conns:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(10)
        assert self.errors == []


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []
    directory = tmp_path_factory.mktemp("p")

    def start(handler: Handler, buffer: int = 0) -> Peer:
        peers.append(Peer(directory / str(len(peers)), handler, buffer))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


Serve = Callable[..., Peer]


# ---- calls -------------------------------------------------------------------------------------------------


def test_request_and_answer(serve: Serve) -> None:
    seen: list[codec.Request] = []

    def handler(conn: Conn) -> None:
        stream_id, request = conn.request()
        seen.append(request)
        conn.reply(stream_id, task_pb2.StateResponse(pid=7).SerializeToString())

    with Client(serve(handler).address, namespace="ns", metadata={"Always": "1"}) as client:
        request = task_pb2.StateRequest(id="x")
        answer = client.call("a.B", "State", request, task_pb2.StateResponse, timeout=5, metadata=[("K", "v")])
    assert answer.pid == 7
    assert seen[0].service == "a.B" and seen[0].method == "State"
    assert seen[0].payload == request.SerializeToString()
    assert 0 < seen[0].timeout_nano <= 5_000_000_000
    assert seen[0].metadata == (("always", "1"), ("containerd-namespace-ttrpc", "ns"), ("k", "v"))


def test_no_timeout_is_none_on_the_wire_and_zero_is_expired(serve: Serve) -> None:
    seen: list[int] = []

    def handler(conn: Conn) -> None:
        for _ in range(2):
            stream_id, request = conn.request()
            seen.append(request.timeout_nano)
            conn.reply(stream_id)
        conn.echo()

    with Client(serve(handler).address) as client:
        assert client.call("s", "m") == b""
        with pytest.raises(DeadlineExceeded):
            client.call("s", "m", timeout=0)
        assert client.call("s", "m", b"x") == b"x"
    assert seen == [0, -1]


def test_status_becomes_the_error_of_its_code(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        conn.reply(stream_id, code=5, message="no such thing")
        conn.echo()

    with Client(serve(handler).address) as client:
        with pytest.raises(NotFound, match="no such thing"):
            client.call("s", "m")
        assert client.call("s", "m", b"x") == b"x"


def test_empty_status_is_ok(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        data = b"\x0a\x00\x12\x01x"  # status {}, payload "x", as Rust writes it
        conn.sock.sendall(codec.encode_frame(stream_id, codec.TYPE_RESPONSE, 0, data))

    with Client(serve(handler).address) as client:
        assert client.call("s", "m", timeout=5) == b"x"


def test_many_threads_ids_rise_and_answers_find_their_callers(serve: Serve) -> None:
    ids: list[int] = []

    def handler(conn: Conn) -> None:
        held: list[tuple[int, bytes]] = []
        for _ in range(16 * 50):
            stream_id, request = conn.request()
            ids.append(stream_id)
            held.append((stream_id, request.payload))
            # All callers wait by then, so nothing more comes before these are answered; in falling order.
            if len(held) == 16:
                for item in reversed(held):
                    conn.reply(*item)
                held.clear()

    with Client(serve(handler).address) as client, ThreadPoolExecutor(16) as pool:

        def caller(number: int) -> bool:
            return all(
                client.call("s", "m", f"{number}.{turn}".encode(), timeout=20) == f"{number}.{turn}".encode()
                for turn in range(50)
            )

        assert all(pool.map(caller, range(16)))
    assert ids == list(range(1, 2 * 16 * 50, 2))


def test_64_callers_with_200_kb_both_ways_over_small_buffers(serve: Serve) -> None:
    payload = os.urandom(200_000)
    began = time.monotonic()
    with Client(serve(Conn.echo, 4096).address) as client, ThreadPoolExecutor(64) as pool:
        answers = pool.map(lambda _: client.call("s", "m", payload, timeout=30), range(64))
        assert all(answer == payload for answer in answers)
    assert time.monotonic() - began < 30


def test_stream_ids_run_out(serve: Serve) -> None:
    with Client(serve(Conn.echo).address) as client:
        client._connection._next_id = 0xFFFFFFFF
        assert client.call("s", "m", b"last") == b"last"
        with pytest.raises(ResourceExhausted):
            client.call("s", "m")


def test_lone_surrogate_is_refused_here(serve: Serve) -> None:
    with Client(serve(Conn.echo).address) as client:
        with pytest.raises(InvalidArgument):
            client.call("s", "m", metadata={"k": "\udc80"})
        assert client.call("s", "m", b"x") == b"x"


# ---- deadlines ---------------------------------------------------------------------------------------------


def test_deadline_covers_queueing_behind_a_peer_that_does_not_read(serve: Serve) -> None:
    release = threading.Event()
    seen: list[str] = []

    def handler(conn: Conn) -> None:
        release.wait(20)
        while (frame := conn.frame()) is not None:
            request = codec.decode_request(frame.data)
            seen.append(request.method)
            conn.reply(frame.stream_id, request.method.encode())

    with Client(serve(handler).address) as client, ThreadPoolExecutor(1) as pool:
        big = pool.submit(lambda: client.call("s", "big", bytes(4_000_000), timeout=20))
        while not client._connection._queue:
            time.sleep(0.001)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.call("s", "late", timeout=0.2)
        assert 0.19 < time.monotonic() - began < 0.4
        release.set()
        assert big.result() == b"big"
        assert client.call("s", "after", timeout=5) == b"after"
    # What had not begun to go out was taken back.
    assert seen == ["big", "after"]


def test_a_late_answer_is_dropped(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        first, _ = conn.request()
        second, _ = conn.request()
        conn.reply(first, b"late")
        conn.reply(first, b"twice")
        conn.reply(999, b"never asked")
        conn.reply(second, b"second")

    with Client(serve(handler).address) as client:
        with pytest.raises(DeadlineExceeded):
            client.call("s", "m", timeout=0.05)
        assert client.call("s", "m", timeout=5) == b"second"


# ---- answers that are wrong --------------------------------------------------------------------------------


def test_header_and_body_a_byte_at_a_time(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        for byte in codec.encode_frame(stream_id, codec.TYPE_RESPONSE, 0, codec.encode_response(b"hello")):
            conn.sock.send(bytes([byte]))

    with Client(serve(handler).address) as client:
        assert client.call("s", "m", timeout=5) == b"hello"


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05\x08", b"\x0a\x03\x12\x01\xff"])
def test_garbage_fails_its_own_call_alone(serve: Serve, data: bytes) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        conn.sock.sendall(codec.encode_frame(stream_id, codec.TYPE_RESPONSE, 0, data))
        conn.echo()

    with Client(serve(handler).address) as client:
        with pytest.raises(Internal):
            client.call("s", "m", timeout=5)
        assert client.call("s", "m", b"x", timeout=5) == b"x"


def test_data_on_a_unary_call_and_a_payload_that_does_not_parse(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        conn.sock.sendall(codec.encode_frame(stream_id, codec.TYPE_DATA, 0, b"x"))
        conn.echo()

    with Client(serve(handler).address) as client:
        with pytest.raises(Internal, match="type 3"):
            client.call("s", "m", timeout=5)
        with pytest.raises(Internal):
            client.call("s", "m", b"\xff", task_pb2.StateResponse, timeout=5)
        assert client.call("s", "m", b"x", timeout=5) == b"x"


def test_too_long_either_way_fails_its_own_call_alone(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        length = codec.MESSAGE_MAX + 1
        conn.sock.sendall(struct.pack(">IIBB", length, stream_id, codec.TYPE_RESPONSE, 0) + bytes(length))
        conn.echo()

    with Client(serve(handler).address) as client:
        with pytest.raises(ResourceExhausted, match=str(codec.MESSAGE_MAX + 1)):
            client.call("s", "m", timeout=20)
        with pytest.raises(ResourceExhausted):
            client.call("s", "m", bytes(codec.MESSAGE_MAX), timeout=20)
        assert client.call("s", "m", b"x", timeout=20) == b"x"


# ---- the end of a connection -------------------------------------------------------------------------------


def _before_reading(conn: Conn) -> None:
    pass


def _after_request(conn: Conn) -> None:
    conn.request()


def _in_header(conn: Conn) -> None:
    conn.request()
    conn.sock.sendall(b"\0\0\0")


def _in_body(conn: Conn) -> None:
    conn.request()
    conn.sock.sendall(codec.encode_frame(1, codec.TYPE_RESPONSE, 0, b"abcdef")[:-2])


@pytest.mark.parametrize("handler", [_before_reading, _after_request, _in_header, _in_body])
def test_every_way_a_peer_can_die_is_one_closed_error(serve: Serve, handler: Handler) -> None:
    peer = serve(handler)
    ran: list[Closed] = []
    with Client(peer.address) as client:
        client.on_close(ran.append)
        with pytest.raises(Closed) as caught:
            client.call("a.B", "m", b"x", timeout=10)
        # C 88: it has run before the failed call returned.
        assert len(ran) == 1 and client.closed
        error = caught.value
        assert (error.peer, error.method) == (peer.address, "a.B/m")
        assert error.errno in (0, errno.EPIPE, errno.ECONNRESET)
        if handler is not _before_reading:
            assert error.stream_id == 1
        with pytest.raises(Closed):
            client.call("a.B", "again")
        late: list[Closed] = []
        client.on_close(late.append)
        assert len(late) == 1 and len(ran) == 1


def test_an_answer_sent_just_before_the_end_counts(serve: Serve) -> None:
    def handler(conn: Conn) -> None:
        stream_id, _ = conn.request()
        conn.reply(stream_id, b"bye")

    for _ in range(50):
        with Client(serve(handler).address) as client:
            assert client.call("s", "m", timeout=5) == b"bye"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Closed) as caught:
        Client(str(tmp_path / "no"))
    assert caught.value.errno == errno.ENOENT
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "dead"))
    with pytest.raises(Closed) as caught:
        Client(f"unix://{tmp_path}/dead")
    assert caught.value.errno == errno.ECONNREFUSED and caught.value.peer == f"unix://{tmp_path}/dead"
    with pytest.raises(Closed):
        Client("/" + "x" * 200)


def test_abstract_address() -> None:
    name = f"shimcore-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0" + name)
        sock.listen()
        with Client("@" + name) as client:
            assert client.peer_credentials()[0] == os.getpid()


def test_close_fails_calls_in_flight_and_may_be_called_anywhere(serve: Serve) -> None:
    arrived = threading.Event()

    def handler(conn: Conn) -> None:
        for _ in range(8):
            conn.request()
        arrived.set()
        conn.frame()

    client = Client(serve(handler).address)
    inner: list[str] = []

    def callback(closed: Closed) -> None:
        client.close()
        with pytest.raises(Closed):
            client.call("s", "inside")
        inner.append("ran")
        raise RuntimeError("a bad callback")

    client.on_close(callback)
    client.on_close(lambda closed: inner.append("second"))
    hook, threading.excepthook = threading.excepthook, lambda args: inner.append(str(args.exc_value))
    try:
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(client.call, "s", str(number)) for number in range(8)]
            assert arrived.wait(10)
            client.close()
            client.close()
            found = [call.exception(10) for call in calls]
    finally:
        threading.excepthook = hook
    assert inner == ["ran", "a bad callback", "second"]
    assert all(isinstance(error, Closed) for error in found)
    assert len({id(error) for error in found}) == 8
    assert sorted(error.stream_id for error in found if isinstance(error, Closed)) == list(range(1, 17, 2))


def test_a_peer_that_only_stops_reading_ends_the_connection(serve: Serve) -> None:
    done = threading.Event()

    def handler(conn: Conn) -> None:
        conn.sock.shutdown(socket.SHUT_RD)
        done.wait(10)

    with Client(serve(handler).address) as client:
        with pytest.raises(Closed) as caught:
            for _ in range(100):
                with contextlib.suppress(DeadlineExceeded):
                    client.call("s", "m", timeout=0.05)
        assert caught.value.errno == errno.EPIPE
    done.set()


def test_no_fd_and_no_thread_is_left(serve: Serve) -> None:
    peer = serve(Conn.echo)

    def use() -> None:
        with Client(peer.address) as client:
            assert client.call("s", "m", b"x", timeout=5) == b"x"

    def count() -> tuple[int, int]:
        ours = [thread for thread in threading.enumerate() if thread.name.startswith("ttrpc")]
        inodes = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        return len(ours), sum("eventfd" in inode for inode in inodes)

    use()
    before = count()
    for _ in range(200):
        use()
    assert count() == before


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
