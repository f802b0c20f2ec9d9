"""A run's steps as a picture in text: a bar for each call, a mark for each event and line of output, on one axis of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

#: Shades of a bar's last cell: how many eighths of it are covered.
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MARK = "●"
_LABEL = 18


class Step(Protocol):
    """shimcore.rig.runner.Step, as far as it is drawn. Times in ms."""

    @property
    def at(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def took(self) -> float: ...


def bar(begin: float, end: float, scale: float) -> str:
    """From `begin` to `end` ms, `scale` cells a ms; what is there is seen, be it ever so short.

    It begins with the cell that holds `begin`, for there are no shades that leave a cell's left side free.
    """
    first = int(begin * scale)
    eighths = max(round((end * scale - first) * 8), 1)
    full, rest = divmod(eighths, 8)
    return (" " * first + "█" * full + _EIGHTHS[rest]).rstrip()


def _marks(times: Sequence[float], scale: float) -> str:
    cells = {int(at * scale) for at in times}
    return "".join(_MARK if cell in cells else " " for cell in range(max(cells) + 1))


def _axis(length: float, width: int, scale: float, unit: str) -> list[str]:
    """A line of ticks at round numbers, and one of what they say."""
    about = length / max(width // 14, 1)
    power = 10.0 ** math.floor(math.log10(about))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about)
    ticks, said = ["─"] * width, [" "] * (width + 8)
    for number in range(int(length / step) + 1):
        cell = int(number * step * scale)
        if cell < width:
            ticks[cell] = "┬"
            text = f"{number * step:.12g}" + ("" if number else f" {unit}")
            said[cell : cell + len(text)] = text
    return ["".join(ticks), "".join(said).rstrip()]


def draw(steps: Sequence[Step], width: int = 100) -> list[str]:
    """Lines of at most `width` cells, [] where there is nothing to draw.

    Calls one beneath the other, then a line for each topic and stream, in the order in which each came first.
    """
    if not steps:
        return []
    length = max(max(step.at for step in steps), 0.001)
    cells = max(width - _LABEL - 10, 20)
    scale = (cells - 1) / length
    unit = 1.0 if length < 10_000 else 1000.0  # ms, or seconds
    lines = []
    for step in steps:
        if step.kind == "call":
            drawn = bar(step.at - step.took, step.at, scale)
            lines.append(f"{step.what[:_LABEL]:{_LABEL}} {drawn} {step.took / unit:.1f}")
    marked: dict[str, list[float]] = {}
    for step in steps:
        if step.kind != "call":
            marked.setdefault(step.what if step.kind == "event" else step.kind, []).append(step.at)
    for name, times in marked.items():
        count = f" {len(times)}" if len(times) > 1 else ""
        lines.append(f"{name[:_LABEL]:{_LABEL}} {_marks(times, scale)}{count}")
    ticks, said = _axis(length / unit, cells, scale * unit, "ms" if unit == 1.0 else "s")
    return [*lines, f"{'':{_LABEL}} {ticks}", f"{'':{_LABEL}} {said}"]
