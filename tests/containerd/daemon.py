"""A containerd of the suite's own, and what its tests ask of it through ctr.

Never touches a containerd that it did not start: each ctr names our socket, and it is ended by its pid.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shimcore.testing.leaks import cmdline, state

T = TypeVar("T")

CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{root}/c.sock"
[ttrpc]
  address = "{root}/c.sock.ttrpc"
"""


def wait_for(
    what: str, predicate: Callable[[], T | None], timeout: float = 15.0, detail: Callable[[], Any] = str
) -> T:
    """The first true value of predicate(), asked until then.

    After `timeout` seconds an AssertionError, which names `what` and what detail() then returns.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, f"no {what} within {timeout} s {detail()}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process with this pid runs; a zombie doesn't."""
    return state(pid) not in ("", "Z", "X")


class Event(NamedTuple):
    """One line of `ctr events`."""

    namespace: str
    topic: str
    body: dict[str, Any]

    @property
    def container(self) -> str:
        return str(self.body.get("container_id") or self.body.get("id") or "")


class Events:
    """The events of one daemon, collected from the moment that this was made."""

    _line = re.compile(r"^\S+ \S+ \S+ \S+ (\S+) (/\S+) (\{.*\})$")

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._seen: list[Event] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := self._line.match(line.strip()):
                with self._changed:
                    self._seen.append(Event(match[1], match[2], json.loads(match[3])))
                    self._changed.notify_all()

    def any(self) -> bool:
        with self._changed:
            return bool(self._seen)

    @property
    def all(self) -> list[Event]:
        """What has come so far, of every namespace, in order."""
        with self._changed:
            return list(self._seen)

    def wait_for(self, come: Callable[[list[Event]], bool], timeout: float = 10.0) -> None:
        """Until come(all that has been seen) is true. Raises AssertionError after so many seconds."""
        with self._changed:
            assert self._changed.wait_for(lambda: come(self._seen), timeout), f"not within {timeout} s"

    def of(self, container: str) -> list[Event]:
        """What has come so far about a container's tasks, in order."""
        return [one for one in self.all if one.container == container and one.topic.startswith("/tasks/")]

    def topics(self, container: str) -> list[str]:
        return [one.topic for one in self.of(container)]

    def wait(self, container: str, topic: str, timeout: float = 10.0) -> Event:
        """The first event of that topic about the container, come already or to come."""

        def found() -> Event | None:
            same = [one for one in self._seen if one.container == container and one.topic == topic]
            return same[0] if same else None

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout), (
                f"no {topic} of {container} within {timeout} s; seen: {self._seen}"
            )
            event = found()
        assert event is not None
        return event

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(5)


class Containerd:
    """root: its directory (a short path: unix sockets lie in it). namespace: what each ctr call names.
    path: directories before the inherited PATH, where the shims are looked for.
    config: False leaves everything but the places of its files to containerd's defaults, CRI plugin included.
    """

    def __init__(
        self, root: Path, namespace: str, path: list[Path] | None = None, config: bool = True
    ) -> None:
        self.root = root
        self.namespace = namespace
        self.address = root / "c.sock"
        self.log = root / "log"
        self.fifos = root / "fifo"
        self._process: subprocess.Popen[bytes] | None = None
        self._path = os.pathsep.join([*map(str, path or []), os.environ["PATH"]])
        root.mkdir(parents=True, exist_ok=True)
        if config:
            (root / "config.toml").write_text(CONFIG.format(root=root))
            self._argv = ["containerd", "--config", str(root / "config.toml")]
        else:
            self._argv = ["containerd", "--root", f"{root}/root", "--state", f"{root}/state"]
            self._argv += ["--address", str(self.address)]

    @property
    def pid(self) -> int:
        assert self._process is not None, "containerd does not run"
        return self._process.pid

    def bundle(self, container: str) -> Path:
        return self.root / "state" / "io.containerd.runtime.v2.task" / self.namespace / container

    def start(self) -> None:
        assert self._process is None
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": self._path},
            )

        def serves() -> bool:
            assert self._process is not None and self._process.poll() is None, self.log.read_text()
            return self.ctr("version", check=False).returncode == 0

        wait_for("answer from containerd", serves)

    def kill9(self) -> None:
        """SIGKILL to the daemon alone: shims and containers live on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        """kill9 unless that was done already, then start on the same directories."""
        if self._process is not None:
            self.kill9()
        self.start()

    def ctr(
        self, *args: str | Path, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs ctr against this daemon. check: a non-zero exit code is an AssertionError with its output.

        timeout: seconds, then subprocess.TimeoutExpired.
        """
        command = ["ctr", "--address", str(self.address), "--namespace", self.namespace, *map(str, args)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def tasks(self) -> dict[str, tuple[int, str]]:
        """Container id → (pid, status as ctr spells it)."""
        rows = [line.split() for line in self.ctr("task", "ls").stdout.splitlines()[1:]]
        return {row[0]: (int(row[1]), row[2]) for row in rows}

    def containers(self) -> list[str]:
        return self.ctr("container", "ls", "-q").stdout.split()

    def shim_pid(self, container: str) -> int:
        """The daemon process of a container's shim, found by the command line that the contract sets."""
        found = []
        for name in os.listdir("/proc"):
            argv = cmdline(int(name)) if name.isdigit() else []
            words = list(pairwise(argv))
            of_it = ("-namespace", self.namespace) in words and ("-id", container) in words
            # An interpreter may stand before the shim's own name.
            if of_it and argv[-1] not in ("start", "delete") and "containerd-shim" in " ".join(argv[:4]):
                found.append(int(name))
        assert len(found) == 1, f"shims of {container}: {[(pid, cmdline(pid)) for pid in found]}"
        return found[0]

    def shim_socket(self, container: str) -> Path:
        """Where the shim listens, from the file that it wrote in the bundle."""
        bundle = self.bundle(container)
        if (bundle / "address").exists():
            address = (bundle / "address").read_text()
        else:  # a shim of containerd 2's does not write it; containerd keeps what `start` has said
            address = json.loads((bundle / "bootstrap.json").read_text())["address"]
        return Path(address.removeprefix("unix://"))

    @contextmanager
    def events(self) -> Iterator[Events]:
        command = ["ctr", "--address", str(self.address), "--namespace", self.namespace, "events"]
        stream = Events(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        try:
            self._subscribed(stream)
            yield stream
        finally:
            stream.close()

    def _subscribed(self, stream: Events) -> None:
        # ctr says nothing once it is subscribed: touch an object until an event about it comes through.
        self.ctr("namespaces", "create", self.namespace, check=False)

        def touched() -> bool:
            self.ctr("namespaces", "label", self.namespace, f"probe={time.monotonic_ns()}")
            return bool(stream.any())

        wait_for("event", touched)
