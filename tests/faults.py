"""A daemon of ours over the fake runtime, with a fake containerd: what the trials of exits are made with."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore.errors import ShimError
from shimcore.rig import UP, Event, FakeRuntime, Rig, Task
from shimcore.testing import Install
from shimcore.ttrpc import Client

REPO = Path(__file__).resolve().parent.parent
FULL = os.environ.get("SHIMCORE_TRIALS") == "1"
OTHER_SHIM = os.environ.get("SHIMCORE_TRIALS_SHIM", "")


def ours_only(why: str) -> None:
    """Skips a trial that is run against somebody else's shim and looks at what only ours has."""
    if OTHER_SHIM:
        pytest.skip(why)


def scale(small: int, full: int) -> int:
    """A trial's size: small in `make test`, full in `make trials`."""
    return full if FULL else small


def until(ready: Callable[[], object], timeout: float = 20.0, what: str = "") -> None:
    """Polls for what nobody announces. The limit is that of a hang."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, what or "it did not come to be"
        time.sleep(0.002)


def together(*calls: Callable[[], Any], timeout: float = 60.0) -> list[Any]:
    """Runs each call on a thread of its own; their results or exceptions, in order."""
    out: list[Any] = [TimeoutError("still running")] * len(calls)

    def run(number: int, call: Callable[[], Any]) -> None:
        try:
            out[number] = call()
        except Exception as error:
            out[number] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return out


class Later:
    """A call under way on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout: float = 20.0) -> Any:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._value


class Box:
    """One container of a lab's shim. pid: init's, once created."""

    def __init__(self, lab: Lab, id: str, args: Sequence[str], *, private: bool = True, bundle: Path | None = None) -> None:
        self.lab = lab
        self.id = id
        self.bundle = bundle or lab.rig.bundle_path(id)
        self.bundle.mkdir(parents=True, exist_ok=True)
        self.task = Task(lab.client, id, timeout=20.0)
        self.pid = 0
        self.deleted = False
        spec = {
            "ociVersion": "1.0.2",
            "process": self.process(args),
            "root": {"path": "/"},
            "linux": {"namespaces": [{"type": "pid"}] if private else []},
        }
        (self.bundle / "config.json").write_text(json.dumps(spec))

    def process(self, args: Sequence[str]) -> dict[str, Any]:
        """A Process of the runtime spec."""
        return {"args": list(args), "env": ["PATH=/usr/bin:/bin"], "cwd": str(self.bundle)}

    def create(self) -> int:
        self.pid = self.task.create(str(self.bundle), options=self.lab.rig.options)
        return self.pid

    def exec(self, exec_id: str, args: Sequence[str] = ("@sleep",), *, start: bool = True) -> int:
        """Exec and Start; the pid."""
        self.task.exec(exec_id, self.process(args))
        return self.task.start(exec_id) if start else 0

    def delete(self, exec_id: str = "") -> int:
        """Delete; the exit status."""
        status = self.task.delete(exec_id).exit_status
        self.deleted = self.deleted or not exec_id
        return status

    def status(self, exec_id: str = "") -> int:
        """Wait; the exit status."""
        return self.task.wait(exec_id).exit_status

    @property
    def events(self) -> list[Event]:
        return self.lab.events.of(self.id)

    def exits(self) -> list[tuple[str, int]]:
        """(exec id, status) of every exit told so far, in order."""
        return [(event.process, event.message.exit_status) for event in self.events if event.topic == "/tasks/exit"]

    def told(self, exec_id: str = "", *, timeout: float = 20.0) -> Event:
        return self.lab.events.wait("/tasks/exit", container=self.id, process=exec_id, timeout=timeout)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.deleted:
            return
        with contextlib.suppress(ShimError):
            with contextlib.suppress(ShimError):
                self.task.kill(9, timeout=5)
            self.task.wait(timeout=5)
            self.task.delete(timeout=5)


class Lab:
    """rig, runtime (fake), events (fake containerd), session (whose shim it is; nothing is created in it), client."""

    def __init__(self, shim: Path, root: Path, env: dict[str, str] | None = None, *, debug: bool = False) -> None:
        self.runtime = FakeRuntime(root)
        self.boxes: list[Box] = []
        environment = {**self.runtime.environment, **(env or {})}
        self.rig = Rig(
            shim, runtime=str(self.runtime.binary), rootfs=Path("/"), env=environment, debug=debug, strict=False
        )  # fmt: skip
        try:
            self.events = self.rig.events
            self.session = self.rig.container(["@sleep"], id="lab")
            self.client = self.session.client
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The shim's."""
        return self.session.shim_pid

    def box(self, id: str, args: Sequence[str] = ("@sleep",), *, create: bool = True, start: bool = True, **kw: Any) -> Box:
        box = Box(self, id, args, **kw)
        self.boxes.append(box)
        if create:
            box.create()
            if start:
                box.task.start()
        return box

    def connect(self) -> Client:
        """One more connection to the shim; the caller closes it."""
        return Client(self.session.started.address, namespace=self.rig.namespace)

    def reconnect(self) -> None:
        """As a containerd that has come back: all that hung on the old connection gets a new one."""
        self.client.close()
        self.client = self.session.client = self.session.task.client = self.connect()
        for box in self.boxes:
            box.task.client = self.client

    def call(self, name: str, *, inline: bool = False, timeout: float = 200.0, **arguments: Any) -> Any:
        """A function of labshim, in the daemon: on its pool, or inline."""
        ours_only("looks into our own daemon")
        request = BytesValue(value=json.dumps([name, arguments]).encode())
        method = "Look" if inline else "Call"
        return json.loads(self.client.call("shimcore.test.Lab", method, request, BytesValue, timeout).value)

    def stats(self) -> dict[str, int]:
        return self.call("stats", inline=True)

    def process(self) -> dict[str, Any]:
        return self.call("process", inline=True)

    def sweep(self) -> None:
        """Kill what a runtime that failed half-way has left: with a pid namespace it would die with init."""
        for pid in self.rig.leaks.processes():
            if pid != self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def settled(self) -> None:
        """Until containerd has every event."""
        until(lambda: (s := self.stats())["queued"] == s["in_flight"] == 0)

    def close(self) -> list[str]:
        """What was left behind when all containers had been ended."""
        self.runtime.close()
        if hasattr(self, "session"):
            for box in self.boxes:
                box.end()
        return self.rig.close()


@pytest.fixture(scope="session")
def lab_shim(install_shim: Install) -> Path:
    """The executable of labshim.LabShim."""
    return Path(install_shim("labshim:LabShim", "io.containerd.lab.v1", REPO / "tests" / "trials"))


@pytest.fixture
def shm() -> Iterator[Path]:
    """A file that may be made on tmpfs, where alone a shim that lives spills to."""
    path = Path(f"/dev/shm/sct-{os.urandom(4).hex()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def new_lab(lab_shim: Path, session_root: Path) -> Iterator[Callable[..., Lab]]:
    """Makes labs; for trials that break one, or need it in another environment."""
    made: list[Lab] = []

    def make(*, debug: bool = False, **env: str) -> Lab:
        made.append(Lab(lab_shim, session_root / f"f{os.urandom(3).hex()}", env, debug=debug))
        return made[-1]

    yield make
    left = [line for lab in made for line in lab.close()]
    assert not left, "\n".join(left)


@pytest.fixture(scope="module")
def shared_lab(lab_shim: Path, session_root: Path) -> Iterator[Lab]:
    lab = Lab(lab_shim, session_root / f"f{os.urandom(3).hex()}")
    yield lab
    left = lab.close()
    assert not left, "\n".join(left)


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """One daemon for a module's trials: each has its own containers, and ends them."""
    yield shared_lab
    if shared_lab.events.mode != UP:
        shared_lab.events.restart()  # what a mute one was told would be answered by nobody
    for box in shared_lab.boxes:
        box.end()
    shared_lab.boxes.clear()
    for path in shared_lab.runtime.directory.iterdir():
        if path.name not in ("control", "calls"):
            path.unlink()
