"""A fake OCI runtime whose timing a test decides: runc's command line, plain processes, under a millisecond a call.

::

    with FakeRuntime(directory) as runtime, Rig(shim, runtime=str(runtime.binary), env=runtime.environment) as rig:
        runtime.rule("exec", "made hold", id="c1")   # every exec of c1 stops before its pid file is written
        ...                                          # Start of an exec, on another thread
        with runtime.wait("exec", "made") as held:
            os.kill(held.pid, 9)                     # the process has died, and the runtime knows nothing of it
        # leaving lets the runtime go on

What can be put into a rule, the steps, and the programs that a process's args may name instead of a file (`@exit 3`,
`@gate FIFO 7`) stand at the top of fake_runtime.c.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Self

from shimcore.rig.bundle import process

BINARY = Path(__file__).resolve().parent.parent / "_bin" / "fake-runtime"


class RuntimeTimeout(Exception):
    """The runtime did not come to a step in time; the text lists where it did."""


class Held:
    """A runtime call that waits at a step. Leaving it as a context manager lets it go on.

    caller: the runtime's own pid; pid: of the container's process, 0 where there is none yet.
    """

    def __init__(self, connection: socket.socket, line: str) -> None:
        caller, pid, self.command, self.step, self.id, self.exec_id = line.rstrip("\n").split("\t")
        self.caller = int(caller)
        self.pid = int(pid)
        self._connection: socket.socket | None = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.command, self.id, self.exec_id, self.step)))

    def _answer(self, text: bytes) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with connection:
                try:
                    connection.send(text, socket.MSG_NOSIGNAL)
                except OSError:
                    pass  # it has been killed

    def release(self) -> None:
        """Let it go on. Idempotent."""
        self._answer(b"go\n")

    def exit(self, status: int) -> None:
        """Make it end here with this status."""
        self._answer(b"exit %d\n" % status)

    def kill(self, signum: int = 9) -> None:
        """Make it die here by this signal."""
        self._answer(b"kill %d\n" % signum)

    def gone(self, timeout: float = 10.0) -> bool:
        """Whether it is killed by somebody else within `timeout` seconds."""
        if self._connection is None:
            return True
        return bool(select.select([self._connection], [], [], timeout)[0])


class FakeRuntime:
    """The runtime's script and its control socket, in `directory`, whose path must be short (unix(7): 107 bytes).

    binary: for runc's option binary_name. environment: what the shim's environment needs. A context manager.
    """

    def __init__(self, directory: Path) -> None:
        if not BINARY.exists():
            raise FileNotFoundError(f"{BINARY} is not built")
        self.directory = directory
        self.binary = BINARY
        self.environment = {"SHIMCORE_FAKE_RUNTIME": str(directory)}
        directory.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition()
        self._waiting: list[Held] = []
        self._seen: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(str(directory / "control"))
        self._listener.listen(1024)
        self._thread = threading.Thread(target=self._accept, name="fake runtime", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets every call that is held go on. Idempotent."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # what wakes accept
        except OSError:
            return
        self._thread.join()
        self._listener.close()
        for held in self._waiting:
            held.release()

    # ---- the script ----------------------------------------------------------------------------------------

    def _rule(self, command: str, id: str, exec_id: str) -> Path:
        return self.directory / ".".join(filter(None, (command, id, exec_id)))

    def rule(self, command: str, *lines: str, id: str = "", exec_id: str = "") -> None:
        """From now on calls of this command do what the lines say, at their steps. The narrowest rule counts, alone."""
        path = self._rule(command, id, exec_id)
        new = path.with_name(f".{path.name}")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(path)

    def forget(self, command: str, *, id: str = "", exec_id: str = "") -> None:
        """Takes a rule back."""
        self._rule(command, id, exec_id).unlink(missing_ok=True)

    def gate(self, name: str = "gate") -> Gate:
        """A FIFO for `@gate`."""
        return Gate(self.directory / f"{name}.fifo")

    # ---- what has happened ---------------------------------------------------------------------------------

    @property
    def calls(self) -> list[str]:
        """`COMMAND ID [EXEC]` of every call so far, in order."""
        try:
            return (self.directory / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []

    def wait(self, command: str = "", step: str = "", *, id: str = "", exec_id: str = "", timeout: float = 10.0) -> Held:
        """The next call that is held, of those that fit; each is returned once. Raises RuntimeTimeout."""
        deadline = time.monotonic() + timeout
        wanted = (("command", command), ("step", step), ("id", id), ("exec_id", exec_id))
        with self._changed:
            while True:
                for held in self._waiting:
                    if all(not value or getattr(held, name) == value for name, value in wanted):
                        self._waiting.remove(held)
                        return held
                if not self._changed.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                    what = " ".join(filter(None, (command, id, exec_id, step)))
                    raise RuntimeTimeout(f"no call {what!r} was held within {timeout} s; held so far: {self._seen}")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            line = b""
            while not line.endswith(b"\n"):  # at most 300 bytes, which come at once
                piece = connection.recv(4096)
                if not piece:
                    break
                line += piece
            if not line.endswith(b"\n"):
                connection.close()
                continue
            held = Held(connection, line.decode())
            with self._changed:
                self._waiting.append(held)
                self._seen.append(str(held))
                self._changed.notify_all()


class Gate:
    """Lets processes end at the moment that the test chooses: `args(7)` is a program that exits with 7 when it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        self._fd = -1

    def args(self, status: int = 0) -> list[str]:
        """A program that waits at the gate, then exits with `status`, or dies by signal -status."""
        return ["@gate", str(self.path), str(status)]

    def open(self) -> None:
        """Who waits goes on now, who comes later at once. Never blocks."""
        # Read-write: a write-only open fails while nobody waits (fifo(7)).
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Shuts it again for those who come later, and removes it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)


def program(*args: str) -> dict[str, object]:
    """A Process of the runtime spec for `args`."""
    return process(args)
