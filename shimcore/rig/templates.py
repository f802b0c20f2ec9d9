"""The warm templates (shimcore.template) that listen in a directory of a rig's own: found, and ended with the rig."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def templates(directory: str) -> list[int]:
    """The pids of those that listen there: it stands on their command line."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and directory.encode() in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                found.append(int(name))
        except OSError:
            pass
    return found


def with_spares(directory: str) -> list[int]:
    """Those, and their spares. Daemons are a template's children, too, but each has its shim's command line."""
    found = templates(directory)
    for pid in list(found):
        with suppress(OSError):
            children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            found += [child for child in children if b"-id" not in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")]
    return found


def end_templates(directory: str) -> None:
    """End them, and wait until they have gone; their spares end with them."""
    while pids := templates(directory):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
