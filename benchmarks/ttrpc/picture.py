"""The benchmark's picture: for each cell the servers' rpc/s as bars, as multiples of Go's newest."""

from __future__ import annotations

from benchmarks.svg import bars

from .peers import GO, OURS


def picture(cells: dict[tuple[int, int], dict[str, float]], place: str) -> str:
    """cells: (bytes, outstanding) -> server -> rpc/s."""
    groups = []
    for (size, outstanding), rates in cells.items():
        if GO in rates:
            words = f"{size // 1024} KiB" if size >= 1024 else f"{size} bytes"
            groups.append((f"{words}, {outstanding} outstanding", {name: rate / rates[GO] for name, rate in rates.items()}))
    return bars(f"ttrpc servers, {place}: rpc/s as a multiple of {GO} (the line)", groups, OURS)
