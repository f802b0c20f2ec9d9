"""What a live shim weighs: PSS, private memory, threads and fds, with so many alive of its kind; after calls, and over execs.

PSS divides what processes share among those that do, and each kind is alone when it is measured; the template's and its spares'
own share is divided among the daemons. "idle": each container has been created and started. "called": after 1,000 State, Connect
and Stats calls to each of 10. --execs: growth.py's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from benchmarks.lifecycle import alive, machine, memory
from benchmarks.sides import GO, WARM, Sides, arguments, opened
from benchmarks.svg import bars
from benchmarks.weight.growth import FIRST, growth
from benchmarks.weight.pages import compare
from shimcore.rig import Session
from shimcore.rig.templates import templates, with_spares

KINDS = ("PSS MiB", "private MiB", "threads", "fds")
SETTLE = 1.0  # seconds, for whatever a shim does once it is idle


def weigh(sides: Sides, name: str, boxes: list[Session]) -> dict[str, float]:
    """Of one shim in the median, its part of the template included."""
    time.sleep(SETTLE)
    shared = [memory(pid) for pid in with_spares(sides.templates)] if name == WARM else []
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


def pages(sides: Sides) -> str:
    box = alive(sides.rigs[WARM], 1)[0]
    time.sleep(SETTLE)
    found = compare(templates(sides.templates)[0], box.shim_pid)
    box.dispose()
    return ", ".join(f"{kind}: {count}" for kind, count in found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--alive", type=int, nargs="*", default=[1, 10, 50, 200], help="(default: 1 10 50 200)")
    parser.add_argument("--calls", type=int, default=1000, help="to each of 10 shims (default: %(default)s)")
    parser.add_argument("--execs", type=int, default=0, help="for growth, 1,000 at least (default: none)")
    parser.add_argument("--picture", type=Path, help="where to write an SVG")
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, float]]] = {}
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
        kinds = pages(sides)
    grown = growth(options.shim, options.execs) if options.execs else None
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
    print(f"\npages of a daemon of ours beside its template's, by the words of 8 bytes that differ: {kinds}")
    if grown:
        print(
            f"\nours, plain: private {grown.first:.2f} MiB at exec {FIRST}, {grown.last:.2f} at {grown.execs}, "
            f"{grown.most:.2f} at most ({grown.seconds:.0f} s)"
        )
    if options.picture:
        title = "memory of a live shim, as a multiple of the stock Go shim's (the line)"
        options.picture.write_text(bars(title, groups, "ours"))


if __name__ == "__main__":
    main()
