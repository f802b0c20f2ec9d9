"""stdio on real FIFOs: who holds which end, and what readers and writers see of it."""

from __future__ import annotations

import gc
import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.errors import InvalidArgument
from shimcore.oci.stdio import Stdio, check, open_stdio


def open_fds() -> set[str]:
    gc.collect()  # the cores of other modules' tests
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def fifos(tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """Paths of three FIFOs; every fd that a test opens through them has to be closed at its end."""
    paths = tuple(str(tmp_path / name) for name in ("in", "out", "err"))
    for path in paths:
        os.mkfifo(path, 0o700)
    before = open_fds()
    yield paths  # type: ignore[misc]
    assert len(open_fds()) == len(before)


def reader(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def at_end(fd: int) -> bool:
    """Whether a reader sees the end of the file: readable, and nothing there."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0)) and os.read(fd, 1) == b""


def test_empty_is_null() -> None:
    before = open_fds()
    io = open_stdio("", "", "")
    fds = io.child_fds()
    assert sorted(fds) == [0, 1, 2]
    assert all(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in fds.values())
    assert not any(os.get_inheritable(fd) for fd in fds.values())
    io.started()
    assert io.process_ended()
    io.close()
    io.close()
    assert open_fds() == before


def test_output_needs_nobody_at_the_other_end(fifos: tuple[str, str, str]) -> None:
    _, out, err = fifos
    io = open_stdio("", "fifo://" + out, err)
    fds = io.child_fds()
    # The process's writes are blocking ones, on a description of which nothing of ours is non-blocking.
    assert os.get_blocking(fds[1]) and os.get_blocking(fds[2])
    child = os.dup(fds[1])
    io.started()
    os.write(child, b"early")
    late = reader(out)
    assert os.read(late, 99) == b"early"
    # A reader that goes away gives no EPIPE.
    os.close(late)
    os.write(child, b"more")
    os.close(child)
    io.close()


def test_a_reader_sees_the_end_when_the_process_has_ended(fifos: tuple[str, str, str]) -> None:
    _, out, err = fifos
    io = open_stdio("", out, err)
    child = os.dup(io.child_fds()[1])
    io.started()
    fd = reader(out)
    os.write(child, b"x")
    os.close(child)
    assert select.select([fd], [], [], 0)[0] == [fd]
    assert os.read(fd, 9) == b"x"
    with pytest.raises(BlockingIOError):  # still a writer: ours
        os.read(fd, 1)
    assert io.process_ended()
    assert at_end(fd)
    os.close(fd)
    io.close()


def test_what_is_unread_waits_for_a_late_reader(fifos: tuple[str, str, str]) -> None:
    _, out, err = fifos
    io = open_stdio("", out, err)
    child = os.dup(io.child_fds()[1])
    io.started()
    os.write(child, b"last words")
    os.close(child)
    assert not io.process_ended()
    assert not io.process_ended()
    fd = os.open(out, os.O_RDONLY)  # blocking: a writer is there
    assert os.read(fd, 99) == b"last words"
    assert io.process_ended()
    assert os.read(fd, 1) == b""
    os.close(fd)
    io.close()


def test_stdin_ends_by_close_io_alone(fifos: tuple[str, str, str]) -> None:
    stdin, _, _ = fifos
    io = open_stdio(stdin, "", "")
    child = os.dup(io.child_fds()[0])
    assert os.get_blocking(child)
    io.started()
    for text in (b"one", b"two"):
        client = os.open(stdin, os.O_WRONLY | os.O_NONBLOCK)
        os.write(client, text)
        os.close(client)
        assert os.read(child, 9) == text
    os.set_blocking(child, False)
    with pytest.raises(BlockingIOError):
        os.read(child, 1)
    io.close_stdin()
    io.close_stdin()
    assert os.read(child, 1) == b""
    os.close(child)
    io.close()


def test_close_io_before_start(fifos: tuple[str, str, str]) -> None:
    stdin, _, _ = fifos
    io = open_stdio(stdin, "", "", hold_stdin=False)
    child = os.dup(io.child_fds()[0])
    io.started()
    assert os.read(child, 1) == b""
    os.close(child)
    io.close()


def test_file(tmp_path: Path) -> None:
    before = open_fds()
    path = tmp_path / "made" / "log"
    old = os.umask(0)
    try:
        io = open_stdio("", f"file://{path}", f"file://{path}")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o7777 == 0o644
    fds = io.child_fds()
    os.write(fds[1], b"a")
    os.write(fds[2], b"b")
    os.write(fds[1], b"c")
    io.started()
    assert io.process_ended()
    io.close()
    assert path.read_bytes() == b"abc"
    io = open_stdio("", f"file://{path}?x=y", "")
    os.write(io.child_fds()[1], b"d")
    io.close()
    assert path.read_bytes() == b"abcd"
    assert open_fds() == before


def test_a_plain_path_to_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old ")
    io = open_stdio("/dev/null", str(path), "/dev/null")
    os.write(io.child_fds()[1], b"new")
    io.close()
    assert path.read_bytes() == b"old new"


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("uri", ["relative", "ftp://x/y", "fifo://", "/a\0b", "missing", "directory", "socket"])
def test_refused(tmp_path: Path, stream: int, uri: str) -> None:
    import socket

    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "directory").mkdir()
    before = open_fds()
    if uri in ("missing", "directory", "socket"):
        uri = str(tmp_path / uri)
    args = ["", "", ""]
    args[stream] = uri
    with pytest.raises(InvalidArgument):
        open_stdio(*args)
    assert open_fds() == before
    server.close()


def test_nothing_stays_open_when_the_last_one_fails(fifos: tuple[str, str, str], tmp_path: Path) -> None:
    stdin, out, _ = fifos
    with pytest.raises(InvalidArgument):
        open_stdio(stdin, out, str(tmp_path / "missing"))


def test_check() -> None:
    check("", "/x", "file:///y")
    check("", "binary:///usr/bin/log?id=1", "binary:///usr/bin/log?id=1")
    check("", "binary:///usr/bin/log?id=1", "")
    for stdin in ("file:///x", "binary:///x"):
        with pytest.raises(InvalidArgument):
            check(stdin, "", "")
    with pytest.raises(InvalidArgument, match="takes stdout as well"):
        check("", "/x", "binary:///x")
    with pytest.raises(InvalidArgument):
        check("", "http://x", "")


@pytest.mark.parametrize("uri", ["grpc+unix:///run/containerd/s/1?streaming_id=1", "ttrpc+vsock://2:1?streaming_id=1", "vsock://2:1"])
def test_a_scheme_that_is_not_known_is_named(uri: str) -> None:
    for names in ((uri, "", ""), ("", uri, ""), ("", "", uri)):
        with pytest.raises(InvalidArgument, match=re.escape(f"unknown scheme of stdio {uri!r}")):
            check(*names)


def test_the_same_fifo_twice(fifos: tuple[str, str, str]) -> None:
    _, out, _ = fifos
    io = open_stdio("", out, out)
    fd = reader(out)
    for number in (1, 2):
        os.write(io.child_fds()[number], b"%d" % number)
    io.started()
    assert os.read(fd, 9) == b"12"
    assert io.process_ended()
    assert at_end(fd)
    os.close(fd)
    io.close()


def test_owner(fifos: tuple[str, str, str]) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")
    _, out, _ = fifos
    io: Stdio = open_stdio("", out, "", owner=(1000, 1001))
    assert (os.stat(out).st_uid, os.stat(out).st_gid) == (1000, 1001)
    io.close()
