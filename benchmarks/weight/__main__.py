"""What a live shim weighs: PSS, private memory, threads and fds, with so many alive of its kind; after calls, and over execs.

PSS divides what processes share among those that do, and each kind is alone when it is measured; the template's and its spares'
own share is divided among the daemons. "idle": each container has been created and started. "called": after 1,000 State, Connect
and Stats calls to each of 10. Growth: private memory of one shim from its 1,000th exec to its last, each having run /bin/true by
the rig with the real runc.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.lifecycle import INIT, alive, machine, memory
from benchmarks.sides import GO, WARM, Sides, arguments, opened
from benchmarks.svg import bars
from shimcore.rig import Session

KINDS = ("PSS MiB", "private MiB", "threads", "fds")
SETTLE = 1.0  # seconds, for whatever a shim does once it is idle


def weigh(sides: Sides, name: str, boxes: list[Session]) -> dict[str, float]:
    """Of one shim in the median, its part of the template included."""
    time.sleep(SETTLE)
    shared = [memory(pid) for pid in sides.of_template()] if name == WARM else []
    each = [memory(box.shim_pid) for box in boxes]
    found = {}
    for kind in ("PSS", "private"):
        found[f"{kind} MiB"] = median(one[kind] for one in each) + sum(one[kind] for one in shared) / len(boxes)
    found["threads"] = median(len(list(Path(f"/proc/{box.shim_pid}/task").iterdir())) for box in boxes)
    found["fds"] = median(len(list(Path(f"/proc/{box.shim_pid}/fd").iterdir())) for box in boxes)
    return found


def call(boxes: list[Session], calls: int) -> None:
    for box in boxes:
        for number in range(calls):
            (box.task.state, box.task.connect, box.task.stats)[number % 3]()


def growth(sides: Sides, name: str, execs: int) -> tuple[float, float]:
    """(private MiB at the 1,000th exec, at the last)."""
    box = sides.rigs[name].container(INIT, read=False)
    box.create()
    box.start()
    first = 0.0
    for number in range(1, execs + 1):
        process = box.exec(["/bin/true"])
        process.start()
        process.wait()
        process.delete()
        if number == min(1000, execs // 2):
            time.sleep(SETTLE)
            first = memory(box.shim_pid)["private"]
        if number % 1000 == 0 and sys.stderr.isatty():
            print(f"\r{name}: {number} execs, {memory(box.shim_pid)['private']:.2f} MiB", end="", file=sys.stderr)
    time.sleep(SETTLE)
    last = memory(box.shim_pid)["private"]
    box.dispose()
    return first, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--alive", type=int, nargs="*", default=[1, 10, 50, 200], help="(default: 1 10 50 200)")
    parser.add_argument("--calls", type=int, default=1000, help="to each of 10 shims (default: %(default)s)")
    parser.add_argument("--execs", type=int, default=0, help="for growth; 100000 take hours (default: none)")
    parser.add_argument("--picture", type=Path, help="where to write an SVG")
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    grown: dict[str, tuple[float, float]] = {}
    with opened(options) as sides:
        for name in sides.rigs:
            for count in options.alive:
                boxes = alive(sides.rigs[name], count)
                rows.setdefault(f"{count} alive, idle", {})[name] = weigh(sides, name, boxes)
                if count == 10 and options.calls:
                    call(boxes, options.calls)
                    rows.setdefault("10 alive, called", {})[name] = weigh(sides, name, boxes)
                for box in boxes:
                    box.dispose()
            if options.execs:
                grown[name] = growth(sides, name, options.execs)
    print(machine(options.stock, "runc"))
    print("medians of one kind of shim alive at a time; ÷: to Go's\n")
    print("| | " + " | ".join(f"{name}: {' / '.join(KINDS)} | ÷ PSS, private" for name in sides.rigs) + " |")
    print("|---|" + "---|---|" * len(sides.rigs))
    groups = []
    for what, columns in rows.items():
        base = columns[GO]
        cells = []
        for found in columns.values():
            ratios = [found[kind] / base[kind] for kind in KINDS[:2]]
            figures = f"{found['PSS MiB']:.2f} / {found['private MiB']:.2f} / {found['threads']:.0f} / {found['fds']:.0f}"
            cells.append(f"{figures} | {ratios[0]:.2f}, {ratios[1]:.2f}")
        print(f"| {what} | {' | '.join(cells)} |")
        groups.append((f"{what}: PSS", {name: found["PSS MiB"] / base["PSS MiB"] for name, found in columns.items()}))
    for name, (first, last) in grown.items():
        print(f"\n{name}: private {first:.2f} MiB at exec {min(1000, options.execs // 2)}, {last:.2f} at {options.execs}")
    if options.picture:
        title = "memory of a live shim, as a multiple of the stock Go shim's (the line)"
        options.picture.write_text(bars(title, groups, "ours"))


if __name__ == "__main__":
    main()
