"""The client's side of a process's standard streams: FIFOs, as containerd's client makes them."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

_KEPT = 64 << 20


class Reader:
    """Reads one FIFO on a thread of its own, from the moment it is made to its end of file.

    chunks: (monotonic ns of arrival, bytes) in order; at most 64 MiB are kept, and the rest is counted in
    `dropped`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks: list[tuple[int, bytes]] = []
        self.dropped = 0
        #: Called with each chunk that is kept, on the reader's thread.
        self.came: Callable[[int, bytes], None] = lambda at, data: None
        self._size = 0
        self._ended = threading.Event()
        # Non-blocking, for otherwise the open waits for a writer. poll(2) on a FIFO that never had a writer
        # says nothing, so no end of file is seen before the shim has come.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"read {path.name}", daemon=True)
        self._thread.start()

    @property
    def data(self) -> bytes:
        """All that has been read so far."""
        return b"".join(chunk for _, chunk in list(self.chunks))

    def wait(self, timeout: float) -> bool:
        """Whether the end of file came within `timeout` seconds."""
        return self._ended.wait(timeout)

    def close(self) -> None:
        """Stops reading. Idempotent."""
        if self._fd >= 0:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._fd)
            os.close(self._stop)
            self._fd = -1

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                return
            try:
                data = os.read(self._fd, 1 << 20)
            except BlockingIOError:
                continue
            if not data:
                self._ended.set()
                return
            if self._size + len(data) > _KEPT:
                self.dropped += len(data)
            else:
                self._size += len(data)
                self.chunks.append((time.monotonic_ns(), data))
                self.came(*self.chunks[-1])


class Stdio:
    """FIFOs for one process in `directory`, with readers on stdout and stderr.

    The paths that go into Create and Exec are `stdin`, `stdout` and `stderr`, "" for a stream that is not
    wanted. A terminal has no stderr of its own.
    """

    def __init__(self, directory: Path, name: str, *, stdin: bool = False, terminal: bool = False, read: bool = True) -> None:
        """read: False leaves stdout and stderr without a reader until `open_readers` is called."""
        directory.mkdir(parents=True, exist_ok=True)
        self.terminal = terminal
        self.stdin = self._make(directory / f"{name}-stdin") if stdin else ""
        self.stdout = self._make(directory / f"{name}-stdout")
        self.stderr = "" if terminal else self._make(directory / f"{name}-stderr")
        self.out: Reader | None = None
        self.err: Reader | None = None
        # Read-write, for a write-only open would wait for the shim; its reader sees the end by CloseIO.
        self._stdin = os.open(self.stdin, os.O_RDWR | os.O_CLOEXEC) if stdin else -1
        if read:
            self.open_readers()

    @staticmethod
    def _make(path: Path) -> str:
        os.mkfifo(path, 0o700)
        return str(path)

    def open_readers(self) -> None:
        """Opens what is not yet open for reading."""
        self.out = self.out or Reader(Path(self.stdout))
        if self.stderr:
            self.err = self.err or Reader(Path(self.stderr))

    def write(self, data: bytes) -> None:
        """Writes to the process's stdin; blocks while the pipe is full. Raises OSError (EBADF) without
        one.
        """
        while data:
            data = data[os.write(self._stdin, data) :]

    def close_stdin(self) -> None:
        """Closes our end. The process sees the end of file only once the shim is told so by CloseIO."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def drain(self, timeout: float = 5.0) -> bool:
        """Whether every stream that is read came to its end within `timeout` seconds in all."""
        deadline = time.monotonic() + timeout
        readers = [reader for reader in (self.out, self.err) if reader]
        return all(reader.wait(max(deadline - time.monotonic(), 0)) for reader in readers)

    def output(self) -> bytes:
        """stdout so far."""
        return self.out.data if self.out else b""

    def errors(self) -> bytes:
        """stderr so far."""
        return self.err.data if self.err else b""

    def close(self) -> None:
        """Closes our ends and removes the FIFOs. Idempotent."""
        self.close_stdin()
        for reader in (self.out, self.err):
            if reader:
                reader.close()
        for path in (self.stdin, self.stdout, self.stderr):
            if path:
                Path(path).unlink(missing_ok=True)
