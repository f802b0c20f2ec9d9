"""How long a shim takes to start and to clean up, and how many containers a second go through it; all shims alternate in one run.

start            posix_spawn of the binary → end of its output and of itself, as containerd waits for both (benchmarks/c/timer.c)
start, CPU       what that cost in CPU time: the binary, what it left behind by then, and the template's work for the next
create           exec of the binary → Create answered, `runc create` included
delete, gone     the binary's `delete` after the container's ordinary end: the runtime's state is gone
delete, there    after a SIGKILL of the shim: the container lives, and the runtime is asked to delete it
one by one       lives of containers per second (create, start, kill, wait, delete, cleanup)
8 at once        the same from 8 threads of the one driver

floors           of a program that does nothing, and of our launcher with a template that answers at once

--picture FILE: an SVG. The first start after a template's end ("cold") is a plain one.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.lifecycle import INIT, lifecycle, machine, timed
from benchmarks.sides import GO, WARM, Sides, arguments, opened
from benchmarks.start.timer import floors
from benchmarks.svg import bars
from shimcore.rig import Rig
from shimcore.rig.compare import p99
from shimcore.rig.templates import with_spares

TIMES = ("start", "start, CPU", "create", "delete, gone", "delete, there")
RATES = ("one by one", "8 at once")
CALLERS = 8


def cpu(pids: Sequence[int]) -> float:
    """Milliseconds that these processes have run (/proc/PID/task/TID/schedstat, in ns)."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except OSError:  # a thread that has just ended
                pass
    return total / 1e6


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (used.ru_utime + used.ru_stime)


def one(sides: Sides, name: str) -> dict[str, float]:
    """One container whose shim is killed, and one that ends as it should."""
    rig = sides.rigs[name]
    before = _children()
    helpers = {pid: cpu([pid]) for pid in with_spares(sides.templates)} if name == WARM else {}
    box = rig.container(INIT)
    # A spare that became the daemon had been prepared before: that work counts as the next one's does.
    used = _children() - before + cpu([box.shim_pid])
    used += sum(cpu([pid]) - had for pid, had in helpers.items() if Path(f"/proc/{pid}").exists() and pid != box.shim_pid)
    found = {"start": sides.timers[name].last("start"), "start, CPU": used}
    box.create()
    found["create"] = (time.monotonic_ns() - box.started.began) / 1e6
    box.start()
    box.kill_shim()
    box.cleanup()
    found["delete, there"] = sides.timers[name].last("delete")
    lifecycle(rig)
    found["delete, gone"] = sides.timers[name].last("delete")
    return found


def rate(rig: Rig, count: int, callers: int) -> float:
    """Containers per second."""
    with ThreadPoolExecutor(callers) as pool:
        return 1e3 * count / timed(lambda: list(pool.map(lambda _: lifecycle(rig), range(count))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--rounds", type=int, default=100, help="of each (default: %(default)s)")
    parser.add_argument("--containers", type=int, default=40, help="for each of 3 rates (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="where to write an SVG")
    options = parser.parse_args()
    with opened(options) as sides:
        found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in sides.rigs} for what in TIMES + RATES}
        for number in range(options.rounds):
            for name in sides.order(number):
                for what, value in one(sides, name).items():
                    found[what][name].append(value)
        for number in range(3):
            for name in sides.order(number):
                found["one by one"][name].append(rate(sides.rigs[name], options.containers, 1))
                found["8 at once"][name].append(rate(sides.rigs[name], options.containers, CALLERS))
    print(machine(options.stock, "runc"))
    print(f"{options.rounds} of each, alternating; rates: the median of 3 times {options.containers} containers\n")
    head = "".join(f" {name}: median | p99 | ÷ Go |" for name in sides.rigs)
    print(f"| | unit |{head}\n|---|---|" + "---|---|---|" * len(sides.rigs))
    groups = []
    for what, columns in found.items():
        base = median(columns[GO])
        cells = [f" {median(v):.2f} | {p99(v):.2f} | {median(v) / base:.2f} |" for v in columns.values()]
        print(f"| {what} | {'1/s' if what in RATES else 'ms'} |{''.join(cells)}")
        more = " (more is better)" if what in RATES else ""
        groups.append((what + more, {name: median(v) / base for name, v in columns.items()}))
    print("\nfloors of `start`, the same way:")
    for what, values in floors(options.shim, options.rounds).items():
        print(f"- {what}: {median(values):.2f} ms, {median(values) / median(found['start'][GO]):.2f} of Go's start")
    if options.picture:
        title = "a shim's start and end, as a multiple of the stock Go shim's (the line)"
        options.picture.write_text(bars(title, groups, "ours"))


if __name__ == "__main__":
    main()
