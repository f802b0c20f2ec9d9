"""What a test session has left on the machine, counting only what can be shown to be its own.

Other programs, and other sessions of this suite, use the same machine: "new since the start" is not enough.

processes   carry the session's marker in their environment (everything we exec inherits it), or sit in one
            of its cgroups (a container's environment is its image's), or are new children of ours
mounts      lie below one of the session's directories
sockets     are new in the shims' socket directory, and listened on by a process of ours or by nobody
cgroups     lie below one that is named after the session's namespace prefix
runc state  likewise
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARKER = "SHIMCORE_TEST"
SOCKETS = Path("/run/containerd/s")
RUNC = Path("/run/containerd/runc")
CGROUPS = Path("/sys/fs/cgroup")


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def cmdline(pid: int) -> list[str]:
    """The process's arguments; empty when it is gone or a zombie."""
    return [part.decode(errors="replace") for part in _read(f"/proc/{pid}/cmdline").split(b"\0")[:-1]]


def state(pid: int) -> str:
    """The letter of proc(5)'s state field ("Z" is a zombie), or "" when the process is gone."""
    # The name may hold spaces and brackets: only what follows the last ")" is safe to split.
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1].decode()


def parent(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def listeners() -> dict[str, str]:
    """Path → inode of every listening unix socket that has a path."""
    found = {}
    for line in _read("/proc/net/unix").decode(errors="replace").splitlines()[1:]:
        fields = line.split(None, 7)
        # Flags 00010000 is SO_ACCEPTCON.
        if len(fields) == 8 and fields[3] == "00010000":
            found[fields[7]] = fields[6]
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    try:
        for fd in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(fd.path)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found


class Left(Exception):
    """Something was left behind. `left`: a line each."""

    def __init__(self, left: list[str]) -> None:
        super().__init__("left behind:\n  " + "\n  ".join(left))
        self.left = left


class Guard:
    """Remembers the machine as it was, and says what has been added to it.

    marker: value of the environment variable SHIMCORE_TEST that the session's processes inherit.
    prefix: how the names of the session's containerd namespaces begin.
    roots: directories that the session owns.
    """

    def __init__(self, marker: str, prefix: str, roots: list[Path], sockets: Path = SOCKETS) -> None:
        self.marker = marker
        self.prefix = prefix
        self.roots = roots
        self.sockets = sockets
        self._sockets_before = self._socket_names()
        # Another guard's affair, which may have begun before this one.
        self._children_before = {pid for pid in _pids() if parent(pid) == os.getpid()}

    def _socket_names(self) -> set[str]:
        try:
            return set(os.listdir(self.sockets))
        except OSError:
            return set()

    def marked(self) -> list[int]:
        """Pids of the processes that we made, directly or not; zombies and ourselves are left out."""
        wanted = f"{MARKER}={self.marker}".encode()
        me = os.getpid()
        held = {pid for group in self.cgroups() for pid in self._members(group)}

        def ours(pid: int) -> bool:
            if pid in held or wanted in _read(f"/proc/{pid}/environ").split(b"\0"):
                return True
            return parent(pid) == me and pid not in self._children_before

        return [pid for pid in _pids() if pid != me and ours(pid) and state(pid) not in ("", "Z", "X")]

    def cgroups(self) -> list[Path]:
        """Cgroups below those that are named after our namespaces, deepest first."""
        found = []
        for top in [*CGROUPS.glob(f"{self.prefix}*"), *CGROUPS.glob(f"*/{self.prefix}*")]:
            for path, _, _ in os.walk(top, topdown=False):
                if Path(path) != top:
                    found.append(Path(path))
        return found

    @staticmethod
    def _members(group: Path) -> list[int]:
        return [int(pid) for pid in _read(group / "cgroup.procs").split()]

    def mounts(self) -> list[str]:
        """Mount points below our directories, last mounted first."""
        found = []
        for line in _read("/proc/self/mountinfo").decode(errors="replace").splitlines():
            point = line.split(" ")[4].replace("\\040", " ")
            if any(point == str(root) or point.startswith(f"{root}/") for root in self.roots):
                found.append(point)
        return found[::-1]

    def stale(self) -> list[Path]:
        """Socket files that appeared since the start and belong to us or to nobody."""
        new = self._socket_names() - self._sockets_before
        if not new:
            return []
        open_sockets = listeners()
        ours = {inode for pid in self.marked() for inode in _socket_inodes(pid)}
        found = []
        for name in sorted(new):
            inode = open_sockets.get(str(self.sockets / name))
            if inode is None or inode in ours:
                found.append(self.sockets / name)
        return found

    def runc_state(self) -> list[Path]:
        return sorted(RUNC.glob(f"{self.prefix}*/*"))

    def find(self) -> list[str]:
        """One line for each thing that is there now and should not be."""
        found = [f"process {pid}: {' '.join(cmdline(pid))[:160]}" for pid in self.marked()]
        found += [f"mount {point}" for point in self.mounts()]
        found += [f"socket {path}" for path in self.stale()]
        found += [f"cgroup {path}" for path in self.cgroups()]
        found += [f"runc state {path}" for path in self.runc_state()]
        return found

    def settle(self, timeout: float = 10.0) -> list[str]:
        """As find, when nothing is left or after `timeout` seconds: nobody announces the end of a shim."""
        deadline = time.monotonic() + timeout
        while (found := self.find()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def clean(self, timeout: float = 10.0) -> None:
        """Removes what settle has reported, so that a failing session does not harm the next one.

        Over and over for up to `timeout` seconds: what is killed lets go of the rest only as it ends.
        """
        deadline = time.monotonic() + timeout
        while self.find() and time.monotonic() < deadline:
            for pid in self.marked():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            for path in self.stale():
                path.unlink(missing_ok=True)
            for point in self.mounts():
                os.spawnvp(os.P_WAIT, "umount", ["umount", "-l", point])
            for path in self.runc_state():
                shutil.rmtree(path, ignore_errors=True)
            for group in self.cgroups():
                _rmdir(group)
            time.sleep(0.02)
        self.drop_parents()

    def drop_parents(self) -> None:
        """Removes the empty directories per namespace, which containerd and runc leave by design."""
        for top in [*CGROUPS.glob(f"{self.prefix}*"), *CGROUPS.glob(f"*/{self.prefix}*")]:
            _rmdir(top)
        for top in RUNC.glob(f"{self.prefix}*"):
            _rmdir(top)


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass


@contextlib.contextmanager
def watched(*roots: Path) -> Iterator[Guard]:
    """A guard around a block of code, which marks all that is started in it and gives it a temporary directory.

    That directory is the first of the guard's roots, with a path short enough for sockets; `roots` are watched besides. Raises
    Left at the end when something stays, after removing it.
    """
    marker = uuid.uuid4().hex
    root = Path(tempfile.mkdtemp(prefix="sct-", dir="/tmp"))
    before = {name: os.environ.get(name) for name in (MARKER, "TMPDIR")}
    # Whoever makes a temporary directory, the rig included, makes it where mounts are looked for at the end.
    os.environ[MARKER] = marker
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    guard = Guard(marker, f"sct-{marker[:8]}", [root, *roots])
    try:
        yield guard
    finally:
        left = guard.settle()
        if left:
            guard.clean()
        guard.drop_parents()
        tempfile.tempdir = None
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(root, ignore_errors=True)
    if left:
        raise Left(left)
