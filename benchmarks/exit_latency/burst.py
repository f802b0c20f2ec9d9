"""Bursts: so many plain processes die at once, the same source for our exit table and for the C loop."""

from __future__ import annotations

from pathlib import Path

from .place import Place
from .sides import LoopSide, ShimSide, Side


class Burst:
    """One burst. Times in ns: told_worst and reaped_worst from a process's own last act, told_total and reaped_total from the
    first last act of all. rss_before and rss_peak of what reaps, KiB."""

    def __init__(self, place: str, side: str, asleep: bool, rows: list[tuple[int, int, int]], before: int, peak: int) -> None:
        first = min(death for death, _, _ in rows)
        self.place = place
        self.side = side
        self.asleep = asleep
        self.exits = len(rows)
        self.told_worst = max(read - death for death, read, _ in rows)
        self.told_total = max(read for _, read, _ in rows) - first
        self.reaped_worst = max(at - death for death, _, at in rows)
        self.reaped_total = max(at for _, _, at in rows) - first
        self.deaths = max(death for death, _, _ in rows) - first
        self.rss_before = before
        self.rss_peak = peak


def memory(pid: int, field: str) -> int:
    """KiB, from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def one(side: Side, place: Place, where: str, exits: int, asleep: bool) -> Burst:
    first = place.take(exits)
    side.own(first, exits)
    Path(f"/proc/{side.pid}/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
    before = memory(side.pid, "VmRSS")
    rows = place.measured(f"burst {first} {exits} {{}} {int(asleep)}")
    return Burst(where, side.name, asleep, rows, before, memory(side.pid, "VmHWM"))


def bursts(place: Place, where: str, shim: str, exits: int, count: int) -> list[Burst]:
    """`count` of each kind and side, alternating, each with a reaper of its own."""
    found = []
    for number in range(count):
        for asleep in (False, True):
            for ours in sorted((False, True), reverse=bool(number % 2)):
                side: Side = ShimSide("ours", place, shim) if ours else LoopSide(place)
                try:
                    found.append(one(side, place, where, exits, asleep))
                finally:
                    side.end()
    return found
