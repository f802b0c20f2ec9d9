"""shimcore.ttrpc.aio: its client and its server with each other, and each with the compiled or the threaded side."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from shimcore import inline, ttrpc
from shimcore.errors import (
    Canceled,
    Closed,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    Unknown,
)
from shimcore.ttrpc import aio
from tests.served import HANG, open_fds
from tests.test_ttrpc_public import NAME, SERVICE, Coroutines, Store, value

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def address(session_root: str) -> str:
    return f"unix://{session_root}/aio-{time.monotonic_ns()}.sock"


async def serving(address: str, implementation: object, **options: Any) -> aio.Server:
    server = aio.Server(**options)
    server.register(SERVICE, implementation)
    await server.listen(address)
    return server


def within(body: Coroutine[Any, Any, None]) -> None:
    """Runs it, and fails when a task or a reader of the loop is left."""

    async def main() -> None:
        async with asyncio.timeout(HANG):
            await body
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def get(client: aio.Client, data: bytes, timeout: float | None = HANG) -> bytes:
    return (await client.call(NAME, "GetItem", value(data), BytesValue, timeout=timeout)).value


def exchange(client: aio.Client, timeout: float = HANG) -> aio.Stream[BytesValue]:
    return client.stream(NAME, "Exchange", None, BytesValue, client_streams=True, server_streams=True, timeout=timeout)


def listing(client: aio.Client, count: int) -> aio.Stream[BytesValue]:
    many = value(b"%d" % count)
    return client.stream(NAME, "ListIDs", many, BytesValue, client_streams=False, server_streams=True, timeout=HANG)


def put_all(client: aio.Client, timeout: float = HANG) -> aio.Stream[Int64Value]:
    return client.stream(NAME, "PutAll", None, Int64Value, client_streams=True, server_streams=False, timeout=timeout)


async def every_kind(client: aio.Client) -> None:
    assert await get(client, b"x") == b"x"
    assert await get(client, b"") == b""
    with pytest.raises(NotFound, match="no such item"):
        await get(client, b"none")
    with pytest.raises(Unimplemented, match="method Missing"):
        await client.call(NAME, "Missing", timeout=HANG)
    with pytest.raises(Unimplemented, match="service other"):
        await client.call("other", "Missing", timeout=HANG)
    assert [one.value async for one in listing(client, 3)] == [b"0", b"1", b"2"]
    assert await listing(client, 0).receive() is None
    async with put_all(client) as stream:
        for _ in range(1000):
            await stream.send(value(b"1234567"))
        await stream.send(b"")
        await stream.close_send()
        assert await stream.receive() == Int64Value(value=7000)
        assert await stream.receive() is None
        with pytest.raises(FailedPrecondition):
            await stream.send(b"")
    async with exchange(client) as both:
        for data in b"a", b"", b"c" * 100_000:
            await both.send(value(data))
            assert await both.receive() == value(data)
        await both.send(value(b"stop"))
        with pytest.raises(NotFound, match="stopped"):
            await both.receive()
    assert len(await asyncio.gather(*(get(client, b"%d" % number) for number in range(500)))) == 500


@pytest.mark.parametrize("implementation", [Store, Coroutines])
def test_every_kind_of_method(address: str, implementation: type) -> None:
    async def body() -> None:
        async with await serving(address, implementation()) as server, aio.Client(address) as client:
            await every_kind(client)
            assert server.stats()["connections"] == 1 and server.stats()["in_flight"] == 0
        assert not os.path.exists(address.removeprefix("unix://"))

    within(body())


def test_its_client_and_the_compiled_server(address: str) -> None:
    async def body() -> None:
        async with aio.Client(address) as client:
            await every_kind(client)

    with ttrpc.Server() as server:
        server.register(SERVICE, Store())
        server.listen(address)
        server.start()
        within(body())


def test_the_threaded_client_and_its_server(address: str) -> None:
    def calls() -> None:
        with ttrpc.Client(address) as client:
            assert client.call(NAME, "GetItem", value(b"x"), BytesValue, HANG) == value(b"x")
            kinds = {"client_streams": True, "server_streams": True, "timeout": HANG}
            with client.stream(NAME, "Exchange", None, BytesValue, **kinds) as stream:  # type: ignore[call-overload]
                stream.send(value(b"y"))
                assert stream.receive() == value(b"y")
                stream.close_send()
                assert stream.receive() is None
            with ThreadPoolExecutor(16) as callers:
                large = value(bytes(200_000))
                done = callers.map(lambda _: client.call(NAME, "GetItem", large, BytesValue, HANG), range(64))
                assert all(one == large for one in done)

    async def body() -> None:
        async with await serving(address, Coroutines()):
            await asyncio.to_thread(calls)

    within(body())


class Gated(Coroutines):
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.waiting = asyncio.Semaphore(0)
        self.cancelled = 0

    async def get_item(self, request: BytesValue, context: Any) -> BytesValue:
        if request.value == b"wait":
            self.waiting.release()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return request


def test_a_cancelled_task_gives_its_call_up(address: str) -> None:
    async def body() -> None:
        gated = Gated()
        async with await serving(address, gated), aio.Client(address) as client:
            call = asyncio.create_task(get(client, b"wait"))
            await gated.waiting.acquire()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not client._connection.under_way
            gated.gate.set()
            assert await get(client, b"after the late answer") == b"after the late answer"
            stream = exchange(client)
            assert stream.cancel() and not stream.cancel()
            with pytest.raises(Canceled):
                await stream.receive()
            assert not client._connection.under_way

    within(body())


def test_deadlines(address: str) -> None:
    async def body() -> None:
        gated = Gated()
        async with await serving(address, gated), aio.Client(address) as client:
            for timeout in 0.05, 0:
                with pytest.raises(DeadlineExceeded):
                    await get(client, b"wait", timeout=timeout)
            async with exchange(client, timeout=0.05) as stream:
                with pytest.raises(DeadlineExceeded):
                    await stream.receive()
            assert await get(client, b"x", timeout=float("inf")) == b"x"
            while gated.cancelled < 1:  # the server ends it at the deadline too
                await asyncio.sleep(0.001)

    within(body())


def test_a_deadline_covers_what_is_queued_for_a_peer_that_does_not_read(address: str) -> None:
    async def body() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address.removeprefix("unix://"))
            listener.listen()
            async with aio.Client(address, max_unsent=100_000) as client:
                first = asyncio.create_task(client.call("s", "m", bytes(3_000_000)))
                await asyncio.sleep(0)
                with pytest.raises(DeadlineExceeded):
                    await client.call("s", "m", b"behind it", timeout=0.1)
                first.cancel()
                with pytest.raises(DeadlineExceeded):
                    async with put_all(client, timeout=0.1) as stream:
                        await stream.send(b"x")
        os.unlink(address.removeprefix("unix://"))

    within(body())


class Flood(Coroutines):
    async def list_ids(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        for number in range(int(request.value)):
            yield BytesValue(value=bytes([number]) * 100_000)


def test_unread_messages_are_bounded_and_none_is_lost(address: str) -> None:
    async def body() -> None:
        async with await serving(address, Flood(), max_unsent=200_000), aio.Client(address, max_unread=500_000) as client:
            async with listing(client, 100) as stream:
                while not client._connection._paused:
                    await asyncio.sleep(0)
                assert client._connection._unread < 1_000_000
                assert [one.value[0] async for one in stream] == list(range(100))
            assert await get(client, b"x") == b"x"
            assert client._connection._unread == 0

    within(body())


def test_a_thousand_unread_messages_hold_up_no_call(address: str) -> None:
    async def body() -> None:
        async with await serving(address, Coroutines()), aio.Client(address) as client, listing(client, 1000) as stream:
            for number in range(20):
                assert await get(client, b"%d" % number) == b"%d" % number
            assert len([one async for one in stream]) == 1000

    within(body())


@pytest.mark.parametrize("end", ["server", "client"])
def test_an_end_fails_what_is_under_way_after_the_callbacks(address: str, end: str) -> None:
    async def body() -> None:
        gated = Gated()
        told: list[Closed] = []
        server = await serving(address, gated)
        async with aio.Client(address) as client:
            client.on_close(told.append)
            call = asyncio.create_task(get(client, b"wait"))
            stream = exchange(client)
            await gated.waiting.acquire()
            await (server.shutdown(0) if end == "server" else client.close())
            with pytest.raises(Closed) as caught:
                await call
            assert len(told) == 1
            assert (caught.value.peer, caught.value.method, caught.value.stream_id) == (address, f"{NAME}/GetItem", 3)
            with pytest.raises(Closed):
                await stream.receive()
            assert client.closed
            for act in get(client, b"x"), client.call("s", "m"):
                with pytest.raises(Closed):
                    await act
            client.on_close(told.append)
            assert len(told) == 2 and told[0] is told[1]
        await server.shutdown()

    within(body())


def test_nobody_there(address: str) -> None:
    async def body() -> None:
        with pytest.raises(Closed, match="No such file"):
            await aio.Client(address).connect()
        with pytest.raises(Closed, match="not made yet"):
            await aio.Client(address).call("s", "m")

    within(body())


def test_interceptors_of_both_sides(address: str) -> None:
    seen: list[str] = []

    def tag(outgoing: ttrpc.Outgoing, proceed: Callable[[ttrpc.Outgoing], Any]) -> Any:
        outgoing.metadata.append(("tag", outgoing.method))
        return proceed(outgoing)

    def note(request: Any, context: aio.Context, handler: Any) -> Any:
        seen.append(f"{context.service} {context.method} {context.get('TAG')} {context.get_all('tag')}")
        return handler(request, context)

    async def body() -> None:
        async with await serving(address, Store(), interceptors=[note]), aio.Client(address, interceptors=[tag]) as client:
            assert await get(client, b"x") == b"x"
            assert len([one async for one in listing(client, 2)]) == 2

    within(body())
    assert seen == [f"{NAME} GetItem GetItem ['GetItem']", f"{NAME} ListIDs ListIDs ['ListIDs']"]


def test_what_a_handler_is_told(address: str) -> None:
    class Asking(Coroutines):
        async def get_item(self, request: BytesValue, context: aio.Context) -> BytesValue:
            assert context.metadata == [("key", "v")] and context.get("KEY") == "v" and context.get("none") is None
            assert context.remaining is not None and 0 < context.remaining <= HANG and not context.cancelled
            assert context.peer == (os.getpid(), os.geteuid(), os.getegid())
            return request

        @inline
        def list_ids(self, request: BytesValue, context: Any) -> Any:
            raise AssertionError

    async def body() -> None:
        async with aio.Server() as server:
            with pytest.raises(ValueError, match="ListIDs: a method that streams"):
                server.register(SERVICE, Asking())
        del Asking.list_ids
        async with await serving(address, Asking()), aio.Client(address, metadata={"Key": "v"}) as client:
            assert await get(client, b"x") == b"x"
            assert client.peer_credentials()[0] == os.getpid()

    within(body())


@pytest.mark.parametrize("kind", ["coroutine", "thread", "inline"])
def test_what_a_handler_raises(address: str, kind: str) -> None:
    def wrong(request: BytesValue, context: Any) -> Any:
        if request.value == b"exit":
            raise SystemExit(3)
        if request.value == b"none":
            return None
        if request.value == b"large":
            return BytesValue(value=bytes(5 << 20))
        raise NotFound("no \udc80 such")

    async def wrong_later(request: BytesValue, context: Any) -> Any:
        return wrong(request, context)

    class Wrong:
        get_item = staticmethod({"coroutine": wrong_later, "thread": wrong, "inline": inline(lambda *call: wrong(*call))}[kind])

    async def body() -> None:
        async with await serving(address, Wrong()) as server, aio.Client(address) as client:
            for data, error in (b"exit", Unknown), (b"none", Unknown), (b"large", ResourceExhausted), (b"other", NotFound):
                with pytest.raises(error):
                    await get(client, data)
            assert server.stats()["failures"] == 4

    within(body())


def test_a_caller_that_goes(address: str) -> None:
    told = threading.Event()

    class Blocking(Store):
        def exchange(self, requests: Iterator[BytesValue], context: Any) -> Iterator[BytesValue]:
            try:
                yield from requests
            except Canceled:
                told.set()
                raise

    async def body() -> None:
        gated = Gated()
        async with await serving(address, gated):
            async with aio.Client(address) as client:
                call = asyncio.create_task(get(client, b"wait"))
                await gated.waiting.acquire()
            with pytest.raises(Closed):
                await call
            while not gated.cancelled:
                await asyncio.sleep(0)
        async with await serving(address, Blocking()):
            async with aio.Client(address) as client:
                stream = exchange(client)
                await stream.send(value(b"x"))
                assert await stream.receive() == value(b"x")
            await asyncio.to_thread(told.wait, HANG)
            assert told.is_set()

    within(body())


def test_shutdown(address: str) -> None:
    async def body() -> None:
        gated = Gated()
        server = await serving(address, gated)
        async with aio.Client(address) as client, aio.Client(address) as other:
            assert await get(other, b"x") == b"x"
            call = asyncio.create_task(get(client, b"wait"))
            await gated.waiting.acquire()
            ending = asyncio.create_task(server.shutdown(HANG))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="server is shutting down"):
                await get(other, b"x")
            with pytest.raises(Closed):
                await aio.Client(address).connect()
            gated.gate.set()
            assert await call == b"wait"
            await ending
            await server.shutdown()

    within(body())


def test_connections_are_bounded_and_fds_come_back(address: str) -> None:
    fds = open_fds()

    async def body() -> None:
        async with await serving(address, Coroutines(), max_connections=2) as server:
            clients = [aio.Client(address) for _ in range(4)]
            for client in clients:
                await client.connect()
            assert await get(clients[0], b"x") == await get(clients[1], b"x") == b"x"
            assert server.stats()["connections"] == 2
            waiting = asyncio.create_task(get(clients[2], b"y"))
            await clients[0].close()
            assert await waiting == b"y"
            for client in clients:
                await client.close()

    within(body())
    assert open_fds() == fds


def test_a_limit_beyond_the_protocols_is_refused() -> None:
    with pytest.raises(ValueError, match="max_message 4194305 is more than ttrpc's 4194304"):
        aio.Server(max_message=4194305)


def test_another_user_is_hung_up_on(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with await serving(address, Coroutines()):
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
            async with aio.Client(address) as client:
                with pytest.raises(Closed):
                    await get(client, b"x")
            monkeypatch.undo()

    within(body())


def test_nothing_else_imports_asyncio() -> None:
    program = "import sys, shimcore.ttrpc.server, shimcore.ttrpc.stubs; sys.exit('asyncio' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
