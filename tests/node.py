"""A node to look at: what the documents show of shims that live.

web     under our shim, busy, with an exec `check` that has ended with 3; its code can be changed
pod     the sandbox of a pod, under the same
job     under the same, with a call under way: it can't be upgraded
other   under containerd's own shim

Ids and namespaces are this session's; `places` has them by the documents' names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from shimcore.protos.runc_options_pb2 import Options
from shimcore.rig import FakeRuntime, Rig, Session
from tests.faults import Later, until
from tests.test_oci_sandbox import Shim
from tests.upgrades import HANG, Copy

STOCK = "containerd-shim-runc-v2"
WHILE = 600.0  # seconds that a node may live


class Node:
    """copies: the code that web and job run, and another to upgrade to. stock: the path of containerd's own shim."""

    def __init__(self, web: Session, copies: list[Copy], stock: str, places: dict[str, str]) -> None:
        self.web = web
        self.copies = copies
        self.stock = stock
        self.places = places

    @property
    def debug(self) -> str:
        return self.web.started.address.removeprefix("unix://") + ".debug"


@contextlib.contextmanager
def node(folder: Path, namespace: str, rootfs: Path, root: Path) -> Iterator[Node]:
    """folder: for code; root: a short path, for sockets."""
    copies = [Copy(folder / "1"), Copy(folder / "2")]
    token = os.urandom(3).hex()
    names = {name: f"{name}-{token}" for name in ("web", "job", "other")}
    spaces = {"demo": f"{namespace}-d{token}", "demo-go": f"{namespace}-g{token}"}
    stock = shutil.which(STOCK)
    assert stock, f"{STOCK} is not installed"
    with (
        FakeRuntime(root / f"r{token}") as runtime,
        Rig(copies[0].binary, namespace=spaces["demo"], rootfs=rootfs, env=runtime.environment, generation="2.3") as ours,
        Rig(stock, namespace=spaces["demo-go"], rootfs=rootfs) as theirs,
    ):
        web = ours.container(["sh", "-c", "while :; do :; done"], id=names["web"])
        web.create()
        web.start()
        assert web.exec(["sh", "-c", "exit 3"], id="check").wait(timeout=HANG) == 3
        ours.events.wait("/tasks/exit", container=web.id)
        other = theirs.container(["sleep", "1000"], id=names["other"])
        other.create()
        other.start()
        ours.options = Options(binary_name=str(runtime.binary))
        job = ours.container(["@sleep"], id=names["job"])
        job.create()
        job.start()
        runtime.rule("exec", "begin hold", id=job.id)
        added = job.exec(["@exit", "0"], start=False)
        held = Later(lambda: added.start(timeout=WHILE))
        pod = Shim(ours)
        pod.create()
        pod.call("StartSandbox")
        made = Node(web, copies, stock, {**names, **spaces, "pod": pod.id})
        with runtime.wait("exec", "begin"):
            until(lambda: os.path.exists(made.debug), what="the debug socket")
            try:
                yield made
            finally:
                pod.end()
        held.result(HANG)
        runtime.forget("exec", id=job.id)


@contextlib.contextmanager
def dead_socket() -> Iterator[Path]:
    """A socket of a shim's name that nobody listens on."""
    path = Path("/run/containerd/s") / os.urandom(32).hex()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
