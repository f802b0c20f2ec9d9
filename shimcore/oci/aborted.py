"""What a runtime leaves when it is killed in the middle of `create`, and its own `delete` does not find.

A runtime writes its state when init waits for `start`. Before, it has made a directory for that state, cgroups, and an init that
ends when its parent does, unless it runs a hook; `runc delete --force` then removes the directory alone.
"""

from __future__ import annotations

import os
import time

from .. import cgroup, logger, mount
from ..errors import ShimError
from ..util import read_spec

SIGKILL = 9
# The files that make a state: runc's and youki's, crun's.
STATE_FILES = ("state.json", "status")
# Rounds of SIGKILL, each followed by a wait of at most so many seconds for the deaths: new processes come while we list.
ROUNDS = 10
DEATH_TIMEOUT = 0.2
# Seconds before a cgroup is tried again that is busy though nobody is listed in it: the first time; then twice as long each time.
BUSY_FIRST = 0.001


def clear_mounts(state_dir: str) -> None:
    """Unmount what runc has mounted in the directory of its state: for a moment its own binary, read-only. Killed then, it leaves
    it, and could not remove the directory."""
    try:
        mount.umount_recursive(state_dir)
    except (OSError, ShimError) as error:
        logger.warn("what a runtime has mounted can't be unmounted", directory=state_dir, error=error)


def clear_half_made(state_dir: str, bundle: str) -> None:
    """If a runtime has begun a container there and not come to the end of `create`: kill what is in the cgroups that config.json
    names, and remove them. Before the runtime's `delete`, which removes what this is known by.

    Only where linux.cgroupsPath is absolute; a systemd scope (slice:prefix:name) goes when it is empty. Logged, never raised:
    other work remains to be done."""
    if not os.path.isdir(state_dir) or any(os.path.exists(os.path.join(state_dir, name)) for name in STATE_FILES):
        return
    try:
        linux = read_spec(bundle).get("linux")
        path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
        parts = path.split("/") if isinstance(path, str) else []
        if len(parts) < 2 or parts[0] or not any(parts) or ".." in parts:
            return
        found = cgroup.hierarchies()
        own = set(cgroup.paths("self", found).values())
        for top in {hierarchy.mountpoint for hierarchy in found}:
            directory = os.path.normpath(f"{top}/{path}")
            if directory in own or not os.path.isdir(directory):
                continue
            try:
                _clear(directory)
            except OSError as error:
                logger.warn("a cgroup of a container that was not created can't be removed", cgroup=directory, error=error)
    except (OSError, ShimError) as error:
        logger.warn("cgroups of a container that was not created are not known", bundle=bundle, error=error)


def _clear(directory: str) -> None:
    for number in range(ROUNDS):
        try:
            pids = cgroup.cgroup_procs(directory)
        except ShimError:  # it has gone
            return
        cgroup.signal_listed(pids, lambda: cgroup.cgroup_procs(directory), SIGKILL, DEATH_TIMEOUT)
        for path, _, _ in os.walk(directory, topdown=False):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass
            except OSError as error:  # busy: somebody is dying in it still, or new there
                last = error
                break
        else:
            return
        if not pids:  # the kernel lets go of the dead a little later, and v1 tells nobody when
            time.sleep(BUSY_FIRST * 2**number)
    raise last
