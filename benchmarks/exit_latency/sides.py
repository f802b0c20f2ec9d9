"""Who is measured: a shim behind the rig, or the bare C loop. Each has one container, whose init never dies, and execs in it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from shimcore.errors import FailedPrecondition, ShimError
from shimcore.rig import Rig
from shimcore.rig import bundle as bundles
from shimcore.rig.activate import GENERATIONS, ActivationError

from .place import BenchError, Place, Program

SPIN = "while True: pass"


class Side:
    """name; address and service of its State; id of its container; pid of what reaps."""

    name: str
    address: str
    service: str
    id: str
    pid: int

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.place = place
        self._spinner: subprocess.Popen[bytes] | None = None

    def dying(self, slot: int) -> list[str]:
        return ["/dying", "/stamps", str(slot)]

    def exec(self, slot: int) -> None:
        """Starts a process that waits at the gate of `slot`."""
        raise NotImplementedError

    def forget(self, slot: int) -> None:
        """The exit of the slot's process was told."""

    def own(self, first: int, count: int) -> None:
        """Takes over `count` plain processes for the burst."""
        raise NotImplementedError

    def spin(self) -> None:
        """Python begins to spin beside it."""
        self._spinner = subprocess.Popen([sys.executable, "-c", SPIN], start_new_session=True)

    def unspin(self) -> None:
        assert self._spinner
        self._spinner.kill()
        self._spinner.wait()

    def end(self) -> None:
        raise NotImplementedError


class ShimSide(Side):
    def __init__(self, name: str, place: Place, binary: str, generation: str = "1.6") -> None:
        super().__init__(name, place)
        self.rig = Rig(binary, rootfs=place.rootfs, strict=False, timeout=120, generation=generation)
        self.rig.activator.events = place.events
        try:
            self.box = self.rig.container(self.dying(place.take(1)))
            self.box.create()
            self.box.start()
        except BaseException:
            self.rig.close()
            raise
        self.id = self.box.id
        self.pid = self.box.shim_pid
        self.service = self.box.task.service
        self.address = self.box.started.address.removeprefix("unix://")

    def exec(self, slot: int) -> None:
        self.box.task.exec(f"e{slot}", bundles.process(self.dying(slot)))
        self.box.task.start(f"e{slot}")

    def forget(self, slot: int) -> None:
        self.box.task.delete(f"e{slot}")

    def own(self, first: int, count: int) -> None:
        pids = self.place.root / "pids"
        self.box.task.checkpoint("\t".join(spawner(self.place, first, count, pids)))

    def end(self) -> None:
        left = self.rig.close()
        if left:
            print(f"{self.name} left behind: {left}", file=sys.stderr)


class SpinSide(ShimSide):
    """Ours, with a handler that spins in the shim itself."""

    def spin(self) -> None:
        self._call = threading.Thread(target=self.box.task.stats, kwargs={"timeout": 3600}, daemon=True)
        self._call.start()
        while True:
            try:
                self.box.task.resize_pty(1, 1)
                return
            except FailedPrecondition:
                continue

    def unspin(self) -> None:
        self.box.task.resize_pty(0, 0)
        self._call.join()


class LoopSide(Side):
    """The C loop in a session of its own, as a daemon would be; runc is run by it."""

    def __init__(self, place: Place, runtime: str = "runc") -> None:
        super().__init__("C loop", place)
        # The rig is here for the bundle's and the cgroups' sake.
        self.rig = Rig("true", rootfs=place.rootfs, strict=False)
        self.id = "loop"
        self.service = "containerd.task.v2.Task"
        self.address = str(self.rig.root / "loop.sock")
        self.runc = [runtime, "--root", str(self.rig.root / "runc"), "--log", str(self.rig.root / "log.json")]
        args = [str(place.programs / "loop"), self.address, place.events, self.rig.namespace, self.id]
        self.loop = Program(args, own_session=True)
        self.pid = self.loop.child.pid
        self.bundle: bundles.Bundle | None = None

    def contain(self) -> None:
        """Makes the container; without it only `own` works."""
        init = bundles.spec(
            self.dying(self.place.take(1)), root=str(self.place.rootfs), cgroups_path=f"/{self.rig.namespace}/{self.id}"
        )
        self.bundle = bundles.Bundle(self.rig.bundle_path(self.id), init)
        self._run(*self.runc, "create", "--bundle", str(self.bundle.path), self.id)
        self._run(*self.runc, "start", self.id)

    def _run(self, *argv: str) -> None:
        status = self.loop.ask("\t".join(["run", *argv]))
        if status != "0":
            raise BenchError(f"{' '.join(argv)}: status {status}")

    def exec(self, slot: int) -> None:
        assert self.bundle
        pid_file = self.bundle.path / "exec.pid"
        spec = self.bundle.path / "process.json"
        write_json(spec, bundles.process(self.dying(slot)))
        self._run(*self.runc, "exec", "--process", str(spec), "--detach", "--pid-file", str(pid_file), self.id)
        if self.loop.ask(f"own\t{slot}\t{pid_file}") != "1":
            raise BenchError("the C loop does not own its exec")

    def own(self, first: int, count: int) -> None:
        pids = self.place.root / "pids"
        self._run(*spawner(self.place, first, count, pids))
        if self.loop.ask(f"own\t{first}\t{pids}") != str(count):
            raise BenchError("the C loop does not own the burst")

    def spin(self) -> None:
        self.loop.ask("\t".join(["spin", sys.executable, "-c", SPIN]))

    def unspin(self) -> None:
        self.loop.ask("unspin")

    def end(self) -> None:
        if self.bundle:
            self._run(*self.runc, "delete", "--force", self.id)
        self.loop.end()
        if self.bundle:
            self.bundle.remove()
        left = self.rig.close()
        if left:
            print(f"{self.name} left behind: {left}", file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    import json

    path.write_text(json.dumps(value))


def spawner(place: Place, first: int, count: int, pids: Path) -> list[str]:
    """The command that leaves `count` orphans at the common gate."""
    return [str(place.programs / "dying"), str(place.stamps), str(first), str(count), str(pids)]


def try_shim(name: str, place: Place, binary: str) -> ShimSide | None:
    """A peer's side under the containerd that it was made for, None (and a word on it) when it can't be had."""
    said = ""
    for generation in GENERATIONS:
        try:
            return ShimSide(name, place, binary, generation)
        except (ShimError, ActivationError, OSError) as error:
            said += f"\n  containerd {generation}: {error}"
    print(f"{name} is left out:{said}", file=sys.stderr)
    return None
