"""A run as it is seen by somebody who looks on: each step as it comes, and on a terminal what is waited for."""

from __future__ import annotations

import queue
import shutil
import sys
import threading
import time
from typing import Self, TextIO

from shimcore.rig.runner import Report, Step, Watcher

TICK = 0.1  # seconds between two states of the progress line
_ERASE = "\r\x1b[K"  # to the line's beginning; clear to its end (ECMA-48 EL)
_COLOURS = {"event": "\x1b[36m", "stdout": "\x1b[1m", "stderr": "\x1b[33m"}


class Live(Watcher):
    """Prints from a thread of its own: an output that blocks holds up no event of the shim's. A context manager.

    quiet: print nothing. width: cells of a line. Colours and the progress line are for terminals alone.
    """

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False) -> None:
        self.out = out or sys.stdout
        self.terminal = self.out.isatty()
        self.width = shutil.get_terminal_size((100, 24)).columns
        self._quiet = quiet
        self._queue: queue.SimpleQueue[str | Step | None] = queue.SimpleQueue()
        self._doing, self._since = "", 0.0
        self._counts = {"event": 0, "stdout": 0, "stderr": 0}
        self._thread = threading.Thread(target=self._print_all, name="live", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def begun(self, report: Report) -> None:
        self._queue.put(report.head())

    def doing(self, what: str) -> None:
        self._doing, self._since = what, time.monotonic()

    def seen(self, step: Step) -> None:
        self._queue.put(step)

    def _print_all(self) -> None:
        try:
            self._follow()
        except OSError:  # nobody reads any more; the run goes on to its end, so that nothing is left behind
            pass

    def _follow(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=TICK if self.terminal else None)
            except queue.Empty:
                self._progress()
                continue
            if item is None:
                break
            if not self._quiet:
                self._print(item)
        if self.terminal and not self._quiet:
            print(_ERASE, end="", file=self.out, flush=True)

    def _print(self, item: str | Step) -> None:
        text = str(item)
        if isinstance(item, Step):
            self._counts[item.kind] = self._counts.get(item.kind, 0) + 1
            if self.terminal and item.kind in _COLOURS:
                text = f"{_COLOURS[item.kind]}{text}\x1b[0m"
        print(f"{_ERASE if self.terminal else ''}{text}", file=self.out, flush=True)

    def _progress(self) -> None:
        if self._quiet or not self._doing:
            return
        lines = self._counts["stdout"] + self._counts["stderr"]
        text = f"  {self._doing}: {time.monotonic() - self._since:.1f} s; {self._counts['event']} events, {lines} lines of output"
        print(f"{_ERASE}{text[: self.width - 1]}", end="", file=self.out, flush=True)
