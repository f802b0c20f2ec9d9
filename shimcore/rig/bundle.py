"""A bundle as containerd makes it: config.json, rootfs/, the log FIFO, the link to a work directory."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shimcore.rig.leaks import mounts_below

BUSYBOX = "/bin/busybox"

#: Environment of a container unless told otherwise.
ENV = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)

# The default capabilities, masked and read-only paths and mounts of containerd's own client.
_CAPS = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
SYS_CHROOT KILL AUDIT_WRITE""".split()
_MASKED = """/proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list
/proc/timer_stats /proc/sched_debug /sys/firmware /proc/scsi""".split()
_READONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
_SAFE = ["nosuid", "noexec", "nodev"]
_MOUNTS = (
    ("/proc", "proc", "proc", _SAFE),
    ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    ("/dev/shm", "tmpfs", "shm", [*_SAFE, "mode=1777", "size=65536k"]),
    ("/dev/mqueue", "mqueue", "mqueue", _SAFE),
    ("/sys", "sysfs", "sysfs", [*_SAFE, "ro"]),
    ("/run", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
)
NAMESPACES = ("pid", "ipc", "uts", "mount", "network")

_LOG_KEPT = 1 << 20


def process(args: Sequence[str], *, env: Sequence[str] = ENV, cwd: str = "/", terminal: bool = False) -> dict[str, Any]:
    """A Process of the runtime spec, as config.json and the Exec RPC want it. env: NAME=value each."""
    caps = [f"CAP_{name}" for name in _CAPS]
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": list(env),
        "cwd": cwd,
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    }


def spec(
    args: Sequence[str],
    *,
    root: str = "rootfs",
    cgroups_path: str = "",
    env: Sequence[str] = ENV,
    cwd: str = "/",
    terminal: bool = False,
    namespaces: Sequence[str] = NAMESPACES,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A runtime spec like that of containerd's client for `args`.

    root: the root filesystem, absolute or relative to the bundle. cgroups_path: path in each hierarchy; the
    runtime's choice when empty. namespaces: kinds of which the container gets its own.
    """
    linux: dict[str, Any] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": _MASKED,
        "readonlyPaths": _READONLY,
    }
    if cgroups_path:
        linux["cgroupsPath"] = cgroups_path
    return {
        "ociVersion": "1.0.2",
        "process": process(args, env=env, cwd=cwd, terminal=terminal),
        "root": {"path": root},
        "mounts": [
            {"destination": to, "type": kind, "source": source, "options": options} for to, kind, source, options in _MOUNTS
        ],
        "annotations": dict(annotations or {}),
        "linux": linux,
    }


def busybox_rootfs(path: Path, busybox: str = BUSYBOX) -> Path:
    """Makes a root filesystem of a static busybox and a link for each of its applets; returns `path`.

    Raises OSError, FileNotFoundError among them when there is no busybox.
    """
    if not os.path.exists(busybox):
        raise FileNotFoundError(f"a root filesystem is made of {busybox}, which is not there: install busybox-static")
    for name in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(busybox, path / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for name in applets:
        if name != "busybox":
            (path / "bin" / name).symlink_to("busybox")
    return path


class Bundle:
    """A bundle directory. `path`: its absolute path; `log`: what was written to its log FIFO so far.

    containerd holds the FIFO open for reading and writing, so that a shim's open never blocks and no end of
    file comes between two shims; a thread of ours empties it, keeping the last MiB.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], *, work: Path | None = None) -> None:
        """Makes the directory, which must not exist. work: where the `work` link points; made if need be."""
        self.path = path
        path.mkdir(parents=True, mode=0o711)
        (path / "rootfs").mkdir(mode=0o711)
        self.work = work or path.parent / f"{path.name}.work"
        self.work.mkdir(parents=True, mode=0o711, exist_ok=True)
        (path / "work").symlink_to(self.work)
        self.write_spec(spec)
        os.mkfifo(path / "log", 0o700)
        self._fd = os.open(path / "log", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._kept = bytearray()
        self._closed = False
        self._thread = threading.Thread(target=self._drain, name=f"log of {path.name}", daemon=True)
        self._thread.start()

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Writes config.json anew."""
        (self.path / "config.json").write_text(json.dumps(spec, indent=1))

    def close(self) -> None:
        """Lets go of the log FIFO; the directory stays. Idempotent."""
        if not self._closed:
            self._closed = True
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._fd)
            os.close(self._stop)

    def remove(self) -> None:
        """Removes bundle and work directory, as containerd does after `delete`.

        Raises OSError when something is still mounted below it: removing through a mount would empty what is
        mounted, which may be somebody's root filesystem.
        """
        self.close()
        if mounted := mounts_below(self.path):
            raise OSError(f"still mounted: {', '.join(mounted)}")
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def log(self) -> str:
        """What the shim wrote to its log so far; the last MiB of it."""
        return bytes(self._kept).decode(errors="replace")

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._fd in ready:
                try:
                    self._kept += os.read(self._fd, 65536)
                except BlockingIOError:
                    pass
                del self._kept[:-_LOG_KEPT]
            elif self._stop in ready:
                return
