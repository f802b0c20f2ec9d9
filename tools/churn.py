"""Thousands of short lives under one shim, with calls that are given up at random: python tools/churn.py [--count N] [--seed S]

Containers are made, exec'd into, killed and deleted by several workers, with real runc, most of them in a few pods whose daemons
live all along, the others under shims of their own, of which some are killed. Every call may be given up: by a deadline that is
too short, or by a connection that is closed. At the end nothing may be left on the machine, every container that was told to be
created must have been told to have exited, once, and the daemons' private memory and open files must be what they were.

What is chosen depends on the seed alone, when it happens on the machine: a seed repeats the same lives, not the same race.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from churned import HANG, Watched, dump, in_parts  # noqa: E402

from shimcore.errors import Closed, DeadlineExceeded, NotFound, ShimError  # noqa: E402
from shimcore.install import install  # noqa: E402
from shimcore.protos import types_pb2  # noqa: E402
from shimcore.rig import Rig, Session, Task  # noqa: E402
from shimcore.rig import bundle as bundles  # noqa: E402
from shimcore.ttrpc import Client  # noqa: E402

GROUP = "io.containerd.runc.v2.group"
COMMANDS = (["true"], ["sh", "-c", "exit 7"], ["sleep", "1000"], ["sh", "-c", "sleep 1000 & sleep 1000"])
ORPHAN_TIMEOUT = 10.0  # that of shimcore.oci.service

T = TypeVar("T")


class Given(Exception):
    """The call was given up."""


class Daemon(Watched):
    """A pod's shim, kept alive by a container that sleeps."""

    def __init__(self, rig: Rig, number: int) -> None:
        self.group = {GROUP: f"pod-{number}-{os.urandom(3).hex()}"}
        self.anchor = rig.container(["sleep", "100000"], annotations=self.group)
        self.anchor.create()
        self.anchor.start()
        super().__init__(self.anchor.shim_pid)

    def end(self) -> None:
        self.anchor.task.kill(9)
        self.anchor.wait()
        self.anchor.delete()


class Life:
    """One container's, as a seed has chosen it."""

    def __init__(
        self, rig: Rig, rng: random.Random, daemon: Daemon | None, cancel: float, counts: collections.Counter[str]
    ) -> None:
        self.rig = rig
        self.rng = rng
        self.daemon = daemon
        self.cancel = cancel
        self.counts = counts
        self.mounted = rng.random() < 0.3
        self.killed = False

    def live(self) -> Session:
        rng = self.rng
        container = self._container()
        shot = None
        if self.daemon is None and rng.random() < 0.5:
            self.killed = True
            shot = threading.Timer(rng.uniform(0, 0.15), lambda: self._shoot(container))
            shot.start()
        try:
            self._work(container)
        finally:
            if shot is not None:
                shot.join()
        if not self.killed:
            self._end(container)
        self._cleanup(container)
        self.counts["containers"] += 1
        return container

    def _shoot(self, container: Session) -> None:
        with contextlib.suppress(ProcessLookupError):
            container.kill_shim()
        self.counts["shims killed"] += 1

    def _container(self) -> Session:
        group = self.daemon.group if self.daemon is not None else {}
        command = self.rng.choice(COMMANDS)
        id = f"c{os.urandom(4).hex()}"
        root = "rootfs" if self.mounted else str(self.rig.rootfs)
        spec = bundles.spec(command, root=root, cgroups_path=f"/{self.rig.namespace}/{id}", annotations=group)
        if self.mounted:
            spec["root"]["readonly"] = True
        return self.rig.container(id=id, spec=spec)

    def _work(self, container: Session) -> None:
        rng = self.rng
        mounts = []
        if self.mounted:
            mounts = [types_pb2.Mount(type="bind", source=str(self.rig.rootfs), options=["rbind", "ro"])]
        try:
            self._call(container, lambda task, timeout: self._create(container, task, mounts, timeout))
            if rng.random() < 0.9:
                self._call(container, lambda task, timeout: task.start(timeout=timeout))
            for number in range(rng.randrange(4)):
                self._exec(container, f"e{number}")
            for _ in range(rng.randrange(3)):
                look = rng.choice(["state", "pids", "stats", "connect"])
                self._call(container, lambda task, timeout, look=look: getattr(task, look)(timeout=timeout))  # type: ignore[misc]
        except (ShimError, Given):
            return  # the container has ended, or was never made; or it is the caller who gave up
        self.counts["whole lives"] += 1

    def _create(self, container: Session, task: Task, mounts: list[types_pb2.Mount], timeout: float) -> int:
        stdio = container.stdio
        return task.create(
            str(container.bundle.path), rootfs=mounts, stdout=stdio.stdout, stderr=stdio.stderr, options=self.rig.options,
            timeout=timeout,
        )  # fmt: skip

    def _exec(self, container: Session, exec_id: str) -> None:
        rng = self.rng
        process = bundles.process(rng.choice(COMMANDS))
        container.task.exec(exec_id, process, timeout=HANG)
        self._call(container, lambda task, timeout: task.start(exec_id, timeout=timeout))
        self.counts["execs"] += 1
        if rng.random() < 0.7:
            with contextlib.suppress(NotFound):
                container.task.kill(9, exec_id, timeout=HANG)
            container.task.wait(exec_id, timeout=HANG)
            self._call(container, lambda task, timeout: task.delete(exec_id, timeout=timeout))

    def _call(self, container: Session, call: Callable[[Task, float], T]) -> T | None:
        """The answer; or Given, when it was given up before it came."""
        chance = self.rng.random()
        # Most calls take from less than a millisecond to some fifty.
        moment = 0.001 * 60 ** self.rng.random()
        if chance >= self.cancel:
            return call(container.task, HANG)
        try:
            if chance < self.cancel / 2:
                return call(container.task, moment)
            client = Client(container.started.address, namespace=self.rig.namespace)
            closing = threading.Timer(moment, client.close)
            closing.start()
            try:
                return call(Task(client, container.id), HANG)
            finally:
                closing.join()
        except (DeadlineExceeded, Closed):
            self.counts["calls given up"] += 1
            raise Given from None

    def _end(self, container: Session) -> None:
        """Kill, Wait, Delete, until the shim knows nothing of it: a Create or Delete that was given up may still be under way."""
        deadline = time.monotonic() + HANG
        while True:
            try:
                container.task.state(timeout=HANG)
                with contextlib.suppress(NotFound):
                    container.task.kill(9, timeout=HANG)
                container.task.wait(timeout=HANG)
                container.task.delete(timeout=HANG)
                return
            except NotFound:
                with contextlib.suppress(NotFound):
                    container.task.state(timeout=HANG)
                    continue  # under creation: known, and not there yet
                return
            except ShimError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{container.id} can't be ended: {error}") from None

    def _cleanup(self, container: Session) -> None:
        with contextlib.suppress(ShimError):
            container.task.shutdown(timeout=HANG)
        container.cleanup(timeout=HANG)


class Churn:
    """A run of `count` lives; `failed` says what went wrong, a line each."""

    def __init__(self, rig: Rig, args: argparse.Namespace) -> None:
        self.rig = rig
        self.args = args
        self.failed: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.untold: set[str] = set()  # whose shim was killed: their exits may be told by nobody
        self._changed = threading.Lock()
        self.daemons = [Daemon(rig, number) for number in range(args.pods)]

    def run(self) -> None:
        """After each part the daemons have nothing to do, and are looked at."""
        for count in in_parts(self.args.count, self.args.workers, self._work):
            if self.failed:
                return
            for daemon in self.daemons:
                daemon.settle()
            figures = ", ".join(daemon.sample() for daemon in self.daemons)
            print(f"{count:7} containers   private memory {figures}", flush=True)

    def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:  # a range's iterator may be shared by threads
            if self.failed:
                return
            rng = random.Random(f"{self.args.seed}-{number}")
            daemon = rng.choice(self.daemons) if self.daemons and rng.random() < 0.9 else None
            life = Life(self.rig, rng, daemon, self.args.cancel, self.counts)
            try:
                container = life.live()
            except Exception as error:
                self.failed.append(f"container {number}: {type(error).__name__}: {error}")
                dump({daemon.pid for daemon in self.daemons})
                return
            with self._changed:
                if life.killed:
                    self.untold.add(container.id)
                if daemon is not None:
                    daemon.had += 1

    def check(self) -> None:
        """Events and memory; the daemons are ended then, and what is left is looked for."""
        told: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for event in self.rig.events.all:
            if event.topic == "/tasks/exit":
                told[event.container][f"exit {event.process}"] += 1
            elif event.topic in ("/tasks/create", "/tasks/delete"):
                told[event.container][event.topic] += 1
        anchors = {daemon.anchor.id for daemon in self.daemons}
        for id, kinds in told.items():
            if twice := [kind for kind, times in kinds.items() if times > 1]:
                self.failed.append(f"{id}: told more than once: {', '.join(twice)}")
            if id not in self.untold | anchors and (kinds["/tasks/create"], kinds["exit "], kinds["/tasks/delete"]) != (1, 1, 1):
                self.failed.append(f"{id}: told {dict(kinds)}")
        for daemon in self.daemons:
            self.failed += daemon.grown(self.args.growth)
            daemon.end()
        # A shim whose only Create was given up may have been told Shutdown too early; it ends by itself after ORPHAN_TIMEOUT.
        self.rig.leaks.settle(2 * ORPHAN_TIMEOUT)
        self.failed += [f"left behind: {line}" for line in self.rig.close()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--containerd", action="store_true", help="under the containerd of PATH, through ctr, not under the rig")
    parser.add_argument("--count", type=int, help="containers (4000; 400 under containerd)")
    parser.add_argument("--seed", default="", help="of the choices; one is made up and printed")
    parser.add_argument("--workers", type=int, default=4, help="lives at a time (4)")
    parser.add_argument("--pods", type=int, default=2, help="daemons that live all along (2)")
    parser.add_argument("--cancel", type=float, default=0.2, help="the share of calls that may be given up (0.2)")
    parser.add_argument(
        "--growth", type=float, default=100.0,
        help="kB of private memory for each 1,000 containers, beyond one piece of 1 MiB, above which it fails (100)",
    )  # fmt: skip
    parser.add_argument("--shim", default="", help="a shim's executable; ours, installed below build, unless given")
    parser.add_argument("--runtime", default="", help="the OCI runtime's (runc)")
    args = parser.parse_args()
    args.seed = args.seed or os.urandom(4).hex()
    args.count = args.count or (400 if args.containerd else 4000)
    if args.containerd:
        if args.shim or args.runtime:
            parser.error("under containerd the shim is ours, found by its name, and the runtime its default")
        from churn_containerd import churn_containerd

        return churn_containerd(args)
    shim = args.shim or install(str(ROOT / "build" / "shim"))
    print(f"seed {args.seed}: {args.count} containers, {args.workers} at a time, {args.pods} pods", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed then too
    rig = Rig(shim, runtime=args.runtime, timeout=HANG, strict=False)
    try:
        churn = Churn(rig, args)
        began = time.monotonic()
        churn.run()
        took = time.monotonic() - began
        churn.check()
    finally:
        rig.close()
    print(f"{took:.0f} s; " + ", ".join(f"{number} {what}" for what, number in sorted(churn.counts.items())))
    for number, daemon in enumerate(churn.daemons):
        print(f"pod {number}: {daemon.had} containers, private memory {daemon.growth():+.1f} kB for each 1,000")
    for line in churn.failed[:40]:
        print(f"FAILED {line}")
    print("FAILED" if churn.failed else "nothing left behind")
    return bool(churn.failed)


if __name__ == "__main__":
    sys.exit(main())
