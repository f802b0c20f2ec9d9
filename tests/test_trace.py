"""The W3C trace context of a call: how it is read, where it is seen, and where it goes."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import jobs, logger, trace
from shimcore._frames import encode_frame
from shimcore._reaper import handled
from shimcore._ttrpc import COROUTINE, INLINE, POOL, SERVER_STREAM, Context
from shimcore.ttrpc import Client, codec
from tests.authors import Make, author
from tests.faults import until
from tests.served import HANG, KINDS, SERVICE, Rig, as_kind, call, rig

__all__ = ["author", "rig"]

ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"00-{ID}-{SPAN}-01"
METADATA = [("traceparent", PARENT), ("tracestate", "a=1,b=2")]
OTHER = f"00-{'1' * 32}-{'2' * 16}-00"


def seen(found: trace.Trace | None) -> bytes:
    return b"none" if found is None else f"{found.parent} {found.state}".encode()


# ---- how it is read ----


@pytest.mark.parametrize(
    ("parent", "passed_on"),
    [
        (PARENT, PARENT),
        (f"00-{ID}-{SPAN}-ff", f"00-{ID}-{SPAN}-ff"),  # flags that we don't know are its caller's
        (f"01-{ID}-{SPAN}-01", PARENT),
        (f"cc-{ID}-{SPAN}-03", PARENT),
        (f"cc-{ID}-{SPAN}-00-what\0the\nfuture-will.be-like", f"00-{ID}-{SPAN}-00"),
        (f"cc-{ID}-{SPAN}-01-", PARENT),
    ],
)
def test_what_is_a_traceparent(parent: str, passed_on: str) -> None:
    found = trace.parse(parent)
    assert found is not None
    assert (found.trace_id, found.span_id, found.parent, found.state) == (ID, SPAN, passed_on, "")
    assert found.sampled == (found.flags & 1 == 1) and found.flags == int(parent.split("-")[3], 16)
    assert found.metadata == [("traceparent", passed_on)]


@pytest.mark.parametrize(
    "parent",
    [
        "", "00", ID, f"00-{ID}-{SPAN}", f"00-{ID}-{SPAN}-", f"00-{ID}-{SPAN}-1", f"00-{ID}-{SPAN}-011", f"00-{ID}-{SPAN}-01-",
        f"00-{ID}-{SPAN}-01-x", f"cc-{ID}-{SPAN}-01.x", f"cc-{ID}-{SPAN}-011", f"ff-{ID}-{SPAN}-01", f"0-{ID}-{SPAN}-011",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{ID}-{'0' * 16}-01", f"00-{ID.upper()}-{SPAN}-01", f"00-{ID}-{SPAN.upper()}-01",
        f"0g-{ID}-{SPAN}-01", f"00-{ID}-{SPAN}-0x", f"00-{ID}-{SPAN}--1", f"00-{ID}-{SPAN}- 1", f"00-{ID}-{SPAN}-1_",
        f"00-{ID[:-1]}-{SPAN}-001", f"00-{ID[:-2]}--{SPAN}-01", f"00_{ID}_{SPAN}_01", f" {PARENT}", f"{PARENT} ", f"{PARENT}\n",
        f"00-{ID[:-1]}\N{ARABIC-INDIC DIGIT ONE}-{SPAN}-01", f"00-{ID[:-1]}\ufffd-{SPAN}-01", "-" * 55, "0" * 55, "x" * 100_000,
    ],
)  # fmt: skip
def test_what_is_none(parent: str) -> None:
    assert trace.parse(parent) is None


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("a=1", "a=1"),
        (" a=1 ,\t b=2,, ", "a=1,b=2"),
        (",".join(f"k{n}=v" for n in range(32)), ...),
        (",".join(["k" * 256 + "=" + "v" * 256] * 32), ...),
        (",".join(f"k{n}=v" for n in range(33)), ""),
        ("k=" + "v" * 20_000, ""),
        ("a=\0", ""),
        ("a=1\nTRACEPARENT=x", ""),
        ("a=\ufffd", ""),
    ],
)
def test_what_is_a_tracestate(state: str, kept: Any) -> None:
    found = trace.parse(PARENT, state)
    assert found is not None and found.state == (state if kept is ... else kept)


def test_metadata() -> None:
    def of(*pairs: tuple[str, str]) -> bytes:
        return seen(trace.of(pairs))

    assert of(*METADATA) == of(("TraceParent", PARENT), ("x", "y"), ("TRACESTATE", "a=1"), ("tracestate", "b=2"))
    assert of(*METADATA) == f"{PARENT} a=1,b=2".encode()
    assert of(("tracestate", "a=1")) == of() == b"none"
    assert of(("traceparent", PARENT), ("traceparent", OTHER)) == b"none"


# ---- where it is seen ----


def both(request: BytesValue, context: Context) -> BytesValue:
    return BytesValue(value=seen(context.trace) + b"|" + seen(trace.current()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_sees_it(rig: Rig, kind: int) -> None:
    rig.add("See", kind, as_kind(kind, both))
    rig.start()
    with rig.client() as client:
        there = f"{PARENT} a=1,b=2".encode()
        for _ in range(2):
            assert call(client, "See", metadata=METADATA) == there + b"|" + there
            assert call(client, "See") == call(client, "See", metadata=[("traceparent", "x")]) == b"none|none"


def test_threads_that_ask_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes] = []

    def see(request: BytesValue, context: Context) -> BytesValue:
        def of(metadata: list[tuple[str, str]]) -> trace.Trace | None:
            """While the first is read, another thread asks."""
            monkeypatch.undo()
            other = threading.Thread(target=lambda: answers.append(seen(context.trace)))
            other.start()
            other.join()
            return trace.of(metadata)

        monkeypatch.setattr(trace, "of", of)
        answers.append(seen(context.trace))
        return BytesValue()

    rig.add("See", INLINE, see)
    rig.start()
    with rig.client() as client:
        call(client, "See", metadata=METADATA)
    assert answers == [f"{PARENT} a=1,b=2".encode()] * 2


def test_nothing_is_kept_when_a_handler_has_failed(rig: Rig) -> None:
    threads: dict[str, Any] = {}

    def fail(request: BytesValue, context: Context) -> BytesValue:
        raise ValueError

    async def background() -> None:
        threads["background"] = handled()

    async def later(request: BytesValue, context: Context) -> BytesValue:
        await jobs.sleep(0)
        jobs.Task(rig.core, background()).step()  # it answers nobody, and may live for longer than the call
        assert handled() is context
        return BytesValue(value=seen(await jobs.in_pool(trace.current)))

    for name, kind in ("Inline", INLINE), ("Pool", POOL), ("Coroutine", COROUTINE):
        rig.add(name, kind, as_kind(kind, fail))
    rig.add("Later", COROUTINE, later)
    rig.start()
    with rig.client() as client:
        for name in "Inline", "Pool", "Coroutine":
            with pytest.raises(Exception, match="ValueError"):
                call(client, name, metadata=METADATA)
        assert call(client, "Later", metadata=METADATA) == f"{PARENT} a=1,b=2".encode()
        assert threads == {"background": None}
        told = threading.Event()

        def look() -> None:
            threads["rpc"] = handled()
            rig.core.pool.submit(lambda: (threads.__setitem__("pool", handled()), told.set()))

        rig.core.post(look)
        assert told.wait(HANG)
        assert threads == {"background": None, "rpc": None, "pool": None}


@pytest.mark.parametrize("kind", [POOL, COROUTINE])
def test_a_stream_sees_it(rig: Rig, kind: int) -> None:
    def blocking(request: BytesValue, context: Context) -> Iterator[BytesValue]:
        for _ in range(3):
            yield both(request, context)

    async def awaiting(request: BytesValue, context: Context) -> Any:
        for _ in range(3):
            await jobs.sleep(0)
            yield both(request, context)

    handler = awaiting if kind == COROUTINE else blocking
    rig.server.add_service(SERVICE, {"See": (kind, handler, BytesValue, SERVER_STREAM)})
    rig.start()
    with rig.client() as client:
        stream = client.stream(
            SERVICE, "See", b"", BytesValue, client_streams=False, server_streams=True, timeout=HANG, metadata=METADATA
        )
        there = f"{PARENT} a=1,b=2".encode()
        assert [one.value for one in stream] == [there + b"|" + there] * 3


def test_calls_that_take_turns_see_their_own(rig: Rig) -> None:
    gates = [jobs.Event(), jobs.Event()]

    async def see(request: BytesValue, context: Context) -> BytesValue:
        mine = request.value[0]
        before = seen(trace.current())
        if mine:
            gates[0].set()  # which resumes the other one
            await gates[1]
        else:
            await gates[0]
            gates[1].set()
        return BytesValue(value=before + b"|" + seen(trace.current()))

    rig.add("See", COROUTINE, see)
    rig.start()
    with rig.client() as client:
        first = client.start(SERVICE, "See", BytesValue(value=b"\0"), BytesValue, HANG, [("traceparent", PARENT)])
        second = client.start(SERVICE, "See", BytesValue(value=b"\1"), BytesValue, HANG, [("traceparent", OTHER)])
        assert first.result().value == f"{PARENT} |{PARENT} ".encode()
        assert second.result().value == f"{OTHER} |{OTHER} ".encode()


def test_a_value_that_is_not_utf8_breaks_no_call(rig: Rig) -> None:
    def see(request: BytesValue, context: Context) -> BytesValue:
        return BytesValue(value=repr(context.metadata).encode() + seen(context.trace))

    rig.add("See", INLINE, see)
    rig.start()
    pair = codec.encode_field(1, b"traceparent") + codec.encode_field(2, PARENT.encode() + b"\xff")
    data = codec.encode_request(SERVICE, "See", b"", 0, [("k", "v")]) + codec.encode_field(5, pair)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(rig.path)
        peer.settimeout(HANG)
        peer.sendall(encode_frame(1, codec.TYPE_REQUEST, codec.FLAG_REMOTE_CLOSED, data))
        parser = codec.FrameParser()
        frames: list[codec.Frame] = []
        while not frames:
            frames = list(parser.feed(peer.recv(65536)))
    response = codec.decode_response(frames[0].data)
    assert (response.code, response.message) == (0, "")
    wanted = repr([("k", "v"), ("traceparent", PARENT + "\ufffd")]).encode() + b"none"
    assert BytesValue.FromString(response.payload).value == wanted


def test_nothing_is_imported_for_a_call_without(session_root: Path) -> None:
    program = """
import sys
from google.protobuf.wrappers_pb2 import BytesValue
from shimcore import logger
from shimcore._reaper import Core
from shimcore._ttrpc import INLINE, Server
from shimcore.ttrpc import Client
import socket, threading
core = Core("ns", "")
server = Server(core)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
server.add_listener(listener.detach())
def see(request, context):
    logger.set_logger(logger.Logger("/dev/null")).info("x")
    logger.info("x")
    return BytesValue(value=b"%d" % ("shimcore.trace" in sys.modules))
server.add_service("s", {"See": (INLINE, see, BytesValue)})
threads = [threading.Thread(target=core.run), threading.Thread(target=server.run)]
[thread.start() for thread in threads]
with Client(sys.argv[1], namespace="ns") as client:
    print(client.call("s", "See", b"", BytesValue, 60).value)
    print(client.call("s", "See", b"", BytesValue, 60, [("traceparent", sys.argv[2])]).value)
server.shutdown()
core.stop()
"""
    command = [sys.executable, "-c", program, str(session_root / "imported.sock"), PARENT]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.stdout, done.stderr) == ("b'0'\nb'1'\n", "")


# ---- in the log ----


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logger.Logger]:
    (tmp_path / "log").touch()
    made = logger.Logger(str(tmp_path / "log"), logger.TRACE, namespace="ns")
    before = logger.set_logger(made)
    yield made
    logger.set_logger(before)
    made.close()


def test_lines_of_a_call_have_it(rig: Rig, log: logger.Logger, tmp_path: Path) -> None:
    def note(request: BytesValue, context: Context) -> BytesValue:
        logger.info("handled", key="value")
        if request.value:
            logger.info("theirs", trace="mine", trace_id="mine")
        return BytesValue()

    async def later(request: BytesValue, context: Context) -> BytesValue:
        await jobs.sleep(0)
        await jobs.in_pool(logger.info, "in the pool")
        return note(request, context)

    rig.add("Inline", INLINE, note)
    rig.add("Pool", POOL, note)
    rig.add("Later", COROUTINE, later)
    rig.start()
    with rig.client() as client:
        for name in "Inline", "Pool", "Later":
            call(client, name, metadata=METADATA)
        call(client, "Inline")
        logger.info("outside")
        tail = f' trace="{ID}-{SPAN}"'
        lines = [line.partition(" level=info")[2] for line in (tmp_path / "log").read_text().splitlines()]
        handled = f' namespace="ns"{tail} key="value" msg="handled"'
        assert lines == [
            handled, handled, f' namespace="ns"{tail} msg="in the pool"', handled,
            ' namespace="ns" key="value" msg="handled"', ' namespace="ns" msg="outside"',
        ]  # fmt: skip
        (tmp_path / "log").write_text("")
        log.format = logger.format_json
        call(client, "Inline", b"x", metadata=METADATA)
        call(client, "Inline")
        objects = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(one.get("trace_id"), one.get("span_id"), one.get("trace")) for one in objects] == [
        (ID, SPAN, None), ("mine", SPAN, "mine"), (None, None, None),
    ]  # fmt: skip


def test_what_is_logged_for_a_handler_that_failed_has_it(rig: Rig, log: logger.Logger, tmp_path: Path) -> None:
    def fail(request: BytesValue, context: Context) -> BytesValue:
        raise ValueError("what")

    gone = threading.Event()
    begun = threading.Event()
    over = jobs.Event()

    async def wait(request: BytesValue, context: Context) -> BytesValue:
        def cancelled() -> None:
            logger.info("gone")
            over.set()
            gone.set()

        context.on_cancel(cancelled)
        begun.set()
        await over
        return BytesValue()

    for name, kind in ("Inline", INLINE), ("Pool", POOL), ("Coroutine", COROUTINE):
        rig.add(name, kind, as_kind(kind, fail))
    rig.add("Wait", COROUTINE, wait)
    rig.start()
    with rig.client() as client:
        for name in "Inline", "Pool", "Coroutine":
            with pytest.raises(Exception, match="what"):
                call(client, name, metadata=METADATA)
        client.start(SERVICE, "Wait", b"", None, None, METADATA)
        assert begun.wait(HANG)
    assert gone.wait(HANG)
    until(lambda: log.written == 4)  # a handler is answered before its failure is logged
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and all(f'trace="{ID}-{SPAN}"' in line for line in lines), lines


def test_a_shims_daemon_logs_it(author: Make) -> None:
    shim = author()
    address = shim.start(env={"SHIMCORE_LOG_FORMAT": "json"})
    said = b"[sys.modules['shimcore.logger'].info('asked'), 'shimcore.trace' in sys.modules, "
    said += b"sys.modules['shimcore.logger'].get_logger().recent[-1]][1:]"
    with Client(address) as client:

        def asked(metadata: list[tuple[str, str]]) -> tuple[bool, dict[str, Any]]:
            value = BytesValue(value=said)
            answer = client.call("test.Look", "Eval", value, BytesValue, HANG, metadata).value
            imported, line = ast.literal_eval(answer.decode())
            return imported, json.loads(line)

        imported, line = asked([])
        assert (imported, line["msg"], "trace_id" in line) == (False, "asked", False)
        imported, line = asked(METADATA)
        assert (imported, line["msg"], line["trace_id"], line["span_id"]) == (True, "asked", ID, SPAN)
