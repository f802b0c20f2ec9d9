"""address.py: the hash, the listener, what becomes of addresses in use, the address file."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import address as a
from shimcore.errors import AlreadyExists, InvalidArgument, NotFound

GOLDEN = "1f79572f2b25210e8f576d6dd527e6a137bdaccc44803dc8039a724d84ec40c3"
CONTAINERD = "/var/run/containerd/containerd.sock"


@pytest.fixture
def folder(session_root: Path) -> Iterator[Path]:
    path = session_root / uuid.uuid4().hex[:8]
    path.mkdir()
    yield path


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Listeners of a test, closed at its end."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def dead_socket(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


# --- names


def test_golden_address() -> None:
    assert a.socket_address(CONTAINERD, "default", "1234") == f"unix:///run/containerd/s/{GOLDEN}"
    assert a.pipe_address(CONTAINERD, "default", "1234") == rf"\\.\pipe\containerd-shim-{GOLDEN}-pipe"


def test_socket_dir_and_joining() -> None:
    assert a.socket_address(CONTAINERD, "default", "1234", socket_dir="/x/s/") == f"unix:///x/s/{GOLDEN}"
    # Go's filepath.Join cleans
    assert GOLDEN in a.socket_address("//var/run//containerd/./containerd.sock", "default", "1234")
    others = [a.socket_address(CONTAINERD, "default", "1235"), a.socket_address(CONTAINERD, "k8s.io", "1234")]
    assert not any(GOLDEN in other for other in others)
    # C13: whatever the lengths, the path fits
    long = a.socket_address("/" + "s" * 200, "n" * 200, "i" * 200)
    assert len(long) - len("unix://") <= a.MAX_PATH


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("unix:///run/x", ("unix", "/run/x")),
        ("vsock://2:1024", ("vsock", "2:1024")),
        ("hvsock:///run/fc.sock:1024", ("hvsock", "/run/fc.sock:1024")),
        ("/containerd-shim/x.sock", ("abstract", "/containerd-shim/x.sock")),
        ("\0name", ("abstract", "name")),
    ],
)
def test_parse_sockaddr(text: str, parsed: tuple[str, str]) -> None:
    assert a.parse_sockaddr(text) == parsed


@pytest.mark.parametrize("text", ["", "unix://", "tcp://1.2.3.4:5", "unix:///a\0b", "\0"])
def test_parse_sockaddr_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument):
        a.parse_sockaddr(text)


# --- the listener


def test_listener_makes_its_directories_private(folder: Path, fds: list[int]) -> None:
    path = folder / "ns1" / "id1" / "socket"
    for umask in (0, 0o777):
        old = os.umask(umask)
        try:
            fds.append(a.start_listener(f"unix://{path}"))
        finally:
            os.umask(old)
        assert [mode(p) for p in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]
        path.unlink()
        path.parent.rmdir()
        path.parent.parent.rmdir()


def test_there_is_no_moment_in_which_others_may_connect(
    folder: Path, fds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is private from bind on, not by a chmod after it."""
    chmods: list[object] = []
    monkeypatch.setattr(os, "chmod", lambda path, mode: chmods.append(path))
    old = os.umask(0)
    try:
        fds.append(a.start_listener(f"unix://{folder}/socket"))
    finally:
        os.umask(old)
    assert chmods == [] and mode(folder / "socket") == 0o600


def test_listener_listens_and_is_not_inherited(folder: Path, fds: list[int]) -> None:
    path = folder / "socket"
    fds.append(a.start_listener(f"unix://{path}"))
    assert not os.get_inheritable(fds[0])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with socket.socket(fileno=os.dup(fds[0])) as server:
            peer, _ = server.accept()
            peer.sendall(b"x")
            peer.close()
        assert client.recv(2) == b"x"


def test_an_existing_directory_keeps_its_mode(folder: Path, fds: list[int]) -> None:
    folder.chmod(0o755)
    fds.append(a.start_listener(f"unix://{folder}/socket"))
    assert mode(folder) == 0o755


def test_a_second_bind_fails(folder: Path, fds: list[int]) -> None:
    address = f"unix://{folder}/socket"
    fds.append(a.start_listener(address))
    with pytest.raises(OSError) as caught:
        a.start_listener(address)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_path_under_a_socket_fails(folder: Path, fds: list[int]) -> None:
    fds.append(a.start_listener(f"unix://{folder}/socket"))
    with pytest.raises(OSError):
        a.start_listener(f"unix://{folder}/socket/socket")


@pytest.mark.parametrize("function", [a.start_listener, a.bind_or_reuse])
def test_a_regular_file_survives(folder: Path, function: object) -> None:
    file = folder / "demo.txt"
    file.write_text("test")
    with pytest.raises(AlreadyExists, match="not a socket"):
        function(f"unix://{file}")  # type: ignore[operator]
    assert file.read_text() == "test"


def test_too_long_a_path(folder: Path, fds: list[int]) -> None:
    room = a.MAX_PATH - len(str(folder)) - 1
    fds.append(a.start_listener(f"unix://{folder}/{'x' * room}"))
    with pytest.raises(InvalidArgument, match="107 bytes"):
        a.start_listener(f"unix://{folder}/{'x' * (room + 1)}")
    # bytes count, not characters
    with pytest.raises(InvalidArgument):
        a.start_listener(f"unix://{folder}/{'é' * (room // 2 + 1)}")
    assert len(os.listdir(folder)) == 1


def test_abstract_addresses(fds: list[int]) -> None:
    name = f"shimcore-{uuid.uuid4().hex}"
    fds.append(a.start_listener(name))
    assert a.wait_socket_working(name) is True
    assert a.bind_or_reuse(name) == (None, True)
    assert a.remove_socket(name) is False
    os.close(fds.pop())
    assert a.wait_socket_working(name) is False


def test_vsock_is_refused_clearly() -> None:
    with pytest.raises(InvalidArgument, match="not a unix socket"):
        a.start_listener("vsock://2:1024")


def test_no_fd_is_left_by_failures(folder: Path, fds: list[int]) -> None:
    address = f"unix://{folder}/socket"
    fds.append(a.start_listener(address))
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(OSError):
            a.start_listener(address)
        a.wait_socket_working(address)
        a.bind_or_reuse(address)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- alive or dead


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


def test_dead_and_missing_sockets_are_told_at_once(folder: Path, sleeps: list[float]) -> None:
    dead_socket(folder / "dead")
    assert a.wait_socket_working(f"unix://{folder}/dead") is False
    assert a.wait_socket_working(f"unix://{folder}/missing") is False
    assert sleeps == []


def test_a_full_backlog_is_alive(folder: Path) -> None:
    path = folder / "socket"
    clients = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        try:
            while True:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                clients.append(client)
                try:
                    client.connect(str(path))
                except BlockingIOError:
                    break
            assert a.wait_socket_working(f"unix://{path}") is True
            assert a.bind_or_reuse(f"unix://{path}") == (None, True)
        finally:
            for client in clients:
                client.close()


def test_what_cannot_be_told_is_no_death(folder: Path, fds: list[int], sleeps: list[float]) -> None:
    """Without a free fd the probe of a live shim must not answer that it is dead."""
    address = f"unix://{folder}/socket"
    fds.append(a.start_listener(address))
    assert a.wait_socket_working(address)  # whatever is imported lazily is imported now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError) as caught:
            a.wait_socket_working(address, interval_ms=7, count=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert sleeps == [0.007, 0.007]


def test_bind_or_reuse(folder: Path, fds: list[int]) -> None:
    path = folder / "socket"
    address = f"unix://{path}"
    fd, reused = a.bind_or_reuse(address)
    assert fd is not None and not reused
    assert a.bind_or_reuse(address) == (None, True)
    os.close(fd)  # C9: now it is stale
    fd, reused = a.bind_or_reuse(address)
    assert fd is not None and not reused
    fds.append(fd)
    assert a.wait_socket_working(address) and mode(path) == 0o600


RACER = """
import os, sys
from shimcore import address
sys.stdin.buffer.read(1)
fd, reused = address.bind_or_reuse(sys.argv[1])
print("reused" if reused else "bound", flush=True)
sys.stdin.buffer.read()
"""


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_starts_at_once_one_binds(folder: Path, stale: bool) -> None:
    """A socket between bind and listen refuses connections as a dead one does; nobody may take it for one."""
    for _ in range(5):
        path = folder / uuid.uuid4().hex[:8]
        if stale:
            dead_socket(path)
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, f"unix://{path}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(6)
        ]
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(b"g")
            racer.stdin.flush()
        answers = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
        for racer in racers:
            racer.communicate()
        assert sorted(answers) == [b"bound\n"] + [b"reused\n"] * 5


def test_bind_waits_for_another_binder(folder: Path, fds: list[int]) -> None:
    """The lock that the race above hangs on is really taken."""
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=lambda: fds.append(a.start_listener(f"unix://{folder}/socket")))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not (folder / "socket").exists()
    os.close(lock)
    thread.join(10)
    assert (folder / "socket").exists()


# --- removing


def test_remove_socket_removes_sockets_only(folder: Path) -> None:
    dead_socket(folder / "socket")
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(folder / "socket")
    for name in ("file", "link", "missing", "file/below"):
        assert a.remove_socket(f"unix://{folder}/{name}") is False
    assert a.remove_socket(f"unix://{folder}/socket") is True
    assert sorted(os.listdir(folder)) == ["file", "link"]


def test_remove_socket_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    from shimcore import logger

    lines: list[object] = []
    monkeypatch.setattr(logger, "warn", lambda msg, **fields: lines.append(fields["address"]))
    a.remove_socket_silently("nonsense://x")
    assert lines == ["nonsense://x"]


# --- the file


def test_address_file_is_byte_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a.write_address("unix:///run/containerd/s/abc", str(tmp_path))
    assert (tmp_path / "address").read_bytes() == b"unix:///run/containerd/s/abc"
    assert a.read_address(str(tmp_path)) == "unix:///run/containerd/s/abc"
    monkeypatch.chdir(tmp_path)
    a.write_address("unix:///b")
    assert a.read_address() == "unix:///b" and os.listdir(tmp_path) == ["address"]


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_a_stale_temporary_does_no_harm(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if kind == "file":
        (tmp_path / ".address").write_text("a longer rest of a writer that died")
    else:
        (tmp_path / ".address").symlink_to(victim)
    for text in ("unix:///x", "unix:///yy"):
        a.write_address(text, str(tmp_path))
        assert (tmp_path / "address").read_text() == text
    assert victim.read_text() == "precious" and not (tmp_path / ".address").exists()


def test_no_address(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        a.read_address(str(tmp_path))
    (tmp_path / "address").touch()
    with pytest.raises(NotFound, match="empty"):
        a.read_address(str(tmp_path))
