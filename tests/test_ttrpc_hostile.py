"""Hostile inputs to the servers: each is alive afterwards, serves its other connections, and has kept no fd and no memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore import ttrpc
from shimcore.ttrpc import aio
from tests.hostile import CASES, MAX_INFLIGHT, SERVICE, Peer, Victim
from tests.served import HANG, open_fds, resident

Play = Callable[[Peer], None]


LIMITS = {"max_inflight": MAX_INFLIGHT, "max_unsent": 1 << 20, "max_unread": 1 << 20}


@contextlib.contextmanager
def threads(path: str, victim: Victim) -> Iterator[None]:
    with ttrpc.Server(**LIMITS) as server:
        server.register(SERVICE, victim)
        server.listen(path)
        server.start()
        yield
        victim.gate.set()
        server.shutdown(HANG)


@contextlib.contextmanager
def tasks(path: str, victim: Victim) -> Iterator[None]:
    ready, enough = threading.Event(), threading.Event()

    async def serve() -> None:
        async with aio.Server(**LIMITS, workers=MAX_INFLIGHT + 4) as server:
            server.register(SERVICE, victim)
            await server.listen(path)
            ready.set()
            await asyncio.to_thread(enough.wait)
            victim.gate.set()
            await server.shutdown(HANG)

    serving = threading.Thread(target=asyncio.run, args=(serve(),))
    serving.start()
    try:
        assert ready.wait(HANG)
        yield
    finally:
        enough.set()
        serving.join(HANG)
        assert not serving.is_alive()


@pytest.fixture(params=[threads, tasks], ids=["compiled", "asyncio"])
def served(session_root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Victim]]:
    victim = Victim()
    path = f"{session_root}/hostile-{time.monotonic_ns()}.sock"
    with request.param(path, victim):
        yield path, victim


@pytest.mark.parametrize("play", CASES)
def test_hostile(served: tuple[str, Victim], play: Play) -> None:
    path, victim = served
    bystander = Peer(path, victim)
    bystander.echoes(1)
    fds, memory = open_fds(), resident()
    peer = Peer(path, victim)
    play(peer)
    peer.socket.close()
    bystander.echoes(3)
    victim.gate.set()
    deadline = time.monotonic() + HANG
    while open_fds() != fds:
        assert time.monotonic() < deadline, "the server keeps the connection's fd"
    assert resident() < memory + (128 << 20)
    bystander.echoes(5)
    bystander.socket.close()
