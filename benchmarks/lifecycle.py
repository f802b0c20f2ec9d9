"""The life of a container under our shim and under its peer, in one run: times of each step, and memory.

    python benchmarks/lifecycle.py --shim build/shim/containerd-shim-runc-v2-py

Both shims are driven by the same rig code, with the same runc and like bundles, alternately and in changing
order, so that what else the machine does falls on both. "ratio" is ours / stock, of medians. With the stock
shim on both sides every ratio should be 1: how far it is off is what a run on this machine can't tell.

start     exec of the binary → end of its output, as containerd reads it
create    the Create RPC (runc create is in it)          run     the Start RPC (runc start is in it)
kill      the Kill RPC → Wait's answer                   delete  the Delete RPC (runc delete is in it)
cleanup   the binary's `delete` action, which containerd runs after every task
total     all of these, one after the other

Ours starts from its warm template, one for this run, whose own memory and that of its spares is shared out among the shims
that are alive. --plain: without.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from shimcore.rig import Rig, Session
from shimcore.rig.compare import p99
from shimcore.rig.templates import end_templates, with_spares

STOCK = "containerd-shim-runc-v2"
PHASES = ("start", "create", "run", "kill", "delete", "cleanup", "total")
INIT = ("/bin/sleep", "1000")

Times = dict[str, list[float]]


def timed(action: Callable[[], object]) -> float:
    """Milliseconds that the action took."""
    began = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - began) / 1e6


def lifecycle(rig: Rig) -> dict[str, float]:
    """One container from start to cleanup; phase → milliseconds."""
    box = rig.container(INIT)
    times = {"start": (box.started.ended - box.started.began) / 1e6}
    times["create"] = timed(box.create)
    times["run"] = timed(box.start)

    def kill() -> None:
        box.task.kill(signal.SIGKILL)
        box.wait()

    times["kill"] = timed(kill)
    times["delete"] = timed(box.task.delete)
    gone = box.end()
    times["cleanup"] = (gone.ended - gone.began) / 1e6
    times["total"] = sum(times.values())
    return times


def memory(pid: int) -> dict[str, float]:
    """PSS and private memory of a process, MiB."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = int(value) / 1024
    return {"PSS": fields["Pss"], "private": fields["Private_Clean"] + fields["Private_Dirty"]}


def alive(rig: Rig, count: int) -> list[Session]:
    """That many running containers."""
    boxes = []
    for _ in range(count):
        box = rig.container(INIT)
        box.create()
        box.start()
        boxes.append(box)
    return boxes


def floor(rounds: int) -> list[float]:
    """What it costs this driver to run a program that does nothing and to read its output to the end."""
    binary = shutil.which("true") or "/bin/true"
    command = [binary]
    return [timed(lambda: subprocess.run(command, capture_output=True, check=True)) for _ in range(rounds)]


def row(what: str, unit: str, stock: Sequence[float], ours: Sequence[float]) -> str:
    ratio = median(ours) / median(stock)
    cells = [what, f"{median(stock):.2f}", f"{p99(stock):.2f}", f"{median(ours):.2f}", f"{p99(ours):.2f}"]
    return f"| {' | '.join(cells)} | {unit} | {ratio:.2f} |"


def machine(shim: str, runtime: str) -> str:
    version = subprocess.run([runtime, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    cores = len(os.sched_getaffinity(0))
    return f"Linux {platform.release()}, {cores} cores; Python {platform.python_version()}; {version}; {shim}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="our shim beside the stock one")
    parser.add_argument("--shim", required=True, help="path of the shim to measure")
    parser.add_argument("--stock", default=STOCK, help="its peer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="containers of each (default: %(default)s)")
    parser.add_argument("--alive", type=int, default=20, help="shims alive for memory (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="ours without its template")
    options = parser.parse_args(argv)

    sides: dict[str, Times] = {name: {phase: [] for phase in PHASES} for name in ("stock", "ours")}
    held: dict[str, Times] = {name: {"PSS": [], "private": []} for name in sides}
    with ExitStack() as stack:
        binaries = {"stock": options.stock, "ours": options.shim}
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(end_templates, directory)
        env = {"SHIMCORE_TEMPLATE": "0" if options.plain else "1", "SHIMCORE_TEMPLATE_DIR": directory}
        rigs = {name: stack.enter_context(Rig(binary, env=env)) for name, binary in binaries.items()}
        for _ in range(2):
            # The first of each pays for cold caches, and makes the template.
            for name in sides:
                lifecycle(rigs[name])
            time.sleep(0.5)
        for number in range(options.rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                for phase, value in lifecycle(rigs[name]).items():
                    sides[name][phase].append(value)
            if sys.stderr.isatty():
                print(f"\r{number + 1}/{options.rounds}", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        bare = floor(options.rounds)
        for name in sides:
            # One kind at a time: PSS divides what processes share, and should divide it among their like.
            boxes = alive(rigs[name], options.alive)
            shared = [memory(pid) for pid in with_spares(directory)] if name == "ours" else []
            for box in boxes:
                for kind, value in memory(box.shim_pid).items():
                    held[name][kind].append(value + sum(one[kind] for one in shared) / len(boxes))
            for box in boxes:
                box.dispose()

    print(machine(options.stock, "runc"))
    print(f"{options.rounds} containers of each, alternating; memory with {options.alive} alive of each\n")
    print("| | stock median | p99 | ours median | p99 | unit | ratio |")
    print("|---|---|---|---|---|---|---|")
    for phase in PHASES:
        print(row(phase, "ms", sides["stock"][phase], sides["ours"][phase]))
    for kind in ("PSS", "private"):
        print(row(f"memory, {kind}", "MiB", held["stock"][kind], held["ours"][kind]))
    print(f"\nfloor: running /bin/true this way takes {median(bare):.2f} ms (p99 {p99(bare):.2f}).")


if __name__ == "__main__":
    main()
