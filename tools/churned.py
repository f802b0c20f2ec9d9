"""What tools/churn.py and its run under containerd look at: a shim's daemon that lives all along, and what it must not gather."""

from __future__ import annotations

import collections
import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shimcore.cli import nodes

# Seconds after which an end that does not come has failed.
HANG = 60.0
PATIENCE = 5.0
# kB: Python takes its memory from the system in pieces of this size, so that one of them more is no growth yet.
ARENA = 1024


def in_parts(count: int, workers: int, work: Callable[[Iterator[int]], None]) -> Iterator[int]:
    """Have `work` live the lives of the numbers that it gets, ten times a tenth of `count`, by so many threads at once. Yields
    how many there have been, when nobody is at work. The first tenth warms the daemons up: modules are imported, the allocator
    takes what it will need."""
    for part in range(1, 11):
        numbers = iter(range(count * (part - 1) // 10, count * part // 10))
        threads = [threading.Thread(target=work, args=(numbers,)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield count * part // 10


def dump(pids: set[int]) -> None:
    """What these shims say of themselves when something has gone wrong."""
    for shim in nodes.shims():
        if shim.pid in pids:
            print(json.dumps(nodes.look(shim).told)[:20000], flush=True)


def open_files(pid: int) -> list[str]:
    """What a process's open files are."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(path.readlink()))
    return found


def peers(pid: int) -> set[str]:
    """The connected unix sockets whose other end this process holds, each as what a link of /proc/PID/fd says, by ss(8)."""
    held = set(open_files(pid))
    found = set()
    for line in subprocess.run(["ss", "-xH"], capture_output=True, text=True, check=True).stdout.splitlines():
        # netid, state, two queues, local address and port, peer's address and port; a port is an inode.
        words = line.split()
        if f"socket:[{words[-1]}]" in held:
            found.add(f"socket:[{words[-3]}]")
    return found


class Watched:
    """A daemon that has nothing to do when this is made. had: containers so far; samples: (had, private kB).

    client: the process whose connections are its own to close; 0: none.
    """

    def __init__(self, pid: int, client: int = 0) -> None:
        self.pid = pid
        self.client = client
        self.kept = 0  # connections of the client that came and stayed
        self.had = 0
        self.idle = open_files(pid)
        self.samples: list[tuple[int, int]] = []

    def settle(self) -> None:
        """Wait until it has no more files open than when it was new: what was given up may be under way in it still."""
        # What a client keeps for ever need not be waited for as long as what hangs.
        deadline = time.monotonic() + (PATIENCE if self.client else HANG)
        while len(found := open_files(self.pid)) > len(self.idle):
            if time.monotonic() > deadline:
                more = set(found) - set(self.idle)
                if self.client and len(found) - len(self.idle) <= len(more & peers(self.client)):
                    self.kept = len(found) - len(self.idle)
                    return
                dump({self.pid})
                new = collections.Counter(found) - collections.Counter(self.idle)
                raise TimeoutError(f"{len(self.idle)} open files have become {len(found)}: {sorted(new.elements())}")
            time.sleep(0.02)

    def sample(self) -> str:
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        self.samples.append((self.had, private))
        return f"{private} kB"

    def growth(self, allowed: int = 0) -> float:
        """kB of private memory for each 1,000 containers, from the first sample to the last, without what is allowed."""
        (first, before), (last, after) = self.samples[0], self.samples[-1]
        return (after - before - allowed) * 1000 / max(last - first, 1)

    def grown(self, limit: float) -> list[str]:
        """A line if it has grown by more than `limit` kB for each 1,000 containers; too few containers say nothing."""
        if self.had >= 1000 and self.growth(ARENA) > limit:
            return [f"private memory grew by {self.growth():.0f} kB for each 1,000 containers"]
        return []
