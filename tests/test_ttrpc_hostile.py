"""Hostile inputs to the servers: each is alive afterwards, serves its other connections, and has kept no fd and no memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore import ttrpc
from tests.hostile import CASES, MAX_INFLIGHT, SERVICE, Peer, Victim
from tests.served import HANG, open_fds, resident

Play = Callable[[Peer], None]


@pytest.fixture
def served(session_root: Path) -> Iterator[tuple[str, Victim]]:
    victim = Victim()
    path = f"{session_root}/hostile-{time.monotonic_ns()}.sock"
    with ttrpc.Server(max_inflight=MAX_INFLIGHT, max_unsent=1 << 20, max_unread=1 << 20) as server:
        server.register(SERVICE, victim)
        server.listen(path)
        server.start()
        yield path, victim
        victim.gate.set()
        server.shutdown(HANG)


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
