"""Shims side by side: the times of a container's whole life under each, taken alternately in one run.

All are driven by the same code, with the same runtime and like bundles, in changing order, so that what else the
machine does falls on each. The times are this driver's, in Python: good for ratios between shims; and the ratio of a
shim that is given twice says what a run on this machine can't tell.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from shimcore.errors import ShimError
from shimcore.rig.activate import GENERATIONS, ActivationError
from shimcore.rig.session import Rig
from shimcore.rig.templates import end_templates

#: What is timed, in ms, and of what to what. The last is a rate: containers begun and ended in a second, one after the other.
WHAT = {
    "start": "exec of the binary → its output's end, as containerd reads it",
    "create": "exec of the binary → Create answered",
    "run": "Start of init → answered",
    "exec": "Exec and Start of one more process → answered",
    "exit": "SIGKILL to that process → its TaskExit on containerd's socket",
    "kill": "Kill of init → Wait answered",
    "remove": "Delete of init → answered",
    "delete": "exec of the binary's `delete` → its output's end",
    "containers/s": "whole lives, one after the other",
}
RATE = "containers/s"
WARM_UP = 2

_SLEEP = ("/bin/sleep", "1000")


def p99(values: Sequence[float]) -> float:
    """The smallest value that at least 99 % of all do not exceed."""
    ordered = sorted(values)
    return ordered[-(-99 * len(ordered) // 100) - 1]


@dataclass
class Side:
    """One shim. times: of WHAT, a value a round. left: what it left behind, a line each.

    Of a rate, bigger is better, and its p99 is that of the slowest.
    """

    name: str
    path: str
    generation: str
    times: dict[str, list[float]] = field(default_factory=lambda: {what: [] for what in WHAT})
    left: list[str] = field(default_factory=list)

    def median(self, what: str) -> float:
        return median(self.times[what])

    def p99(self, what: str) -> float:
        return -p99([-value for value in self.times[what]]) if what == RATE else p99(self.times[what])


def life(rig: Rig) -> dict[str, float]:
    """One container from start to its bundle's end, with one exec in it; the times of WHAT."""
    times = {}

    def timed(what: str, action: Callable[[], object]) -> None:
        began = time.monotonic_ns()
        action()
        times[what] = (time.monotonic_ns() - began) / 1e6

    box = rig.container(_SLEEP)
    times["start"] = (box.started.ended - box.started.began) / 1e6
    box.create()
    times["create"] = (time.monotonic_ns() - box.started.began) / 1e6
    timed("run", box.start)
    began = time.monotonic_ns()
    process = box.exec(_SLEEP)
    times["exec"] = (time.monotonic_ns() - began) / 1e6
    killed = time.monotonic_ns()
    os.kill(process.pid, signal.SIGKILL)  # the shim has not been asked to delete it: the pid is its own
    exited = rig.events.wait("/tasks/exit", container=box.id, process=process.id)
    times["exit"] = (exited.at - killed) / 1e6
    process.delete()

    def kill() -> None:
        box.task.kill(signal.SIGKILL)
        box.wait()

    timed("kill", kill)
    timed("remove", box.task.delete)
    gone = box.end()
    times["delete"] = (gone.ended - gone.began) / 1e6
    times[RATE] = 1e9 / (time.monotonic_ns() - box.started.began)
    rig.events.clear()
    return times


def _names(paths: Sequence[str]) -> list[str]:
    """Short, and different from one another."""
    short = [os.path.basename(path) for path in paths]
    names: list[str] = []
    for path, name in zip(paths, short, strict=True):
        wanted = name if len({other for other, same in zip(paths, short, strict=True) if same == name}) == 1 else path
        number = names.count(wanted) + sum(taken.startswith(f"{wanted} #") for taken in names)
        names.append(f"{wanted} #{number + 1}" if number else wanted)
    return names


@contextmanager
def _rig(shim: str, generations: Sequence[str], **options: object) -> Iterator[tuple[Rig, str]]:
    """A rig of the first containerd that the shim takes, in which it has lived once. Raises ActivationError for none."""
    for generation in generations:
        with Rig(shim, generation=generation, strict=False, **options) as rig:  # type: ignore[arg-type]
            try:
                life(rig)
            except ActivationError:
                if generation == generations[-1]:
                    raise
                continue
            yield rig, generation
            return


def compare(
    shims: Sequence[str],
    *,
    rounds: int = 20,
    runtime: str = "",
    generation: str = "",
    plain: bool = False,
    rootfs: Path | None = None,
    seen: Callable[[int], None] = lambda done: None,
) -> list[Side]:
    """So many containers under each shim; a Side each, in the order given.

    generation: of the start protocol; "" for the oldest that each shim takes. plain: shims made with shimcore start
    without their warm template; else they share one directory of templates, which end with the run. seen: called
    after each round. Raises FileNotFoundError for what is no shim, ValueError, and RuntimeError, with the shim's name,
    for one that fails.
    """
    if rounds < 1:
        raise ValueError("at least one round")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(end_templates, folder)
        env = {"SHIMCORE_TEMPLATE": "0"} if plain else {"SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": folder}
        sides: list[tuple[Side, Rig]] = []
        for name, shim in zip(_names(shims), shims, strict=True):
            with _naming(name):
                manager = _rig(shim, [generation] if generation else GENERATIONS, runtime=runtime, env=env, rootfs=rootfs)
                rig, spoken = stack.enter_context(manager)
                # The template is made beside the first container.
                for _ in range(WARM_UP):
                    life(rig)
                sides.append((Side(name, rig.shim, spoken), rig))
        for number in range(rounds):
            turn = number % len(sides)
            for side, rig in sides[turn:] + sides[:turn]:
                with _naming(side.name):
                    for what, value in life(rig).items():
                        side.times[what].append(value)
            seen(number + 1)
        for side, rig in sides:
            side.left = rig.close()
    return [side for side, _ in sides]


@contextmanager
def _naming(shim: str) -> Iterator[None]:
    """Errors of the shim's say whose they are."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (ShimError, ActivationError, OSError, RuntimeError) as error:
        raise RuntimeError(f"{shim}: {type(error).__name__}: {error}") from error
    except Exception as error:  # EventError: an event that does not come
        raise RuntimeError(f"{shim}: {error}") from error
