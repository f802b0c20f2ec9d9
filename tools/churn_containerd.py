"""The churn through the containerd of PATH: python tools/churn.py --containerd [--count N] [--seed S]

The daemon is one of its own (tests/containerd/daemon.py), CRI off, the shim ours, found by its name. Containers are in several
namespaces, most of them in pods. A call is given up as a client's death gives it up: its `ctr` is killed at a random moment, and
containerd cancels what it was doing for it. At the end `ctr` may list nothing, and the machine is looked at as after the other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from churned import HANG, Watched, dump, in_parts, open_files

from shimcore.address import socket_address
from shimcore.cli import nodes
from shimcore.install import install
from shimcore.oci.service import ORPHAN_TIMEOUT
from shimcore.rig.bundle import busybox_rootfs
from shimcore.rig.templates import end_templates
from shimcore.testing.leaks import Left, watched
from tests.containerd.daemon import Containerd, Events

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = "io.containerd.runc.v2-py"
GROUP = "io.containerd.runc.v2.group"
SPACES = 3
SHORT = (["/bin/true"], ["/bin/sh", "-c", "exit 7"])
LONG = (["/bin/sleep", "1000"], ["/bin/sh", "-c", "sleep 1000 & sleep 1000"])


class Given(Exception):
    """The call was given up, or the shim was killed."""


class Failed(Exception):
    """A call that nobody had given up has failed."""


class Space:
    """A namespace: `ctr` in it."""

    def __init__(self, daemon: Containerd, name: str, rootfs: Path) -> None:
        self.daemon = copy.copy(daemon)
        self.daemon.namespace = self.name = name
        self.rootfs = rootfs
        self.fifos = ("--fifo-dir", str(daemon.fifos))

    def ctr(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Raises TimeoutExpired after HANG seconds; any exit status is an answer."""
        return self.daemon.ctr(*args, check=False, timeout=HANG)

    def killed(self, moment: float, *args: str) -> bool:
        """As ctr, killed after so many seconds; False when it had ended before."""
        command = ["ctr", "--address", str(self.daemon.address), "--namespace", self.name, *args]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                return True
        return False

    def listed(self) -> list[str]:
        """The ids that containerd knows, of tasks and of containers."""
        found: list[str] = []
        for kind in ("task", "container"):
            done = self.ctr(kind, "ls", "-q")
            if done.returncode:
                raise Failed(f"{kind} ls: {done.stderr}")
            found += [f"{kind} {self.name}/{id}" for id in done.stdout.split()]
        return found

    def remove(self, id: str) -> None:
        """Until containerd knows nothing of it: what was given up may be under way. Raises TimeoutError."""
        deadline = time.monotonic() + HANG
        while True:
            said = [self.ctr("task", "rm", "-f", id).stderr, self.ctr("container", "rm", id).stderr]
            if not any(line.endswith(f"/{id}") for line in self.listed()):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}/{id} can't be removed: {said}")

    def bundles(self) -> list[Path]:
        """Those that are there still after a while: containerd removes a dead shim's when it has answered already."""
        deadline = time.monotonic() + HANG
        folder = self.daemon.root / "state" / "io.containerd.runtime.v2.task" / self.name
        while (found := sorted(folder.glob("*"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def shim(self, id: str) -> int:
        """The pid of the daemon that was started for this container; 0 when there is none."""
        return next((one.pid for one in nodes.shims(self.name) if one.id == id), 0)


class Pod(Watched):
    """A pod's shim, kept alive by a container that sleeps."""

    def __init__(self, space: Space, number: int) -> None:
        self.space = space
        self.id = f"pod{number}{os.urandom(3).hex()}"
        self.flags = ("--annotation", f"{GROUP}={self.id}")
        done = space.ctr(*run(space, self.id, ["/bin/sleep", "100000"], self.flags))
        if done.returncode:
            raise Failed(f"the pod {self.id}: {done.stderr}")
        super().__init__(space.shim(self.id), space.daemon.pid)


def run(space: Space, id: str, command: list[str], flags: tuple[str, ...] = ()) -> list[str]:
    """The words of a detached `ctr run`."""
    return ["run", "-d", "--runtime", RUNTIME, *flags, *space.fifos, "--rootfs", str(space.rootfs), id, *command]


class Life:
    """One container's, as a seed has chosen it."""

    def __init__(
        self, rng: random.Random, space: Space, pod: Pod | None, cancel: float, counts: collections.Counter[str]
    ) -> None:
        self.rng = rng
        self.space = space
        self.pod = pod
        self.cancel = cancel
        self.counts = counts
        self.id = f"c{os.urandom(4).hex()}"
        self.long = rng.random() < 0.6
        self.shot = False
        self.story: list[str] = []  # what was done to it against its will

    @property
    def socket(self) -> str:
        """The file name of its shim's socket, if it has one of its own."""
        return Path(socket_address(str(self.space.daemon.address), self.space.name, self.id)).name

    def live(self) -> None:
        shooting = None
        if self.pod is None and self.rng.random() < 0.5:
            self.shot = True
            shooting = threading.Timer(self.rng.uniform(0.05, 0.6), self._shoot)
            shooting.start()
        try:
            self._work()
            self.counts["whole lives"] += 1
        except Given:
            pass
        finally:
            if shooting is not None:
                shooting.join()
            self.space.remove(self.id)
        self.counts["containers"] += 1

    def _shoot(self) -> None:
        if pid := self.space.shim(self.id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.story.append(f"{time.time():.3f} shim {pid} killed")
            self.counts["shims killed"] += 1

    def _work(self) -> None:
        rng = self.rng
        command = rng.choice(LONG if self.long else SHORT)
        words = run(self.space, self.id, command, self.pod.flags if self.pod is not None else ())
        self._call(True, *words)
        for number in range(rng.randrange(3)):
            self._exec(f"e{number}")
        for _ in range(rng.randrange(2)):
            self._call(self.long, "task", rng.choice(["ps", "metrics"]), self.id)
        if rng.random() < 0.5:
            self._call(self.long, "task", "kill", "-s", "SIGKILL", self.id)
        if rng.random() < 0.3:
            self._call(False, "task", "rm", "-f", self.id)

    def _exec(self, exec_id: str) -> None:
        rng = self.rng
        command = rng.choice(LONG + SHORT)
        self._call(self.long, "task", "exec", "-d", *self.space.fifos, "--exec-id", exec_id, self.id, *command)
        self.counts["execs"] += 1
        if rng.random() < 0.7:
            self._call(False, "task", "rm", "-f", "--exec-id", exec_id, self.id)

    def _call(self, must: bool, *words: str) -> None:
        """must: it has no reason to fail, unless the shim is killed. Raises Given, Failed."""
        # Most of what ctr does takes from ten milliseconds, its own start, to some two hundred.
        moment = 0.008 * 40 ** self.rng.random()
        # A daemon that is killed after containerd has cleared away a Create that was given up has nobody to remove its socket.
        if self.rng.random() < self.cancel and not self.shot:
            if self.space.killed(moment, *words):
                self.counts["calls given up"] += 1
                self.story.append(f"{time.time():.3f} given up after {moment:.3f} s: {words[0]} {words[1]}")
                raise Given
            return
        done = self.space.ctr(*words)
        if done.returncode and (self.shot or not must):
            raise Given
        if done.returncode:
            raise Failed(f"{' '.join(words)}: {done.returncode} {done.stderr.strip()}")


class Churn:
    """A run of `count` lives; `failed` says what went wrong, a line each."""

    def __init__(self, args: argparse.Namespace, daemon: Containerd, spaces: list[Space]) -> None:
        self.args = args
        self.daemon = daemon
        self.spaces = spaces
        self.failed: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        # Whose shim was killed, or who had a call given up: containerd clears up after either, and tells their end besides.
        self.untold: set[str] = set()
        self.stories: dict[str, str] = {}  # by id, and by the name of the socket
        self._changed = threading.Lock()
        self.pods = [Pod(spaces[number % SPACES], number) for number in range(args.pods)]
        self.idle_fds = len(open_files(daemon.pid))

    def run(self) -> None:
        """After each part nothing but the pods may be listed, and they are looked at."""
        for count in in_parts(self.args.count, self.args.workers, self._work):
            if self.failed:
                return
            try:
                self._only_pods()
                for pod in self.pods:
                    pod.settle()
            except TimeoutError as error:
                self.failed.append(str(error))
                return
            figures = ", ".join(pod.sample() for pod in self.pods)
            fds = len(open_files(self.daemon.pid))
            print(f"{count:7} containers   private memory {figures}   containerd {fds} fds", flush=True)

    def _only_pods(self) -> None:
        """Wait until nothing else is listed: a Create that was given up may end after its container was removed."""
        pods = {pod.id for pod in self.pods}
        deadline = time.monotonic() + HANG
        while found := [one for space in self.spaces for one in space.listed() if one.rpartition("/")[2] not in pods]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still listed: {found}")
            time.sleep(0.05)

    def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:  # a range's iterator may be shared by threads
            if self.failed:
                return
            rng = random.Random(f"{self.args.seed}-{number}")
            pod = rng.choice(self.pods) if self.pods and rng.random() < 0.8 else None
            space = pod.space if pod is not None else rng.choice(self.spaces)
            life = Life(rng, space, pod, self.args.cancel, self.counts)
            try:
                life.live()
            except Exception as error:
                self.failed.append(f"container {number}, {life.space.name}/{life.id}: {type(error).__name__}: {error}")
                dump({pod.pid for pod in self.pods})
                return
            with self._changed:
                self.stories[life.id] = self.stories[life.socket] = f"{space.name}/{life.id}: " + "; ".join(life.story)
                if life.story:
                    self.untold.add(life.id)
                if pod is not None:
                    pod.had += 1

    def left(self, lines: list[str]) -> None:
        """What is left behind, with the story of whose it is."""
        for line in lines:
            whose = [story for name, story in self.stories.items() if name in line]
            self.failed.append(f"left behind: {line}" + "".join(f"\n    {story}" for story in whose))
            for story in whose:
                id = story.partition(":")[0].rpartition("/")[2]
                self.failed += [f"    {said}" for said in self.daemon.log.read_text().splitlines() if id in said]

    def end(self, events: Events) -> None:
        """The pods are ended, `ctr` lists nothing, and every exit has been told once."""
        for pod in self.pods:
            self.failed += pod.grown(self.args.growth)
            pod.space.remove(pod.id)
        for space in self.spaces:
            self.failed += [f"listed: {line}" for line in space.listed()]
            self.left([f"bundle {path}: {sorted(map(str, path.rglob('*')))}" for path in space.bundles()])
        self.spaces[0].ctr("namespaces", "label", self.spaces[0].name, "churn=ended")
        events.wait_for(lambda seen: any(one.body.get("labels", {}).get("churn") == "ended" for one in seen), HANG)
        told: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for event in events.all:
            if event.topic == "/tasks/exit":
                told[event.container][f"exit {event.body['id']}"] += 1
            elif event.topic in ("/tasks/create", "/tasks/delete"):
                told[event.container][event.topic] += 1
        for id, kinds in told.items():
            if id in self.untold:
                continue
            if twice := [kind for kind, times in kinds.items() if times > 1]:
                self.failed.append(f"{id}: told more than once: {', '.join(twice)}")
            if (kinds["/tasks/create"], kinds[f"exit {id}"]) != (1, 1):
                self.failed.append(f"{id}: told {dict(kinds)}")


def churn_containerd(args: argparse.Namespace) -> int:
    """What tools/churn.py does for --containerd; its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed then too
    version = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    what = f"{args.count} containers, {args.workers} at a time, {args.pods} pods, containerd {version}"
    print(f"seed {args.seed}: {what}", flush=True)
    shim = Path(install(str(ROOT / "build" / "shim")))
    try:
        with watched() as guard:
            root = guard.roots[0]
            templates = str(root / "templates")
            os.environ |= {"SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": templates}
            rootfs = busybox_rootfs(root / "rootfs")
            daemon = Containerd(root / "cd", guard.prefix, [shim.parent])
            try:
                daemon.start()
                spaces = [Space(daemon, f"{guard.prefix}-{number}", rootfs) for number in range(SPACES)]
                with daemon.events() as events:
                    churn = Churn(args, daemon, spaces)
                    began = time.monotonic()
                    churn.run()
                    took = time.monotonic() - began
                    if not churn.failed:
                        churn.end(events)
                daemon.stop()
                end_templates(templates)
                churn.left(guard.settle(2 * ORPHAN_TIMEOUT))  # a shim may wait so long for a Shutdown
            finally:
                daemon.stop()
                end_templates(templates)
    except Left:
        pass  # said already
    print(f"{took:.0f} s; " + ", ".join(f"{number} {what}" for what, number in sorted(churn.counts.items())))
    for number, pod in enumerate(churn.pods):
        if pod.samples:
            kept = f", {pod.kept} connections kept by containerd" if pod.kept else ""
            print(f"pod {number}: {pod.had} containers, private memory {pod.growth():+.1f} kB for each 1,000{kept}")
    for line in churn.failed[:40]:
        print(f"FAILED {line}")
    print("FAILED" if churn.failed else "nothing left behind")
    return bool(churn.failed)
