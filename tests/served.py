"""A server of ours with its two threads, for tests of it with the Python client."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import _reaper, jobs
from shimcore._ttrpc import COROUTINE, INLINE, POOL, Context, Server
from shimcore.ttrpc import Client

HANG = 60.0  # seconds after which a test that should have ended has hung
SERVICE = "test.Service"

Handler = Callable[[BytesValue, Context], Any]


class Rig:
    """A core and a server, each with its thread, at a socket of their own. Methods are added before start()."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = str(path)
        self.core = _reaper.Core("ns", "")
        self.server = Server(self.core, **options)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(256)
        self.server.add_listener(listener.detach())
        self.threads = [threading.Thread(target=self.core.run), threading.Thread(target=self.server.run)]

    def add(self, name: str, kind: int, handler: Handler) -> None:
        self.server.add_service(SERVICE, {name: (kind, handler, BytesValue)})

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def client(self) -> Client:
        return Client(self.path)

    def stop(self) -> None:
        self.server.shutdown(HANG)
        self.core.stop()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(HANG)
                assert not thread.is_alive()


@pytest.fixture
def rig(tmp_path_factory: pytest.TempPathFactory, session_root: Path) -> Iterator[Rig]:
    made = Rig(session_root / f"srv-{time.monotonic_ns()}.sock")
    yield made
    made.stop()
    os.unlink(made.path)


def echo(request: BytesValue, context: Context) -> BytesValue:
    return BytesValue(value=request.value)


async def echo_later(request: BytesValue, context: Context) -> BytesValue:
    await jobs.sleep(0)
    return BytesValue(value=request.value)


KINDS = [pytest.param(INLINE, id="inline"), pytest.param(POOL, id="pool"), pytest.param(COROUTINE, id="coroutine")]


def as_kind(kind: int, handler: Handler) -> Handler:
    """The same handler, as a coroutine function where it has to be one."""
    if kind != COROUTINE:
        return handler

    async def coroutine(request: BytesValue, context: Context) -> Any:
        await jobs.sleep(0)
        return handler(request, context)

    return coroutine


def call(client: Client, name: str, value: bytes = b"", **options: Any) -> bytes:
    return client.call(SERVICE, name, BytesValue(value=value), BytesValue, **{"timeout": HANG, **options}).value


def open_fds() -> int:
    """Of this process, once what earlier tests left to be collected is."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
