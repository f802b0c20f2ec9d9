from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shimcore.install import install

from . import __doc__ as about
from .burst import Burst, bursts
from .place import ROOT, Place, Program, compile_all
from .report import Death, burst_table, latency_table
from .sides import LoopSide, ShimSide, Side, SpinSide, try_shim

CALLERS = 4
BATCH = 50  # processes at their gates at once
SETTINGS = ("idle", "callers", "spin")
PLACES = ("free", "pinned")
SPIN_ID = "io.containerd.bench-spin.v1"
SPIN_FILE = "containerd-shim-bench-spin-v1"
BURST_ID = "io.containerd.bench-burst.v1"

Samples = dict[tuple[str, str, str], list[Death]]  # of (place, setting, side)


def batch(side: Side, place: Place, setting: str, count: int, pause: int = 0) -> list[Death]:
    """So many deaths, one after the other."""
    first = place.take(count)
    for slot in range(first, first + count):
        side.exec(slot)
    callers = None
    if setting == "callers":
        callers = Program([str(place.programs / "callers"), side.address, side.service, side.id, str(CALLERS)])
    elif setting == "spin":
        side.spin()
    try:
        rows = place.measured(f"chain {first} {count} {{}} {pause} {side.address} {side.service} {side.id}")
    finally:
        if callers:
            callers.end()
        elif setting == "spin":
            side.unspin()
    for slot in range(first, first + count):
        side.forget(slot)
    return [Death(read - death, at - death) for death, read, at in rows]


def run_place(options: argparse.Namespace, place: Place, where: str, samples: Samples) -> None:
    """All settings with everything where the process is now."""
    with ExitStack() as stack:

        def add(side: Side | None) -> list[Side]:
            if side is None:
                return []
            stack.callback(side.end)
            return [side]

        loop = LoopSide(place)
        peers = add(loop)
        loop.contain()
        peers += add(try_shim("Go", place, options.go)) if options.go else []
        peers += add(try_shim("Rust", place, options.rust)) if options.rust else []
        for name, binary in options.also:
            peers += add((SpinSide if SPIN_FILE in binary else ShimSide)(name, place, binary))
        ours = add(ShimSide("ours", place, options.shim))
        spinning = add(SpinSide("ours", place, options.spin_shim)) if "spin" in options.settings else []
        rounds = -(-options.deaths // BATCH)
        for number in range(-1, rounds):
            for setting in options.settings:
                sides = [*peers, *(spinning if setting == "spin" else ours)]
                turn = number % len(sides)
                for side in sides[turn:] + sides[:turn]:
                    # The first batch of each, which pays for cold caches, is thrown away.
                    count = min(BATCH, options.deaths) if number >= 0 else 5
                    found = batch(side, place, setting, count, options.pause)
                    if number >= 0:
                        samples.setdefault((where, setting, side.name), []).extend(found)
            if sys.stderr.isatty():
                print(f"\r{where}: {number + 1}/{rounds}", end="\n" if number + 1 == rounds else "", file=sys.stderr)


def machine() -> dict[str, Any]:
    def first_line(*argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True).stdout.split("\n")[0]

    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "python": platform.python_version(),
        "runc": first_line("runc", "--version"),
        "load": os.getloadavg()[0],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shim", help="our shim (default: one is installed below build/)")
    parser.add_argument("--go", default=shutil.which("containerd-shim-runc-v2") or "", help="Go's shim; empty: without")
    parser.add_argument("--rust", default=shutil.which("containerd-shim-runc-v2-rs") or "", help="Rust's shim")
    also = f"another shim, as ours of another day ({SPIN_FILE}: the handler spins)"
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PATH", help=also)
    parser.add_argument("--pause", type=int, default=0, help="ms between two deaths, in which cores fall asleep and caches cool")
    parser.add_argument("--deaths", type=int, default=3000, help="of each side in each setting (default: %(default)s)")
    parser.add_argument("--exits", type=int, default=10000, help="in a burst (default: %(default)s)")
    parser.add_argument("--bursts", type=int, default=5, help="bursts of each kind (default: %(default)s)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--places", default=",".join(PLACES), help="default: %(default)s")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="to pin to (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run, for CI: 100 deaths, 2 bursts of 1,000")
    parser.add_argument("--json", help="write all figures, samples included, to this file")
    options = parser.parse_args(argv)
    if options.quick:
        options.deaths, options.exits, options.bursts = 100, 1000, 2
    options.settings = [word for word in options.settings.split(",") if word]
    options.places = [word for word in options.places.split(",") if word]
    build = ROOT / "build" / "bench"
    options.also = [word.split("=", 1) for word in options.also]
    options.programs = compile_all(build)
    options.shim = options.shim or install(str(build))
    options.spin_shim = install(str(build), runtime_id=SPIN_ID, shim="benchmarks.exit_latency.shims:SpinShim")
    options.burst_shim = install(str(build), runtime_id=BURST_ID, shim="benchmarks.exit_latency.shims:BurstShim")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    samples: Samples = {}
    found: list[Burst] = []
    began = time.monotonic()
    everywhere = os.sched_getaffinity(0)
    facts = machine()
    for where in options.places:
        # Children inherit it: all that a place starts, shims and runc included, stays where this process is.
        os.sched_setaffinity(0, {options.core} if where == "pinned" else everywhere)
        if options.settings:
            slots = 100 + (5 + len(options.also)) * len(options.settings) * (options.deaths + 2 * BATCH)
            with Place(options.programs, slots) as place:
                run_place(options, place, where, samples)
        if options.bursts:
            with Place(options.programs, (2 * options.bursts * 2) * (options.exits + 2)) as place:
                found += bursts(place, where, options.burst_shim, options.exits, options.bursts)
    os.sched_setaffinity(0, everywhere)
    print(f"Linux {facts['kernel']}, {facts['cores']} cores ({facts['cpu']}); Python {facts['python']}; {facts['runc']}; "
          f"load {facts['load']:.1f} at the start; {time.monotonic() - began:.0f} s")
    if samples:
        print(f"\n{latency_table(samples)}")
    if found:
        print(f"\n{burst_table(found)}")
    if options.json:
        rows = [{"place": p, "setting": s, "side": side, "deaths": found} for (p, s, side), found in samples.items()]
        Path(options.json).write_text(json.dumps({"machine": facts, "latency": rows, "burst": [vars(b) for b in found]}))


if __name__ == "__main__":
    main()
