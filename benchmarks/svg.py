"""Bars for the README: groups of ratios to one peer, which is the line at 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_SVG = "http://www.w3.org/2000/svg"
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 920, 300, 90, 15, 14, 46
_STYLE = (
    "text{font:12px sans-serif;fill:#222}.t{font-size:15px;font-weight:bold}"
    ".bar{fill:#9aa7b4}.ours{fill:#2a7de1}.one{stroke:#d9534f}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.bar{fill:#5d6a76}.ours{fill:#6aa9f4}}"
)


def bars(title: str, groups: Sequence[tuple[str, Mapping[str, float]]], ours: str) -> str:
    """An SVG that reads in light and dark. groups: (words, name → ratio); bars whose name begins with `ours` stand out."""
    parts: list[str] = []
    y = _TOP
    for words, ratios in groups:
        # Each group has a scale of its own: they may differ by a factor of fifty.
        scale = (_WIDTH - _LEFT - _RIGHT) / max(1.0, *ratios.values())
        parts.append(f'<text x="8" y="{y + _BAR * len(ratios) / 2 + 4:.0f}">{escape(words)}</text>')
        start = y
        for name, ratio in ratios.items():
            kind = "bar ours" if name.startswith(ours) else "bar"
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect class="{kind}" x="{_LEFT}" y="{y + 2}" width="{ratio * scale:.1f}" height="{_BAR - 3}"/>')
            parts.append(f'<text x="{_LEFT + ratio * scale + 6:.1f}" y="{y + 12}">{ratio:.2f}</text>')
            y += _BAR
        one = f"{_LEFT + scale:.1f}"
        parts.append(f'<line class="one" x1="{one}" x2="{one}" y1="{start}" y2="{y}"/>')
        y += _GAP
    head = f'<svg xmlns="{_SVG}" viewBox="0 0 {_WIDTH} {y}" role="img" aria-label="{escape(title)}">'
    head += f'\n<style>{_STYLE}</style>\n<text class="t" x="8" y="24">{escape(title)}</text>'
    return "\n".join([head, *parts, "</svg>", ""])
