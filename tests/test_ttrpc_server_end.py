"""The compiled server under many callers, whom it lets in, and how it ends."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore._ttrpc import COROUTINE, INLINE, POOL, Context
from shimcore.errors import (
    Closed,
    Unavailable,
    Unknown,
)
from shimcore.ttrpc import Client, codec
from tests.served import HANG, KINDS, SERVICE, Rig, as_kind, call, echo, echo_later, rig

__all__ = ["rig"]


# ---- many at once ----


@pytest.mark.parametrize("kind", KINDS)
def test_64_callers_with_large_payloads(rig: Rig, kind: int) -> None:
    rig.add("Echo", kind, as_kind(kind, echo))
    rig.start()
    payloads = [os.urandom(1) * 200_000 for _ in range(64)]
    with rig.client() as client, ThreadPoolExecutor(64) as callers:
        for _ in range(4):
            assert list(callers.map(lambda value: call(client, "Echo", value), payloads)) == payloads


def test_many_connections(rig: Rig) -> None:
    rig.add("Echo", POOL, echo)
    rig.start()

    def one(number: int) -> bool:
        with rig.client() as client:
            return call(client, "Echo", b"%d" % number) == b"%d" % number

    with ThreadPoolExecutor(16) as callers:
        assert all(callers.map(one, range(300)))


# ---- who may call ----


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")
def test_another_user_is_hung_up_on() -> None:
    code = """if True:
        import os, socket, sys
        os.setgid(65534); os.setuid(65534)
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(60)
        peer.connect(sys.argv[1])
        sys.exit(peer.recv(1) != b"")
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # one that another user may look into
        os.chmod(folder, 0o755)
        made = Rig(Path(folder) / "sock")
        made.add("Echo", INLINE, echo)
        made.start()
        os.chmod(made.path, 0o777)
        assert subprocess.run([sys.executable, "-c", code, made.path], timeout=HANG).returncode == 0
        with made.client() as client:
            assert call(client, "Echo", b"ours") == b"ours"
        made.stop()


# ---- the end ----


def test_shutdown_answers_what_is_in_flight(session_root: Path) -> None:
    made = Rig(session_root / "shutdown.sock")
    entered, let_go = threading.Semaphore(0), threading.Event()

    def slow(request: BytesValue, context: Context) -> BytesValue:
        entered.release()
        assert let_go.wait(HANG)
        return BytesValue(value=bytes(3_000_000))  # more than a socket takes at once

    made.add("Slow", POOL, slow)
    made.add("Echo", INLINE, echo)
    made.start()
    with made.client() as client, made.client() as other, ThreadPoolExecutor(3) as callers:
        answers = [callers.submit(call, client, "Slow") for _ in range(2)]
        for _ in answers:
            assert entered.acquire(timeout=HANG)
        ending = callers.submit(made.server.shutdown, HANG)
        while True:  # until it has begun: what comes then is refused
            try:
                call(other, "Echo")
            except (Unavailable, Closed):
                break
        assert not ending.done()
        with pytest.raises(Closed):
            Client(made.path)
        let_go.set()
        assert [len(answer.result()) for answer in answers] == [3_000_000] * 2
        ending.result()
    made.stop()


def test_shutdown_is_bounded(session_root: Path) -> None:
    made = Rig(session_root / "bounded.sock")
    entered, let_go = threading.Event(), threading.Event()

    def stuck(request: BytesValue, context: Context) -> BytesValue:
        entered.set()
        assert let_go.wait(HANG)
        return BytesValue()

    made.add("Stuck", POOL, stuck)
    made.start()
    with made.client() as client, ThreadPoolExecutor(1) as caller:
        answer = caller.submit(call, client, "Stuck")
        assert entered.wait(HANG)
        made.server.shutdown(0.05)
        with pytest.raises(Closed):
            answer.result()
        let_go.set()
    made.stop()


@pytest.mark.parametrize("started", [False, True])
def test_shutdown_at_once(session_root: Path, started: bool) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        made = Rig(session_root / f"at-once-{started}-{number}.sock")
        if started:
            made.threads[1].start()
        made.server.shutdown(HANG)
        if not started:
            made.threads[1].start()  # too late: it must not serve
        made.threads[1].join(HANG)
        assert not made.threads[1].is_alive()
        with pytest.raises(Closed):
            made.client()
        made.threads = []
        del made
    assert len(os.listdir("/proc/self/fd")) <= fds + 3  # what is left of the last one


def test_shutdown_on_the_rpc_thread_is_refused(rig: Rig) -> None:
    rig.add("End", INLINE, lambda request, context: rig.server.shutdown())
    rig.start()
    with rig.client() as client, pytest.raises(Unknown, match="waits for the thread that called it"):
        call(client, "End")


def test_a_half_closed_connection_is_answered(rig: Rig) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def slow(request: BytesValue, context: Context) -> BytesValue:
        entered.set()
        assert let_go.wait(HANG)
        return BytesValue(value=bytes(1_000_000))

    rig.add("Slow", POOL, slow)
    rig.start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(HANG)
        peer.connect(rig.path)
        data = codec.encode_request(SERVICE, "Slow", b"", 0, ())
        peer.sendall(codec.encode_frame(1, codec.TYPE_REQUEST, codec.FLAG_REMOTE_CLOSED, data))
        peer.shutdown(socket.SHUT_WR)
        assert entered.wait(HANG)
        let_go.set()
        parser, frames = codec.FrameParser(), []
        while data := peer.recv(65536):
            frames += parser.feed(data)
    (frame,) = frames
    assert len(BytesValue.FromString(codec.decode_response(frame.data).payload).value) == 1_000_000


def test_handlers_and_requests_are_let_go_of(rig: Rig) -> None:
    import gc
    import weakref

    class Answer:
        def SerializeToString(self) -> bytes:
            return b""

    made: list[weakref.ref[Answer]] = []

    def answer(request: BytesValue, context: Context) -> Answer:
        one = Answer()
        made.append(weakref.ref(one))
        return one

    for name, kind in ("Inline", INLINE), ("Pool", POOL), ("Coroutine", COROUTINE):
        rig.add(name, kind, as_kind(kind, answer))
    rig.start()
    with rig.client() as client:
        for _ in range(10):
            for name in "Inline", "Pool", "Coroutine":
                client.call(SERVICE, name, BytesValue(), timeout=HANG)
        for name in "Inline", "Pool", "Coroutine":  # each thread has gone on to its next call
            client.call(SERVICE, name, BytesValue(), timeout=HANG)
    gc.collect()
    assert len(made) == 33
    assert sum(ref() is not None for ref in made) <= 3


def test_the_rpc_thread_sleeps_when_there_is_nothing_to_do(rig: Rig) -> None:
    """Its CPU time stands still: neither a late wake-up nor a half-closed connection makes it spin."""
    rig.add("Echo", COROUTINE, echo_later)
    rig.start()
    with rig.client() as client, socket.socket(socket.AF_UNIX) as half:
        half.connect(rig.path)
        half.shutdown(socket.SHUT_WR)
        for _ in range(200):
            call(client, "Echo")
        assert select.select([half], [], [], HANG)[0]  # it has been closed, since nothing was asked
        stat = Path(f"/proc/self/task/{rig.threads[1].native_id}/stat")

        def ticks() -> int:
            return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

        before = ticks()
        select.select([], [], [], 0.3)
        assert ticks() - before < 10
