"""_reaper without a Core: spawn, pidfds, ExitSignal."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shimcore import _reaper

HANG = 60.0  # seconds after which a test that should have ended has hung


def wait_for(pidfd: int) -> int:
    import select

    assert select.select([pidfd], [], [], HANG)[0], "the child does not end"
    status = _reaper.wait_pidfd(pidfd)
    os.close(pidfd)
    assert status is not None
    return status


def output_of(*argv: str, **options: Any) -> str:
    """What a spawned child prints, and that it exits with 0."""
    reader, writer = os.pipe()
    fds: Mapping[int, int] = {1: writer, **options.pop("fds", {})}
    try:
        _, pidfd = _reaper.spawn(argv, fds=fds, **options)
    finally:
        os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    assert wait_for(pidfd) == 0
    return text


# ---- the process itself ----


def test_kernel_check() -> None:
    _reaper.kernel_check()


def test_exit_code() -> None:
    assert [_reaper.exit_code(status) for status in (0, 42 << 8, 255 << 8, 9, 15, 11 | 128)] == [0, 42, 255, 137, 143, 139]


# ---- spawn ----


def test_spawn_status_and_signal() -> None:
    assert wait_for(_reaper.spawn(["sh", "-c", "exit 42"])[1]) == 42
    pid, pidfd = _reaper.spawn(["sleep", "1000"])
    assert _reaper.wait_pidfd(pidfd) is None
    _reaper.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert wait_for(pidfd) == 143
    with pytest.raises(ProcessLookupError):
        _reaper.pidfd_open(pid)


def test_spawn_gives_a_pidfd_that_is_not_inherited() -> None:
    _, pidfd = _reaper.spawn(["true"])
    assert not os.get_inheritable(pidfd)
    wait_for(pidfd)


def test_spawn_looks_on_the_path() -> None:
    assert output_of("echo", "hello") == "hello\n"
    with pytest.raises(FileNotFoundError):
        _reaper.spawn(["echo"], env={"PATH": "/nonexistent"})


def test_spawn_fds_swapped() -> None:
    """Whatever stands at a number must write what was mapped there, though the numbers are each other's."""
    (read_a, a), (read_b, b) = os.pipe(), os.pipe()
    _, pidfd = _reaper.spawn(["sh", "-c", f"echo {a} >/dev/fd/{a}; echo {b} >/dev/fd/{b}"], fds={a: b, b: a})
    os.close(a)
    os.close(b)
    assert wait_for(pidfd) == 0
    with open(read_a) as first, open(read_b) as second:
        assert (int(first.read()), int(second.read())) == (b, a)


def test_spawn_nothing_else_is_inherited() -> None:
    kept = os.dup(2)
    os.set_inheritable(kept, True)
    try:
        listed = output_of("ls", "-l", "/proc/self/fd", fds={7: kept})
    finally:
        os.close(kept)
    fds = {int(m[1]): m[2] for m in re.finditer(r" (\d+) -> (.*)", listed)}
    assert fds.pop(3).startswith("/proc/")  # ls's own
    assert sorted(fds) == [0, 1, 2, 7]
    assert fds[0] == fds[2] == "/dev/null"


def test_spawn_cwd_and_environment(tmp_path: Path) -> None:
    assert output_of("pwd", cwd=str(tmp_path)) == f"{tmp_path}\n"
    assert output_of("/usr/bin/env", env={"A": "1", "B": "ü two"}) == "A=1\nB=ü two\n"
    assert output_of("/usr/bin/env", env={}) == ""
    os.environ["SHIMCORE_INHERITED"] = "yes"
    try:
        assert "SHIMCORE_INHERITED=yes" in output_of("/usr/bin/env").splitlines()
    finally:
        del os.environ["SHIMCORE_INHERITED"]


@pytest.mark.parametrize("option", ["new_session", "new_group", ""])
def test_spawn_session_and_group(option: str) -> None:
    options = {option: True} if option else {}
    pid, sid, pgid = map(int, output_of("sh", "-c", "ps -o pid=,sid=,pgid= -p $$", **options).split())
    assert (sid == pid) == (option == "new_session")
    assert (pgid == pid) == (option != "")


def test_spawn_signals_are_reset() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        status = output_of("cat", "/proc/self/status")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR1, ignored)
    assert re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", status) == ["0" * 16] * 2


def test_spawn_errors_name_what_failed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF?")
    garbage.chmod(0o755)
    for argv, number in ([str(tmp_path / "none")], errno.ENOENT), ([str(plain)], errno.EACCES), ([str(garbage)], errno.ENOEXEC):
        with pytest.raises(OSError) as failed:
            _reaper.spawn(argv)
        assert (failed.value.errno, failed.value.filename) == (number, argv[0])
        assert failed.value.strerror == f"exec: {os.strerror(number)}"
    with pytest.raises(NotADirectoryError) as failed:
        _reaper.spawn(["true"], cwd=str(plain))
    assert str(failed.value) == f"[Errno 20] chdir: Not a directory: {str(plain)!r}"
    with pytest.raises(OSError) as failed:
        _reaper.spawn(["true"], fds={5: 9999})
    assert failed.value.errno == errno.EBADF


def test_spawn_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="argv is empty"):
        _reaper.spawn([])
    with pytest.raises(ValueError, match="null byte"):
        _reaper.spawn(["true", "a\0b"])
    with pytest.raises(ValueError, match="negative"):
        _reaper.spawn(["true"], fds={1: -1})


def test_wait_pidfd_of_a_stranger() -> None:
    pidfd = _reaper.pidfd_open(1)
    with pytest.raises(ChildProcessError):
        _reaper.wait_pidfd(pidfd)
    os.close(pidfd)


# ---- ExitSignal ----


def test_exit_signal_is_sticky() -> None:
    signalled = _reaper.ExitSignal()
    assert not signalled.is_set()
    assert signalled.wait(0) is False
    signalled.signal()
    signalled.signal()
    assert signalled.is_set()
    assert signalled.wait() is True
    assert signalled.wait(0) is True


def test_exit_signal_times_out_no_sooner() -> None:
    began = time.monotonic()
    assert _reaper.ExitSignal().wait(0.05) is False
    assert time.monotonic() - began >= 0.05


def test_exit_signal_has_many_waiters() -> None:
    signalled, seen = _reaper.ExitSignal(), []
    entered = threading.Barrier(33)

    def wait() -> None:
        entered.wait()
        seen.append(signalled.wait(HANG))

    threads = [threading.Thread(target=wait) for _ in range(32)]
    for thread in threads:
        thread.start()
    entered.wait()
    signalled.signal()
    for thread in threads:
        thread.join(HANG)
    assert seen == [True] * 32


def forked(body: Any) -> int:
    """A child that has run `body`, and waits to be killed."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            body()
            os.write(told, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"1"
    finally:
        os.close(ready)
    return pid


def pages_of(runs: bytes) -> set[int]:
    found = set()
    for at in range(0, len(runs), 16):
        start, size = (int.from_bytes(runs[at + k : at + k + 8], "little") for k in (0, 8))
        found |= set(range(start, start + size, 4096))
    return found


def test_a_fork_has_the_pages_that_another_has_written() -> None:
    import ctypes
    import mmap

    memory = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes([7]) * len(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ours = set(range(start, start + len(memory), 4096))
    written = {start + number * 4096 for number in (0, 1, 2, 9, 30, 31, 63)}

    def write() -> None:
        for page in written:
            ctypes.memset(page + 5, 8, 1)

    children = [forked(write)]
    try:
        runs = _reaper.written_pages(children[0])
        assert pages_of(runs) & ours == written
        children.append(forked(lambda: _reaper.own_pages(runs)))
        assert pages_of(_reaper.written_pages(children[1])) & ours == written
        assert set(memory[:]) == {7}  # nobody's bytes have changed
        children.append(forked(lambda: None))
        assert not pages_of(_reaper.written_pages(children[2])) & ours
        nowhere = (1 << 46).to_bytes(8, "little") + (4096).to_bytes(8, "little")
        _reaper.own_pages(nowhere + runs[:8])  # what is not mapped is passed over, and what is cut too
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with pytest.raises(OSError):
        _reaper.written_pages(children[0])
