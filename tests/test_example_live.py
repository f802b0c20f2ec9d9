"""examples/live.py: output that is watched over HTTP, by the rig and under the real containerd."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.errors import InvalidArgument
from shimcore.rig import Rig, Session
from shimcore.testing import Install
from tests.containerd.daemon import Containerd

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "live.py"
RUNTIME = "io.containerd.live.v1"
HANG = 60.0


@pytest.fixture(scope="module")
def binary(install_shim: Install) -> str:
    return install_shim("live:Live", RUNTIME, EXAMPLE.parent)


@pytest.fixture
def rig(binary: str, namespace: str, rootfs: Path) -> Iterator[Rig]:
    with Rig(binary, namespace=f"{namespace}-live", rootfs=rootfs, timeout=HANG) as made:
        yield made


class Watcher:
    def __init__(self, session: Session) -> None:
        self.said = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(HANG)
        folder = os.open(session.bundle.path, os.O_RDONLY)
        self._socket.connect(f"/proc/self/fd/{folder}/live.sock")  # unix(7): a path has at most 107 bytes
        os.close(folder)
        self._socket.sendall(b"GET / HTTP/1.1\r\nHost: shim\r\n\r\n")

    def until(self, text: bytes | None) -> bytes:
        """The body so far, once it has this; None: once it has ended."""
        while text is None or text not in self.said:
            piece = self._socket.recv(65536)
            if not piece:
                assert text is None, self.said
                break
            self.said += piece
        head, _, body = self.said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        return body

    def close(self) -> None:
        self._socket.close()


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 150


def test_a_container_from_start_to_delete(rig: Rig) -> None:
    session = rig.container(["sh", "-c", "echo hello; echo oops >&2; exit 42"])
    assert session.run() == 42
    watcher = Watcher(session)
    assert watcher.until(None) == b"hello\noops\n"
    watcher.close()
    assert session.delete().exit_status == 42
    assert session.output == "hello\noops\n"
    topics = [event.topic for event in rig.events.of(session.id)]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_two_watch_while_it_runs(rig: Rig, tmp_path: Path) -> None:
    fifo = tmp_path / "words"
    os.mkfifo(fifo)
    session = rig.container(["cat", str(fifo)])
    session.create()
    session.start()
    words = os.open(fifo, os.O_WRONLY)
    os.write(words, b"one ")
    first, gone = Watcher(session), Watcher(session)
    assert first.until(b"one") == gone.until(b"one") == b"one "
    gone.close()
    os.write(words, b"two ")
    second = Watcher(session)
    assert first.until(b"two") == second.until(b"two") == b"one two "
    os.close(words)
    assert first.until(None) == second.until(None) == b"one two "
    assert session.wait() == 0
    first.close()
    second.close()
    session.delete()
    assert session.output == "one two "


def test_more_output_than_is_kept(rig: Rig) -> None:
    session = rig.container(["sh", "-c", "head -c 1000000 /dev/zero; echo end"])
    assert session.run() == 0
    watcher = Watcher(session)
    body = watcher.until(None)
    assert (len(body), body[-4:]) == (65536, b"end\n")
    watcher.close()
    session.delete()
    assert len(session.output) == 1000004


def test_it_is_killed_while_somebody_watches(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    session.start()
    watcher = Watcher(session)
    session.task.kill(signal.SIGKILL)
    assert session.wait() == 137
    assert watcher.until(None) == b""
    watcher.close()
    session.delete()


def test_what_cannot_be_run(rig: Rig) -> None:
    session = rig.container(["/nonexistent"])
    session.create()
    with pytest.raises(InvalidArgument, match="/nonexistent: exec: No such file"):
        session.start()
    session.delete()


def test_under_containerd(containerd: Containerd, binary: str) -> None:
    words = ("run", "--rm", "--runtime", binary, "--rootfs", "/", "live-plain", "/bin/sh", "-c", "echo $0 here; exit 5")
    done = containerd.ctr(*words, check=False)
    assert (done.returncode, done.stdout) == (5, "/bin/sh here\n"), done.stderr
    assert containerd.tasks() == {}
