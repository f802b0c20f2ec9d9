"""Two kinds of pictures for the documents, as SVG that reads in light and dark: who says what to whom, and states.

A sequence is lines of text, in the order of time:

    who: NAME | NAME | …        the columns
    A -> B: words               a call or a command
    A --> B: words              its answer
    A ~> B: words               an event
    at A: words                 what A does for itself
    part: words                 a rule across the picture, with a heading
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = (
    "text{font:12px sans-serif;fill:#222}.t{font-size:15px;font-weight:bold}.h{font-weight:bold}.s{font-style:italic}"
    ".life{stroke:#9aa7b4;stroke-dasharray:3 3}.box{fill:#e8eef5;stroke:#7d8b99}.at{fill:#f6f1dc;stroke:#b9a968}"
    ".call{stroke:#444;fill:none}.event{stroke:#d9534f;fill:none;stroke-width:1.6}.rule{stroke:#9aa7b4}"
    "marker path{fill:#444}marker.e path{fill:#d9534f}.answer{stroke-dasharray:5 3}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.box{fill:#24303c;stroke:#7d8b99}.at{fill:#3a3520;stroke:#8d8150}"
    ".call{stroke:#bbb}marker path{fill:#bbb}marker.e path,.event{fill:#f0837f}.event{stroke:#f0837f;fill:none}}"
)
_MARKERS = (
    '<defs><marker id="m" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z"/></marker><marker id="e" class="e" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" '
    'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
)
_ROW, _TOP, _CHAR = 30, 84, 6.3
_LINE = re.compile(r"(?P<a>.+?) (?P<arrow>->|-->|~>) (?P<b>[^:]+): (?P<words>.*)")


def _page(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(title)}">'
    heading = f'<text class="t" x="8" y="24">{escape(title)}</text>'
    return "\n".join([head, f"<style>{_STYLE}</style>{_MARKERS}", heading, *parts, "</svg>", ""])


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, words: str, kind: str, width: float) -> list[str]:
    box = f'<rect class="{kind}" x="{x - width / 2:.0f}" y="{y - 15:.0f}" width="{width:.0f}" height="22" rx="4"/>'
    return [box, _text(x, y, words, "h" if kind == "box" else "")]


def sequence(title: str, lines: Sequence[str], column: int = 190) -> str:
    """The picture of a sequence. column: px between two of those who talk. Raises ValueError naming a line that is none."""
    who = [name.strip() for name in lines[0].removeprefix("who:").split("|")]
    at = {name: column / 2 + i * column for i, name in enumerate(who)}
    width, y = column * len(who), _TOP
    parts: list[str] = []
    for line in lines[1:]:
        if line.startswith("part: "):
            parts.append(f'<line class="rule" x1="8" x2="{width - 8}" y1="{y - 8}" y2="{y - 8}"/>')
            parts.append(_text(8, y + 8, line[6:], "s", "start"))
        elif own := re.fullmatch(r"at (.+?): (.*)", line):
            wide = len(own[2]) * _CHAR + 14
            middle = min(max(at[own[1]], wide / 2 + 4), width - wide / 2 - 4)
            parts += _box(middle, y + 4, own[2], "at", wide)
        elif (said := _LINE.fullmatch(line)) and said["a"] in at and said["b"] in at:
            a, b = at[said["a"]], at[said["b"]]
            kind, mark = ("event", "e") if said["arrow"] == "~>" else ("call", "m")
            kind += " answer" if said["arrow"] == "-->" else ""
            parts.append(f'<line class="{kind}" x1="{a:.0f}" x2="{b:.0f}" y1="{y + 6}" y2="{y + 6}" marker-end="url(#{mark})"/>')
            half = len(said["words"]) * _CHAR / 2 + 4
            parts.append(_text(min(max((a + b) / 2, half), width - half), y, said["words"]))
        else:
            raise ValueError(f"no line of a sequence: {line}")
        y += _ROW
    lives = [f'<line class="life" x1="{x:.0f}" x2="{x:.0f}" y1="62" y2="{y - 8}"/>' for x in at.values()]
    heads = [piece for name, x in at.items() for piece in _box(x, 56, name, "box", len(name) * 7.4 + 20)]
    return _page(title, width, y, [*lives, *heads, *parts])


def states(title: str, size: tuple[int, int], places: dict[str, tuple[int, int]], ways: Sequence[tuple[str, str, str]]) -> str:
    """The picture of states. places: name → (x, y); ways: (from, to, words), along a row or a column."""
    parts: list[str] = []
    half = {name: len(name) * 3.7 + 10 for name in places}
    for a, b, words in ways:
        (ax, ay), (bx, by) = places[a], places[b]
        if ay == by:
            side = 1 if bx > ax else -1
            x1, y1, x2, y2 = ax + side * half[a], ay - 4, bx - side * half[b], by - 4
        else:
            side = 1 if by > ay else -1
            dx = 14 * side  # there and back do not lie on each other
            x1, y1, x2, y2 = ax + dx, ay - 4 + side * 11, bx + dx, by - 4 - side * 11
        parts.append(f'<line class="call" x1="{x1:.0f}" y1="{y1}" x2="{x2:.0f}" y2="{y2}" marker-end="url(#m)"/>')
        if ay == by:
            parts.append(_text((x1 + x2) / 2, y1 - 8, words))
        else:
            parts.append(_text(x1 + 8 * side, (y1 + y2) / 2 + 4, words, anchor="start" if side > 0 else "end"))
    for name, (x, y) in places.items():
        parts += _box(x, y, name, "box", 2 * half[name])
    return _page(title, *size, parts)
