"""Installs shims of an author's, and runs them as containerd does."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import address as addresses
from shimcore.errors import Closed, Unavailable
from shimcore.install import install
from shimcore.protos import task_pb2
from shimcore.ttrpc import Client

HANG = 60.0  # seconds after which a test that should have ended has hung
TASK = "containerd.task.v2.Task"

# An author's module: a task that can be shut down, and a service by which the test looks into the daemon.
AUTHOR = '''
import os, signal, subprocess, sys, threading
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue
from shimcore import Shim, Task, spawn
from shimcore import _reaper
from shimcore._ttrpc import POOL
made_on = []

class Service(Task):
    native = False
    def __init__(self, shim):
        self.shim = shim
    def connect(self, request, context):
        from shimcore.protos import task_pb2
        return task_pb2.ConnectResponse(shim_pid=os.getpid())
    def shutdown(self, request, context):
        self.shim.exit.signal()
        return Empty()

class Author(Shim):
    def __init__(self, runtime_id, flags, config):
        super().__init__(runtime_id, flags, config)
        made_on.append(threading.get_native_id())
        self.serving = flags.action not in ("start", "delete")
    def create_task_service(self, publisher):
        self.publisher = publisher
        self.core = publisher.core
        return Service(self)
    def register_services(self, server, publisher):
        server.add_service("test.Look", {"Eval": (POOL, self.look, BytesValue)})
    def look(self, request, context):
        return BytesValue(value=repr(eval(request.value.decode(), globals(), {"shim": self})).encode())
'''


class Installed:
    """One author's shim, and what containerd does with it."""

    def __init__(self, folder: Path, namespace: str, name: str, source: str) -> None:
        self.namespace = namespace
        self.bundle = folder / "c1"
        self.bundle.mkdir(parents=True)
        self.ttrpc = str(folder / "no.ttrpc")
        self.grpc = str(folder / "containerd.sock")
        (folder / f"{name}.py").write_text(AUTHOR + textwrap.dedent(source))
        self.binary = install(str(folder / "bin"), runtime_id=f"io.containerd.{name}.v1", shim=f"{name}:Author")
        self.started: list[str] = []

    def run(
        self,
        action: str,
        *flags: str,
        id: str = "c1",
        namespace: str | None = None,
        env: dict[str, str] | None = None,
        bundle: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        words = ["-namespace", self.namespace if namespace is None else namespace, "-address", self.grpc, "-id", id]
        words += ["-publish-binary", "/bin/true", *flags, *([action] if action else [])]
        environment = {**os.environ, "TTRPC_ADDRESS": self.ttrpc, **(env or {})}
        environment = {name: value for name, value in environment.items() if value}
        ran = subprocess.run(
            [self.binary, *words],
            cwd=bundle or self.bundle,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HANG,
        )
        # One character a byte: `delete` answers with bytes.
        done = subprocess.CompletedProcess(ran.args, ran.returncode, ran.stdout.decode("latin-1"), ran.stderr.decode())
        if action == "start" and done.returncode == 0 and done.stdout not in self.started:
            self.started.append(done.stdout)
        return done

    def start(self, *flags: str, **options: Any) -> str:
        done = self.run("start", *flags, **options)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def address(self, id: str = "c1") -> str:
        return addresses.socket_address(self.grpc, self.namespace, id)

    def look(self, address: str, code: str) -> Any:
        """The value of an expression within the daemon."""
        with Client(address) as client:
            answer = client.call("test.Look", "Eval", BytesValue(value=code.encode()), BytesValue, timeout=HANG)
        return eval(answer.value.decode())

    def pid(self, address: str) -> int:
        with Client(address) as client:
            return client.peer_credentials()[0] and client.call(
                TASK, "Connect", task_pb2.ConnectRequest(), task_pb2.ConnectResponse, timeout=HANG
            ).shim_pid

    def stop(self, address: str) -> None:
        """Shutdown, and the daemon's end."""
        self.started.remove(address)
        try:
            pidfd = os.pidfd_open(self.pid(address))
        except (Closed, ProcessLookupError):
            return
        except Unavailable:  # it ends already
            self._gone(address)
            return
        with contextlib.suppress(Closed, Unavailable), Client(address) as client:
            client.call(TASK, "Shutdown", task_pb2.ShutdownRequest(id="c1"), timeout=HANG)
        assert select.select([pidfd], [], [], HANG)[0], "the daemon does not end"
        os.close(pidfd)

    def _gone(self, address: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(HANG)
            try:
                connection.connect(address.removeprefix("unix://"))
            except OSError:
                return
            assert connection.recv(1) == b""


Make = Callable[[str], Installed]


@pytest.fixture
def author(tmp_path: Path, session_root: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Installs an author's module: what stands in the tests' common one, and what is given besides."""
    made: list[Installed] = []

    def make(source: str = "") -> Installed:
        name = f"author{time.monotonic_ns()}"
        folder = tmp_path / str(len(made))
        monkeypatch.syspath_prepend(str(folder))
        made.append(Installed(folder, namespace, name, source))
        return made[-1]

    yield make
    for one in made:
        for address in list(one.started):
            one.stop(address)


@contextlib.contextmanager
def log_of(shim: Installed) -> Iterator[int]:
    """The bundle's log FIFO, with a reader, as containerd has it."""
    path = shim.bundle / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    yield reader
    os.close(reader)


def until(log: int, *texts: bytes) -> bytes:
    """Reads the log until all these have come; returns all that did."""
    said = b""
    while not all(text in said for text in texts):
        assert select.select([log], [], [], HANG)[0], said
        said += os.read(log, 65536)
    return said
