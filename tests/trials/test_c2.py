"""Trials C1, C2, C7, C10, and what is left by a Create that is cut short. Each says what would turn it red."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore.address import DEBUG_SUFFIX
from shimcore.errors import Closed, DeadlineExceeded, NotFound, ShimError
from shimcore.protos import types_pb2
from shimcore.rig import FakeRuntime, Rig, Session, Task, bundle
from shimcore.rig.leaks import alive
from shimcore.ttrpc import Client
from tests.faults import Lab, Later, together, until


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def socket_of(session: Session) -> str:
    return session.started.address.removeprefix("unix://")


# red: `context.cancelled` not looked at after `runc create`: a container that nobody knows runs on
@pytest.mark.parametrize("step", ["begin", "made", "end"])
def test_C1_the_client_dies_in_mid_create(new_lab: Callable[..., Lab], step: str) -> None:
    lab = new_lab()
    path = socket_of(lab.session)
    lab.runtime.rule("create", f"{step} hold", id="c1")
    box = lab.box("c1", create=False)
    box.deleted = True  # whatever comes, nobody is to end it
    client = lab.connect()
    task = Task(client, "c1", timeout=60)
    creating = Later(lambda: task.create(str(box.bundle), options=lab.rig.options))
    with lab.runtime.wait("create", step, id="c1") as held:
        client.close()
        with pytest.raises(Closed):
            creating.result()
        lab.stats()  # an answer from after that end
    until(lambda: not known(box.task), what="a container that nobody waits for")
    assert not held.pid or not alive(held.pid), "its process lives on"
    assert not list(lab.rig.root.glob("runc/*/c1")), "the runtime still knows it"
    assert lab.events.topics("c1") == []
    if step != "made":
        return
    # Nobody says Shutdown: the shim ends by itself.
    pidfd = os.pidfd_open(lab.pid)
    assert select.select([pidfd], [], [], 40)[0], "the shim stays"
    os.close(pidfd)
    assert not os.path.lexists(path)


def known(task: Task) -> bool:
    try:
        task.state()
    except NotFound:
        return False
    return True


# red: Pids without `within`: all hang; without its look at a reading that has stalled: each call takes its time; without the lock
# on the pool: two containers' readings hold it, and no other is made
def test_C2_pids_while_the_kernel_stalls(lab: Lab, tmp_path: Path) -> None:
    box, other = lab.box("c2"), lab.box("c2-other")
    exec_pid = box.exec("e")
    assert {box.pid, exec_pid} <= set(box.task.pids())
    os.mkfifo(tmp_path / "cgroup.procs")  # its reader waits for a writer
    for id in ("c2", "c2-other"):
        lab.call("set_cgroup", id=id, path=str(tmp_path))
    for answer in together(*[box.task.pids] * 20, timeout=20):
        assert answer == {box.pid: "", exec_pid: "e"}
    assert other.pid in other.task.pids()
    # The first of them have waited half a second for the kernel. If each did, these took a minute.
    began = time.monotonic()
    for _ in range(120):
        assert box.pid in box.task.pids()
    assert time.monotonic() - began < 30
    beside = lab.box("c2-beside", ["@exit", "4"])
    assert beside.status() == 4 and beside.delete() == 4
    with open(tmp_path / "cgroup.procs", "w") as kernel:
        kernel.write(f"{box.pid}\n4242\n")
    (tmp_path / "cgroup.procs").unlink()
    (tmp_path / "cgroup.procs").write_text(f"{box.pid}\n4243\n")
    until(lambda: set(box.task.pids()) == {box.pid, exec_pid, 4243})
    box.task.kill(9, "e")  # the fake runtime makes no pid namespace that would take it with init
    assert box.status("e") == 137


# red: an exception kept by its own traceback, in `step`, `work` or a handler: context and connection live until a collection
def test_C5_a_call_that_failed_keeps_no_connection(lab: Lab) -> None:
    box = lab.box("c5")
    made = lab.box("c5-made", create=False)
    made.deleted = True
    box.exec("done", ["@exit", "1"])
    box.status("done")
    ended = lab.box("c5-ended", ["@exit", "2"])
    ended.status()
    options = lab.rig.options
    mounts = [types_pb2.Mount(type="bind", source="/there/is/none")]
    calls: dict[str, Callable[[Task], object]] = {
        "no such container": lambda task: Task(task.client, "nobody").pids(),
        "the runtime fails": lambda task: Task(task.client, "c5-made").create(str(made.bundle), options=options),
        "a mount fails": lambda task: Task(task.client, "c5-made").create(str(made.bundle), rootfs=mounts, options=options),
        "an exec fails": lambda task: task.start("fails"),
        "started twice": lambda task: task.start(),
        "delete fails": lambda task: Task(task.client, "c5-ended").delete(),
        "delete of what runs": lambda task: task.delete(),
        "update fails": lambda task: task.update({}),
        "pause fails": lambda task: task.pause(),
    }
    for command in ("create", "exec", "update", "pause", "delete"):
        for id in ("c5", "c5-made", "c5-ended"):
            lab.runtime.rule(command, "begin log no", "begin exit 1", id=id)
    box.exec("fails", start=False)
    lab.process()
    before = lab.process()["fds"]
    kept = []
    for name, call in calls.items():
        with lab.connect() as client, pytest.raises(ShimError):
            call(Task(client, "c5"))
        try:
            until(lambda: lab.process()["fds"] <= before, 5)  # noqa: B023
        except AssertionError:
            kept.append(name)
            before = lab.process()["fds"]
    assert kept == []
    for command in ("create", "exec", "update", "pause", "delete"):
        for id in ("c5", "c5-made", "c5-ended"):
            lab.runtime.forget(command, id=id)


# red: an address relative to where the daemon was started
def test_C7_an_authors_chdir(new_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = new_lab()
    path = socket_of(lab.session)
    gone = tmp_path.joinpath(*"deeper")  # than the bundle is: no `..` leads to the root by chance
    gone.mkdir(parents=True)
    lab.call("chdir", path=str(gone))
    gone.rmdir()  # and now the working directory is none
    box = lab.box("c7", ["@exit", "7"])
    assert box.status() == 7 and box.delete() == 7
    lab.session.task.shutdown()
    until(lambda: not os.path.lexists(path) and not os.path.lexists(path + DEBUG_SUFFIX))


# red: `bind_or_reuse` called twice, or the daemon binds anew: a moment without a socket, or somebody else's taken away
def test_C10_one_bind_for_a_shim(rig: Rig) -> None:
    first = rig.container(["true"])
    path = Path(socket_of(first))
    first.task.shutdown()
    until(lambda: not path.exists())
    seen = Watch(path.parent)
    for _ in range(2):  # the second finds the first's shim
        started = rig.activator.start(first.id, rig.bundle_path(first.id))
        assert started.address == first.started.address
    first.client = first.task.client = Client(started.address, namespace=rig.namespace)
    assert first.run() == 0
    first.delete()
    until(lambda: not path.exists())
    assert seen.of(path.name) == ["made", "removed"]
    seen.close()


class Watch:
    """What happens to the names in a directory, in order (inotify(7))."""

    KINDS = {0x100: "made", 0x80: "made", 0x200: "removed", 0x40: "removed"}  # IN_CREATE, _MOVED_TO, _DELETE, _MOVED_FROM

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self.fd, os.fsencode(folder), sum(self.KINDS)) >= 0

    def of(self, name: str) -> list[str]:
        data, found = os.read(self.fd, 1 << 20), []
        while data:
            _, mask, _, size = struct.unpack_from("iIII", data)
            if data[16 : 16 + size].rstrip(b"\0").decode() == name:
                found.append(self.KINDS[mask & sum(self.KINDS)])
            data = data[16 + size :]
        return found

    def close(self) -> None:
        os.close(self.fd)


# --- the shim dies while the runtime is at work


# red: a runtime call that outlives its shim makes the container when `delete` has been
@pytest.mark.parametrize("step", ["begin", "made", "end"])
def test_C12_the_shim_dies_in_mid_create(shim_dir: Path, session_root: Path, step: str) -> None:
    runtime = FakeRuntime(session_root / f"f{os.urandom(3).hex()}")
    shim = shim_dir / "containerd-shim-runc-v2-py"
    with runtime, Rig(shim, runtime=str(runtime.binary), rootfs=Path("/"), env=runtime.environment) as rig:
        container = rig.container(["@sleep"])
        runtime.rule("create", f"{step} hold")
        creating = Later(lambda: container.create(timeout=60))
        held = runtime.wait("create", step)
        container.kill_shim()
        with pytest.raises(ShimError):
            creating.result()
        container.cleanup()
        assert held.gone(), "the runtime goes on, and nobody will hear of what it makes"
        assert not held.pid or not alive(held.pid)
        assert not list(rig.root.glob("runc/*/*"))


class Hooked:
    """A container of which runc is held in `create` by a hook of config.json: it has cgroups and init, runc has no state yet.

    pid: the hook's own, as it sees itself."""

    def __init__(self, rig: Rig, folder: Path, hook: str, *, timeout: float = 60) -> None:
        entered, go = folder / "entered", folder / "go"
        for fifo in (entered, go):
            os.mkfifo(fifo)
        id = f"hook-{hook.lower()}"
        spec = bundle.spec(["sleep", "1000"], root=str(rig.rootfs), cgroups_path=f"/{rig.namespace}/{id}")
        args = ["sh", "-c", f"echo $$ >{entered}; exec cat {go}"]
        spec["hooks"] = {hook: [{"path": "/bin/sh", "args": args, "env": ["PATH=/bin"]}]}
        self.container = rig.container(id=id, spec=spec)
        self.creating = Later(lambda: self.container.create(timeout=timeout))
        self._fd = os.open(go, os.O_RDWR)
        with open(entered) as said:
            self.pid = int(said.read())

    def let_go(self) -> None:
        """The hook ends, if it lives."""
        os.close(self._fd)


# red: as above; and `delete` without clear_half_made: runc has no state to find cgroups and processes by
@pytest.mark.parametrize("hook", ["prestart", "createRuntime", "createContainer"])
def test_C12_the_shim_dies_while_runc_creates(rig: Rig, tmp_path: Path, hook: str) -> None:
    hooked = Hooked(rig, tmp_path, hook)
    hooked.container.kill_shim()
    with pytest.raises(ShimError):
        hooked.creating.result()
    hooked.container.cleanup()
    # A hook of the runtime's namespace is runc's child and nobody's container; one of the container's own has been killed.
    mine = f"process {hooked.pid}:" if hook != "createContainer" else "none"
    left = [line for line in rig.leaks.settle() if not line.startswith(mine)]
    hooked.let_go()
    assert left == []
    assert not list(rig.root.glob("runc/*/*"))


# red: `delete` without clear_mounts
def test_C12_a_mount_of_runcs_own_is_removed(rig: Rig) -> None:
    """runc mounts its binary in its state directory for a moment, at every create and exec; killed then, it leaves that."""
    container = rig.container(["sleep", "1000"])
    container.create()
    container.kill_shim()
    (state,) = rig.root.glob(f"runc/*/{container.id}")
    (state / "runc.mounted").touch()
    subprocess.run(["mount", "--bind", shutil.which("runc") or "", str(state / "runc.mounted")], check=True)
    container.cleanup()
    assert rig.leaks.mounts() == [] and not state.exists()


# red: _uncreate without clear_half_made
@pytest.mark.parametrize("hook", ["createRuntime", "createContainer"])
def test_C3_a_create_that_takes_too_long_leaves_nothing(rig: Rig, tmp_path: Path, hook: str) -> None:
    hooked = Hooked(rig, tmp_path, hook, timeout=0.5)
    with pytest.raises(DeadlineExceeded):
        hooked.creating.result()
    until(lambda: not known(hooked.container.task))
    assert not list(rig.root.glob("runc/*/*"))
    assert rig.leaks.cgroups() == []
    hooked.let_go()
    hooked.container.end()
