"""What a daemon's private pages are: how many words of each differ from the template's page that it was forked with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1  # pagemap's fields (Documentation/admin-guide/mm/pagemap.rst); frames for root only


def _writable(pid: int) -> Iterator[int]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, mode = line.split()[:2]
        if "w" in mode:
            first, last = (int(number, 16) for number in span.split("-"))
            yield from range(first, last, PAGE)


class _Memory:
    def __init__(self, pid: int) -> None:
        self._map = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    def frame(self, at: int) -> int:
        """0: none."""
        entry = int.from_bytes(os.pread(self._map, 8, at // PAGE * 8), "little")
        return entry & _FRAME if entry & _PRESENT else 0

    def words(self, at: int) -> memoryview:
        return memoryview(os.pread(self._memory, PAGE, at)).cast("Q")

    def close(self) -> None:
        os.close(self._map)
        os.close(self._memory)


def compare(template: int, daemon: int) -> Counter[str]:
    """Pages of the daemon's writable memory, by kind."""
    found: Counter[str] = Counter()
    theirs, own = _Memory(template), _Memory(daemon)
    for at in _writable(daemon):
        frame = own.frame(at)
        if not frame:
            continue
        before = theirs.frame(at)
        if frame == before:
            found["still shared"] += 1
        elif not before:
            found["new"] += 1
        else:
            changed = sum(a != b for a, b in zip(theirs.words(at), own.words(at), strict=True))
            kinds = ((0, "the same"), (1, "1 word"), (3, "2 or 3 words"), (16, "4 to 16 words"), (PAGE, "more"))
            found[next(kind for most, kind in kinds if changed <= most)] += 1
    theirs.close()
    own.close()
    return found
