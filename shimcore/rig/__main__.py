"""The rig by hand: `python -m shimcore.rig run [--shim BIN] -- CMD...`, and `info`."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from shimcore.rig.activate import GENERATIONS, ActivationError, Activator
from shimcore.rig.live import Live
from shimcore.rig.runner import HELLO, run
from shimcore.rig.session import SHIM

OURS = "containerd-shim-runc-v2-py"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shimcore.rig",
        description="A containerd for shim authors: runs any shim binary with no containerd.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    default = f"path or name of the shim binary; {OURS} if that is on PATH, else {SHIM}"

    runs = actions.add_parser(
        "run",
        help="run a real container under a shim and say what happened",
        description="Runs a real container, and prints each step, event and line of output with its time in ms. "
        "Exits as the container did; with 125 when the shim failed, or left something behind.",
    )
    runs.add_argument("--shim", default="", help=default)
    runs.add_argument("--rootfs", type=Path, help="root filesystem; one of busybox is made if absent")
    runs.add_argument("--generation", choices=GENERATIONS, default="1.6", help="start protocol of which containerd")
    runs.add_argument("--runtime", default="", help="OCI runtime binary; the shim's own choice if absent")
    runs.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    runs.add_argument("--cwd", default="/", help="working directory in the container")
    runs.add_argument("--timeout", type=float, default=math.inf, help="seconds that the command may take")
    runs.add_argument("--debug", action="store_true", help="call the shim with -debug")
    runs.add_argument("--json", action="store_true", help="print the report as JSON")
    runs.add_argument("command", nargs="*", metavar="CMD", help="command in the container; says hello if absent")

    info = actions.add_parser("info", help="print what a shim says of itself (-info, containerd 2.0 and later)")
    info.add_argument("--shim", default="", help=default)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(argv)
    shim = options.shim or shutil.which(OURS) or SHIM
    if options.action == "info":
        binary = shutil.which(shim)
        if binary is None:
            print(f"no executable shim {shim!r}", file=sys.stderr)
            return 125
        try:
            print(Activator(os.path.abspath(binary), namespace="rig", events="").info(), end="")
        except ActivationError as error:
            print(error, file=sys.stderr)
            return 125
        return 0
    try:
        with Live(quiet=options.json) as live:
            report = run(
                shim,
                options.command or HELLO,
                generation=options.generation,
                runtime=options.runtime,
                rootfs=options.rootfs.absolute() if options.rootfs else None,
                env=options.env,
                cwd=options.cwd,
                timeout=options.timeout,
                debug=options.debug,
                watcher=live,
            )
    except OSError as error:
        print(error, file=sys.stderr)
        return 125
    print(report.json() if options.json else f"\n{report.end(live.width)}")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
