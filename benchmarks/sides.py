"""The shims that are measured beside one another, each behind a rig of its own: the stock Go one, Rust's, ours warm and plain."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.lifecycle import lifecycle
from benchmarks.start.timer import Timer
from shimcore.rig import Rig
from shimcore.rig.templates import end_templates

GO, RUST, WARM, PLAIN = "Go", "Rust", "ours, warm", "ours, plain"
RUST_BINARY = "containerd-shim-runc-v2-rs"
_TMPFS = "/dev/shm"  # containerd's state is on a tmpfs, /run, as a rule


class Sides:
    """name → rig, in `rigs`, and name → what times its binary, in `timers`; templates: the directory of ours."""

    def __init__(self, rigs: dict[str, Rig], timers: dict[str, Timer], templates: str) -> None:
        self.rigs = rigs
        self.timers = timers
        self.templates = templates

    def order(self, number: int) -> list[str]:
        """All names, in another order each time."""
        names = list(self.rigs)
        turn = number % len(names)
        return names[turn:] + names[:turn]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shim", default="build/shim/containerd-shim-runc-v2-py", help="ours (default: %(default)s)")
    parser.add_argument("--stock", default="containerd-shim-runc-v2", help="Go's (default: %(default)s)")
    parser.add_argument("--rust", default=RUST_BINARY, help="Rust's, `cargo install containerd-runc-shim` (default: %(default)s)")
    parser.add_argument("--no-plain", action="store_true", help="leave out ours without its template")


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Sides]:
    """All rigs, each shim having lived twice, so that none pays for cold caches. What is missing is said on stderr."""
    if os.path.ismount(_TMPFS):
        tempfile.tempdir = _TMPFS
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(end_templates, folder)
        warm = {"SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": folder}
        timers: dict[str, Timer] = {}

        def rig(name: str, shim: str, env: dict[str, str], **more: Any) -> Rig:
            timers[name] = Timer(shim, folder)
            return stack.enter_context(Rig(timers[name].binary, env={**env, **timers[name].env}, timeout=60, **more))

        rigs = {GO: rig(GO, options.stock, {}, strict=False)}
        if shutil.which(options.rust):
            # It takes its bundle's options as the newer containerds give them only.
            rigs[RUST] = rig(RUST, options.rust, {}, generation="2.3", strict=False)
        else:
            print(f"no {options.rust}: Rust's shim is left out", file=sys.stderr)
        rigs[WARM] = rig(WARM, options.shim, warm)
        if not options.no_plain:
            rigs[PLAIN] = rig(PLAIN, options.shim, {"SHIMCORE_TEMPLATE": "0"})
        for _ in range(2):
            for rig in rigs.values():
                lifecycle(rig)
            time.sleep(0.5)
        yield Sides(rigs, timers, folder)
