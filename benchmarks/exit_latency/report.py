"""Tables: medians and tails, and ours as a ratio to the floor and to the peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from .burst import Burst

FLOOR = "C loop"


class Death(NamedTuple):
    """One death; ns from the process's last act."""

    told: int  # to the read that completed its TaskExit frame
    reaped: int  # to exited_at in that frame


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def _ratio(a: float, b: float | None) -> str:
    return f"{a / b:.2f}" if b else "–"


def latency_table(samples: Mapping[tuple[str, str, str], Sequence[Death]]) -> str:
    lines = [
        "| | setting | side | n | median µs | p90 | p99 | max | to reaped: median | p99 "
        "| ÷ C loop: median | p99 | ÷ Go: median | p99 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    told = {key: [death.told for death in deaths] for key, deaths in samples.items()}
    for (where, setting, side), ns in sorted(told.items()):
        reaped = [death.reaped for death in samples[where, setting, side]]
        figures = [median(ns), quantile(ns, 0.9), quantile(ns, 0.99), max(ns), median(reaped), quantile(reaped, 0.99)]
        cells = [where, setting, side, str(len(ns)), *(f"{value / 1000:.0f}" for value in figures)]
        for peer in (FLOOR, "Go"):
            theirs = told.get((where, setting, peer))
            cells.append(_ratio(figures[0], median(theirs) if theirs else None))
            cells.append(_ratio(figures[2], quantile(theirs, 0.99) if theirs else None))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def burst_table(found: Sequence[Burst]) -> str:
    """Medians over the bursts of a kind."""
    names = ("deaths", "reaped_worst", "reaped_total", "told_worst", "told_total")
    lines = [
        "| | consumer | side | exits × bursts | all dead ms | reaped, worst | total | told, worst | total | RSS MiB → peak "
        "| ÷ C loop: reaped worst, total; told worst, total |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = {(one.place, one.asleep, one.side): [] for one in found}  # type: dict[tuple[str, bool, str], list[Burst]]
    for one in found:
        kinds[one.place, one.asleep, one.side].append(one)
    for (where, asleep, side), same in sorted(kinds.items()):
        middle = {name: median(getattr(one, name) for one in same) for name in names}
        floor = kinds.get((where, asleep, FLOOR), [])
        theirs = {name: median(getattr(one, name) for one in floor) for name in names} if floor else {}
        before, peak = median(one.rss_before for one in same), max(one.rss_peak for one in same)
        lines.append(
            f"| {where} | {'asleep' if asleep else 'reads'} | {side} | {same[0].exits} × {len(same)} | "
            + " | ".join(f"{middle[name] / 1e6:.1f}" for name in names)
            + f" | {before / 1024:.1f} → {peak / 1024:.1f} | "
            + ", ".join(_ratio(middle[name], theirs.get(name)) for name in names[1:])
            + " |"
        )
    return "\n".join(lines)
