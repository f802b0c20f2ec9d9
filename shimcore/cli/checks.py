"""What is wrong with the shims of this node, or with the node for shims, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import _reaper, cgroup
from ..address import SOCKET_DIR
from .nodes import Shim, listeners

TEMPLATES = Path("/run/shimcore")

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass
class Finding:
    """level: OK, WARNING or PROBLEM. advice: what to do, "" where there is nothing to be done."""

    level: str
    what: str
    advice: str = ""


def examine(shims: list[Shim], socket_dir: str = SOCKET_DIR, templates: Path = TEMPLATES) -> Iterator[Finding]:
    """Everything, one after the other."""
    yield from _kernel()
    yield from _runtimes()
    yield from _sockets(Path(socket_dir))
    yield from _leaked(shims)
    yield from _template(templates)


def _kernel() -> Iterator[Finding]:
    try:
        _reaper.kernel_check()
        yield Finding(OK, f"Linux {platform.release()}")
    except OSError as error:
        yield Finding(PROBLEM, str(error.strerror), "shimcore needs Linux 5.4 or later")
    mode = cgroup.mode()
    if mode == cgroup.NONE:
        yield Finding(PROBLEM, "no cgroups are mounted", "mount cgroup2 on /sys/fs/cgroup")
    else:
        yield Finding(OK, f"cgroups: {mode}")
    if os.geteuid():
        yield Finding(WARNING, "not root: what belongs to others can't be seen", "run it as root")


def _runtimes() -> Iterator[Finding]:
    found = [name for name in ("runc", "crun", "youki") if shutil.which(name)]
    if found:
        yield Finding(OK, f"OCI runtimes: {', '.join(found)}")
    else:
        yield Finding(PROBLEM, "no OCI runtime is on PATH", "install runc or crun")


def _sockets(directory: Path) -> Iterator[Finding]:
    try:
        files = [path for path in sorted(directory.iterdir()) if stat.S_ISSOCK(path.lstat().st_mode)]
    except OSError:
        return
    alive = listeners()
    stale = [path for path in files if str(path) not in alive]
    for path in stale:
        yield Finding(WARNING, f"{path} is a socket that nobody listens on", f"rm {path}")
    if files and not stale:
        yield Finding(OK, f"{len(files)} sockets in {directory}, each with a listener")
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o022:
        yield Finding(PROBLEM, f"{directory} can be written to by others (mode {mode:o})", f"chmod 711 {directory}")


def _leaked(shims: list[Shim]) -> Iterator[Finding]:
    for shim in shims:
        if shim.bundle.endswith(" (deleted)"):
            yield Finding(
                PROBLEM,
                f"{shim.name}, pid {shim.pid}, lives on for {shim.namespace}/{shim.id}, whose bundle is gone",
                f"see `shimcore inspect {shim.pid}`; if containerd does not know it any more: kill {shim.pid}",
            )
        lost = shim.told.get("core", {}).get("dropped", 0)
        if lost:
            yield Finding(WARNING, f"{shim.name}, pid {shim.pid}, has dropped {lost} events", "is containerd running?")
        waiting = shim.told.get("core", {}).get("queued", 0)
        if waiting:
            yield Finding(WARNING, f"{shim.name}, pid {shim.pid}, has {waiting} events for containerd", "is containerd running?")
    if shims:
        yield Finding(OK, f"{len(shims)} shims")


def _template(directory: Path) -> Iterator[Finding]:
    try:
        found = directory.lstat()
    except OSError:
        return
    if os.geteuid():
        return  # root's is not ours to judge
    if found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        yield Finding(PROBLEM, f"{directory} is not a directory of root's alone: no template is used", f"chmod 700 {directory}")
        return
    for path in sorted(directory.glob("*.no")):
        reason = path.read_text(errors="replace").strip()
        yield Finding(WARNING, f"a template has refused itself: {reason}", f"mend the shim's module, then rm {path}")
    alive = [path for path in listeners() if path.endswith(".sock") and (directory / os.path.basename(path)).exists()]
    if alive:
        yield Finding(OK, f"{len(alive)} warm templates")
