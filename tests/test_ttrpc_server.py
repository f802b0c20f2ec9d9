"""The compiled server with the Python client: every kind of handler, what they may raise, and how it ends."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import _reaper, jobs
from shimcore._ttrpc import COROUTINE, INLINE, POOL, Context
from shimcore.errors import (
    AlreadyExists,
    Closed,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    ShimError,
    Unimplemented,
    Unknown,
)
from tests.served import HANG, KINDS, SERVICE, Rig, as_kind, call, echo, echo_later, rig

__all__ = ["rig"]


# ---- handlers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 70_000, 4_000_000])
def test_each_kind_answers(rig: Rig, kind: int, size: int) -> None:
    rig.add("Echo", kind, as_kind(kind, echo))
    rig.start()
    with rig.client() as client:
        value = os.urandom(size)
        for _ in range(3):
            assert call(client, "Echo", value) == value


def test_where_each_kind_runs(rig: Rig) -> None:
    def where(request: BytesValue, context: Context) -> BytesValue:
        return BytesValue(value=b"%d" % threading.get_ident())

    for name, kind in ("Inline", INLINE), ("Pool", POOL), ("Coroutine", COROUTINE):
        rig.add(name, kind, as_kind(kind, where))
    rig.start()
    rpc = rig.threads[1].ident
    with rig.client() as client:
        assert int(call(client, "Inline")) == rpc
        assert int(call(client, "Coroutine")) == rpc
        assert int(call(client, "Pool")) not in (rpc, rig.threads[0].ident, threading.get_ident())


def test_a_pool_handler_that_blocks_holds_no_other_kind_up(rig: Rig) -> None:
    let_go = threading.Event()

    def block(request: BytesValue, context: Context) -> BytesValue:
        assert let_go.wait(HANG)
        return BytesValue()

    rig.add("Block", POOL, block)
    rig.add("Inline", INLINE, echo)
    rig.add("Coroutine", COROUTINE, echo_later)
    rig.start()
    with rig.client() as client, ThreadPoolExecutor(8) as callers:
        blocked = [callers.submit(call, client, "Block") for _ in range(8)]
        for _ in range(20):
            assert call(client, "Inline", b"x") == call(client, "Coroutine", b"x") == b"x"
        let_go.set()
        assert [one.result() for one in blocked] == [b""] * 8


def test_parked_coroutines_hold_no_thread(rig: Rig) -> None:
    event = jobs.Event()

    async def park(request: BytesValue, context: Context) -> BytesValue:
        await event
        return BytesValue(value=request.value)

    rig.add("Park", COROUTINE, park)
    rig.add("Inline", INLINE, echo)
    rig.start()
    with rig.client() as client, ThreadPoolExecutor(64) as callers:
        parked = [callers.submit(call, client, "Park", b"%d" % number) for number in range(64)]
        call(client, "Inline")
        before = threading.active_count()
        assert not any(one.done() for one in parked)
        rig.core.post(event.set)
        assert [one.result() for one in parked] == [b"%d" % number for number in range(64)]
        assert threading.active_count() <= before


ERRORS = [
    (NotFound("no c"), NotFound, "no c"),
    (AlreadyExists("there"), AlreadyExists, "there"),
    (FailedPrecondition("stopped"), FailedPrecondition, "stopped"),
    (Unimplemented("later"), Unimplemented, "later"),
    (NotImplementedError(), Unimplemented, "not implemented"),
    (ValueError("what"), Unknown, "ValueError: what"),
    (OSError(2, "No such file or directory", "/x"), Unknown, "/x: No such file or directory (ENOENT)"),
    (SystemExit(3), Unknown, "SystemExit: 3"),
    (KeyboardInterrupt(), Unknown, "KeyboardInterrupt"),
    (GeneratorExit(), Unknown, "GeneratorExit"),
    (RuntimeError("lone \udcff surrogate"), Unknown, "RuntimeError: lone \\udcff surrogate"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("raised", "error", "text"), ERRORS, ids=[type(case[0]).__name__ for case in ERRORS])
def test_what_a_handler_raises(rig: Rig, kind: int, raised: BaseException, error: type[ShimError], text: str) -> None:
    def fail(request: BytesValue, context: Context) -> BytesValue:
        raise raised

    rig.add("Fail", kind, as_kind(kind, fail))
    rig.add("Echo", kind, as_kind(kind, echo))
    rig.start()
    with rig.client() as client:
        with pytest.raises(error) as failed:
            call(client, "Fail")
        assert type(failed.value) is error
        assert str(failed.value) == text
        assert call(client, "Echo", b"alive") == b"alive"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, b"bytes", 7, object()], ids=["None", "bytes", "int", "object"])
def test_a_result_that_is_no_message(rig: Rig, kind: int, value: object) -> None:
    rig.add("Bad", kind, as_kind(kind, lambda request, context: value))
    rig.add("Echo", kind, as_kind(kind, echo))
    rig.start()
    with rig.client() as client:
        with pytest.raises(Unknown, match=f"returned {type(value).__name__}, not a message"):
            call(client, "Bad")
        assert call(client, "Echo", b"alive") == b"alive"


def test_a_coroutine_kind_that_is_none(rig: Rig) -> None:
    rig.add("Plain", COROUTINE, echo)
    rig.start()
    with rig.client() as client, pytest.raises(Unknown):
        call(client, "Plain")


def test_unknown_names(rig: Rig) -> None:
    rig.add("Echo", INLINE, echo)
    rig.start()
    with rig.client() as client:
        with pytest.raises(Unimplemented, match=r"^service no\.Such$"):
            client.call("no.Such", "Echo", timeout=HANG)
        with pytest.raises(Unimplemented, match=r"^method Nope$"):
            client.call(SERVICE, "Nope", timeout=HANG)


def test_a_payload_that_does_not_parse(rig: Rig) -> None:
    rig.add("Echo", INLINE, echo)
    rig.start()
    with rig.client() as client:
        with pytest.raises(Internal, match="can't be parsed"):
            client.call(SERVICE, "Echo", b"\x0a\x05x", timeout=HANG)
        assert call(client, "Echo", b"alive") == b"alive"


def test_messages_that_are_too_long(rig: Rig) -> None:
    rig.add("Large", INLINE, lambda request, context: BytesValue(value=bytes(int(request.value))))
    rig.start()
    with rig.client() as client:
        with pytest.raises(ResourceExhausted, match="exceed maximum message size of 4194304"):
            call(client, "Large", b"4194304")
        assert len(call(client, "Large", b"4194290")) == 4194290


def test_the_limit_can_be_set(session_root: Path) -> None:
    made = Rig(session_root / "limit.sock", max_message=1000)
    made.add("Echo", INLINE, echo)
    made.start()
    with made.client() as client:
        with pytest.raises(ResourceExhausted, match="maximum message size of 1000"):
            call(client, "Echo", bytes(1001))
        assert call(client, "Echo", b"x") == b"x"
    made.stop()


def test_a_kind_that_is_none(rig: Rig) -> None:
    with pytest.raises(ValueError, match="none of INLINE, POOL, COROUTINE"):
        rig.add("Echo", 4, echo)


# ---- the context ----


@pytest.mark.parametrize("kind", KINDS)
def test_metadata(rig: Rig, kind: int) -> None:
    seen: list[Any] = []

    def look(request: BytesValue, context: Context) -> BytesValue:
        seen.extend([context.metadata, context.get("B"), context.get_all("a"), context.get("c"), context.get("c", "d")])
        return BytesValue()

    rig.add("Look", kind, as_kind(kind, look))
    rig.start()
    with rig.client() as client:
        call(client, "Look", metadata=[("a", "1"), ("b", "ü"), ("A", "2")])
    assert seen == [[("a", "1"), ("b", "ü"), ("a", "2")], "ü", ["1", "2"], None, "d"]


def test_deadline_and_peer(rig: Rig) -> None:
    seen: list[Any] = []

    def look(request: BytesValue, context: Context) -> BytesValue:
        seen.append((context.remaining, context.cancelled, context.peer))
        return BytesValue()

    rig.add("Look", INLINE, look)
    rig.start()
    with rig.client() as client:
        client.call(SERVICE, "Look", BytesValue())
        client.call(SERVICE, "Look", BytesValue(), timeout=50)
    assert seen[0] == (None, False, (os.getpid(), os.geteuid(), os.getegid()))
    assert 0 < seen[1][0] <= 50


def test_cancelled_by_the_deadline(rig: Rig) -> None:
    seen, given_up = threading.Event(), threading.Event()

    def wait(request: BytesValue, context: Context) -> BytesValue:
        while not context.cancelled:
            time.sleep(0)
        seen.set()
        assert given_up.wait(HANG)
        return BytesValue(value=b"too late")

    rig.add("Wait", POOL, wait)
    rig.add("Echo", INLINE, echo)
    rig.start()
    with rig.client() as client:
        with pytest.raises(DeadlineExceeded):
            call(client, "Wait", timeout=0.02)
        assert seen.wait(HANG)
        given_up.set()
        assert call(client, "Echo", b"alive") == b"alive"  # the late answer is dropped in silence


def test_cancelled_when_the_caller_goes(rig: Rig) -> None:
    entered, seen = threading.Event(), threading.Event()

    def wait(request: BytesValue, context: Context) -> BytesValue:
        assert not context.cancelled
        entered.set()
        while not context.cancelled:
            time.sleep(0)
        seen.set()
        return BytesValue()

    rig.add("Wait", POOL, wait)
    rig.start()
    client = rig.client()
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(call, client, "Wait")
        assert entered.wait(HANG)
        client.close()
        assert seen.wait(HANG)
        with pytest.raises(Closed):
            answer.result()


# ---- Wait, State and Connect in C ----


def test_native_methods(rig: Rig) -> None:
    from shimcore.protos import task_pb2

    rig.server.native_task("containerd.task.v2.Task")
    told: list[Any] = []
    rig.server.on_note(told.append)
    rig.start()
    constant = task_pb2.StateResponse(id="c", bundle="/b", stdout="/out").SerializeToString()
    slot = rig.core.open("c", constant)
    pid, pidfd = _reaper.spawn(["sleep", "1000"])
    os.close(pidfd)
    slot.bind(pid)
    slot.announce()
    service = "containerd.task.v2.Task"
    with rig.client() as client, ThreadPoolExecutor(50) as callers:

        def state() -> Any:
            return client.call(service, "State", task_pb2.StateRequest(id="c"), task_pb2.StateResponse, timeout=HANG)

        waits = [
            callers.submit(client.call, service, "Wait", task_pb2.WaitRequest(id="c"), task_pb2.WaitResponse, HANG)
            for _ in range(50)
        ]
        now = state()
        assert (now.id, now.bundle, now.stdout, now.pid, now.status) == ("c", "/b", "/out", pid, _reaper.CREATED)
        connect = client.call(service, "Connect", task_pb2.ConnectRequest(id="c"), task_pb2.ConnectResponse, timeout=HANG)
        assert (connect.shim_pid, connect.task_pid) == (os.getpid(), pid)
        with pytest.raises(DeadlineExceeded):
            client.call(service, "Wait", task_pb2.WaitRequest(id="c"), task_pb2.WaitResponse, timeout=0.01)
        with pytest.raises(NotFound, match="container d not found"):
            client.call(service, "Wait", task_pb2.WaitRequest(id="d"), task_pb2.WaitResponse, timeout=HANG)
        slot.kill(9)
        answers = [one.result() for one in waits]
        assert {(one.exit_status, one.exited_at.ToNanoseconds()) for one in answers} == {(137, slot.exited_at)}
        now = state()
        assert (now.status, now.exit_status, now.exited_at.ToNanoseconds()) == (_reaper.STOPPED, 137, slot.exited_at)
    slot.forget()
