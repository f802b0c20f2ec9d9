"""What a rig has left on the machine, and its removal. Only what can be shown to be the rig's own is counted.

processes   carry the rig's marker in their environment, which all that a shim starts inherits, or sit in one
of the
            rig's cgroups (a container's environment is its own)
mounts      lie below the rig's root
sockets     were an address of one of its shims
cgroups     lie below one that is named after its namespace
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from shimcore._reaper import umount2
from shimcore.address import DEBUG_SUFFIX

MARKER = "SHIMCORE_RIG"
_CGROUPS = Path("/sys/fs/cgroup")
_MNT_DETACH = 2


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def command(pid: int) -> str:
    """The command line of a process, "" when it has gone."""
    return _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1] not in (b"", b"Z", b"X")


def mounts_below(directory: Path) -> list[str]:
    """Mount points below `directory`, the innermost first. (os.path.ismount does not see a bind mount.)"""
    points = [line.split()[4] for line in _read("/proc/self/mountinfo").decode().splitlines()]
    # mountinfo writes a blank and its like in octal (proc_pid_mountinfo(5)).
    points = [os.fsdecode(point.encode().decode("unicode_escape").encode("latin-1")) for point in points]
    return [point for point in reversed(points) if point.startswith(f"{directory}/")]


class Leaks:
    """What a rig with this marker, namespace and root may leave behind. addresses: of its shims, added as
    they start.
    """

    def __init__(self, marker: str, namespace: str, root: Path) -> None:
        self.marker = marker
        self.namespace = namespace
        self.root = root
        self.addresses: set[str] = set()

    def processes(self) -> list[int]:
        """Pids, zombies left out."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and self._ours(int(name))]

    def _ours(self, pid: int) -> bool:
        if pid == os.getpid() or not alive(pid):
            return False
        if f"{MARKER}={self.marker}".encode() in _read(f"/proc/{pid}/environ").split(b"\0"):
            return True
        # Lines are hierarchy:controllers:path.
        paths = [line.split(b":", 2)[-1] for line in _read(f"/proc/{pid}/cgroup").splitlines()]
        return any(path.startswith(f"/{self.namespace}/".encode()) for path in paths)

    def mounts(self) -> list[str]:
        """Mount points below the root, the innermost first."""
        return mounts_below(self.root)

    def sockets(self) -> list[str]:
        """Socket files of shims that were started."""
        paths = [address.removeprefix("unix://") for address in self.addresses if address.startswith("unix://")]
        return sorted(found for path in paths for found in (path, path + DEBUG_SUFFIX) if os.path.exists(found))

    def _parents(self) -> Iterator[Path]:
        yield from (path for path in (_CGROUPS / self.namespace, *_CGROUPS.glob(f"*/{self.namespace}")) if path.is_dir())

    def cgroups(self) -> list[str]:
        """Cgroups below the namespace's own, the deepest first."""
        return [path for parent in self._parents() for path, _, _ in os.walk(parent, topdown=False) if path != str(parent)]

    def all(self) -> list[str]:
        """A line for each thing that is left."""
        return [
            *(f"process {pid}: {command(pid)}" for pid in self.processes()),
            *(f"mount {path}" for path in self.mounts()),
            *(f"socket {path}" for path in self.sockets()),
            *(f"cgroup {path}" for path in self.cgroups()),
        ]

    def settle(self, timeout: float = 2.0) -> list[str]:
        """`all` once nothing is left, or after `timeout` seconds: a shim that was shut down may still be
        ending.
        """
        deadline = time.monotonic() + timeout
        while (left := self.all()) and time.monotonic() < deadline:
            pidfds = self._pidfds(self.processes())
            # Waits for an exit where there is one to wait for, and else for the kernel to take a cgroup away.
            select.select(pidfds, [], [], 0.02 if not pidfds else max(deadline - time.monotonic(), 0))
            for fd in pidfds:
                os.close(fd)
        return left

    @staticmethod
    def _pidfds(pids: Iterable[int]) -> list[int]:
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):
                found.append(os.pidfd_open(pid))
        return found

    def remove(self) -> None:
        """Ends and removes all of it, and the namespace's cgroups, which runtimes leave behind empty."""
        for _ in range(100):
            pids = self.processes()
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(OSError):
                    fd = os.pidfd_open(pid)
                    try:
                        # Looked at again: before the pidfd was open the pid could have become another's.
                        if self._ours(pid):
                            signal.pidfd_send_signal(fd, signal.SIGKILL)
                    finally:
                        os.close(fd)
            time.sleep(0.01)
        for point in self.mounts():
            with contextlib.suppress(OSError):
                umount2(os.fsencode(point), _MNT_DETACH)
        for path in self.sockets():
            with contextlib.suppress(OSError):
                os.unlink(path)
        for path in [*self.cgroups(), *map(str, self._parents())]:
            # EBUSY means that a member is still dying; the next rig's check would show it.
            for _ in range(50):
                try:
                    os.rmdir(path)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
        if not self.mounts():
            shutil.rmtree(self.root, ignore_errors=True)
