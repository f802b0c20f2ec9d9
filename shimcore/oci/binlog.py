"""binary:// loggers: a program of the client's that reads what a process writes.

It finds stdout as fd 3, stderr as 4, and says that it is ready by closing 5 (or writing to it). Its environment is CONTAINER_ID
and CONTAINER_NAMESPACE alone; each `k=v` of the URI's query is two arguments. One logger takes both streams, as in containerd,
where the URI of stdout counts. It sees the end of both when the process, and whoever has inherited from it, has ended; Delete
waits for it.

Imported when somebody asks for one.
"""

from __future__ import annotations

import os
from select import POLLIN, poll

from .. import _reaper, logger
from ..errors import DeadlineExceeded, InvalidArgument, Unknown

READY_TIMEOUT = 10.0  # seconds
_KILLED_TIMEOUT = 1.0
_SIGKILL = 9


def _unquote(text: str) -> str:
    parts = text.replace("+", " ").split("%")
    out = os.fsencode(parts[0])
    for part in parts[1:]:
        try:
            out += bytes.fromhex(part[:2]) + os.fsencode(part[2:])
        except ValueError:
            raise InvalidArgument(f"not a query: {text!r}") from None
    return os.fsdecode(out)


def query(text: str) -> list[tuple[str, str]]:
    """The names and values of a URI's query; of a name that is there twice the first counts. Raises InvalidArgument."""
    found: dict[str, str] = {}
    for pair in text.partition("#")[0].split("&"):
        name, _, value = pair.partition("=")
        if pair:
            found.setdefault(_unquote(name), _unquote(value))
    return list(found.items())


def parse(uri: str) -> list[str]:
    """The argument vector of binary://PATH?k=v&… . Raises InvalidArgument."""
    path, _, text = uri.partition("://")[2].partition("?")
    path = _unquote(path.replace("+", "%2B"))
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"a logging binary is named by an absolute path: {uri!r}")
    argv = [path]
    for pair in query(text):
        argv += pair
    if any("\0" in word for word in argv):
        raise InvalidArgument(f"not a query: {uri!r}")
    return argv


def _readable(fd: int, seconds: float) -> bool:
    poller = poll()
    poller.register(fd, POLLIN)
    return bool(poller.poll(seconds * 1000))


class Logger:
    """One that runs. stdout, stderr: the write ends for the process, the caller's to close."""

    __slots__ = ("_fd", "_path", "_status", "stderr", "stdout")

    def __init__(self, uri: str, id: str, namespace: str) -> None:
        """Start it and wait until it is ready. For the pool. Raises InvalidArgument, Unknown, DeadlineExceeded."""
        argv = parse(uri)
        self._path = argv[0]
        self._status: int | None = None
        self._fd = self.stdout = self.stderr = -1
        fds: list[int] = []
        try:
            for _ in range(3):
                fds += os.pipe2(os.O_CLOEXEC)
            out_read, self.stdout, err_read, self.stderr, ready, told = fds
            env = {"CONTAINER_ID": id, "CONTAINER_NAMESPACE": namespace}
            try:
                _, self._fd = _reaper.spawn(argv, env=env, fds={3: out_read, 4: err_read, 5: told})
            except OSError as error:
                raise Unknown(f"logging binary {self._path} can't be started: {error.strerror}") from None
            for fd in (out_read, err_read, told):
                fds.remove(fd)
                os.close(fd)
            if not _readable(ready, READY_TIMEOUT):
                raise DeadlineExceeded(f"logging binary {self._path} was not ready within {READY_TIMEOUT:g} s")
            self.check()
            fds = [ready]
        except BaseException:
            self.close()
            self.stdout = self.stderr = -1
            raise
        finally:
            for fd in fds:
                os.close(fd)

    @classmethod
    def adopt(cls, path: str, fd: int) -> Logger:
        """One that runs already, by its pidfd; -1: it has ended."""
        logger = cls.__new__(cls)
        logger._path, logger._fd, logger._status = path, fd, None
        logger.stdout = logger.stderr = -1
        return logger

    def check(self) -> None:
        """Raises Unknown when it has ended already."""
        if self.ended():
            raise Unknown(f"logging binary {self._path} has ended, with status {self._status}")

    def ended(self) -> bool:
        """Whether it has; reaps it."""
        if self._fd < 0:
            return True
        self._status = _reaper.wait_pidfd(self._fd)
        if self._status is None:
            return False
        os.close(self._fd)
        self._fd = -1
        if self._status:
            logger.warn("a logging binary failed", binary=self._path, status=self._status)
        return True

    def close(self) -> None:
        """No more is to be logged: one that has not ended by itself is killed. Idempotent."""
        if self.ended():
            return
        logger.warn("a logging binary is killed: it has not ended with its container", binary=self._path)
        _reaper.pidfd_send_signal(self._fd, _SIGKILL)
        _readable(self._fd, _KILLED_TIMEOUT)
        self.ended()
