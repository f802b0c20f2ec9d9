"""Trials C: leaked shims and sockets, restarts, hangs. Each says what would turn it red."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore.address import DEBUG_SUFFIX
from shimcore.errors import Closed, DeadlineExceeded, NotFound, ShimError
from shimcore.rig import ActivationError, Rig, Session
from tests.faults import Lab, Later, scale, together, until


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        yield rig


def running(rig: Rig, *args: str) -> Session:
    container = rig.container(list(args) or ["sleep", "1000"])
    container.create()
    container.start()
    return container


def sockets(session: Session) -> list[str]:
    path = session.started.address.removeprefix("unix://")
    return [found for found in (path, path + DEBUG_SUFFIX) if os.path.lexists(found)]


# red: `pids` that says what the cgroup says: neither those of the exit table are added, nor is there init's for want of any
def test_C2_pids_never_fails_while_a_task_lives(lab: Lab, tmp_path: Path) -> None:
    box = lab.box("c2")
    for cgroup in ("", "/sys/fs/cgroup/there/is/none", str(tmp_path)):
        lab.call("set_cgroup", id="c2", path=cgroup)
        assert list(box.task.pids()) == [box.pid]


# red: Kill, State and Wait made runtime calls that wait for the container's lock
def test_C3_a_frozen_runtime_delays_only_who_needs_it(lab: Lab) -> None:
    box = lab.box("c3")
    lab.runtime.rule("exec", "begin hold", id="c3")
    box.task.exec("frozen", box.process(["@sleep"]))
    held = Later(lambda: box.task.start("frozen", timeout=1.0))
    call = lab.runtime.wait("exec", "begin", id="c3")
    os.kill(call.caller, signal.SIGSTOP)
    state, pids, connected, frozen = together(box.task.state, box.task.pids, box.task.connect, lambda: box.task.state("frozen"))
    assert (state.pid, list(pids), connected.task_pid) == (box.pid, [box.pid], box.pid)
    assert frozen.exec_id == "frozen"
    with pytest.raises(DeadlineExceeded):
        held.result()
    assert call.gone(), "the frozen runtime outlives its deadline"
    box.task.kill(9)
    assert box.status() == 137


# red: the container taken out of the table by a Delete that has failed
def test_C4_a_delete_that_takes_too_long_can_be_asked_again(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = lab.box("c4", ["@exit", "3"])
    assert box.status() == 3
    lab.runtime.rule("delete", "begin hold", id="c4")
    with pytest.raises(DeadlineExceeded):
        box.task.delete(timeout=0.2)
    assert box.task.state().exit_status == 3
    lab.runtime.forget("delete", id="c4")
    assert box.delete() == 3
    path = lab.session.started.address.removeprefix("unix://")
    lab.session.task.shutdown()
    until(lambda: not os.path.lexists(path))


# red: the socket's removal left out of `delete`
def test_C6_no_socket_is_left_by_runs_and_by_kills(rig: Rig) -> None:
    for number in range(scale(8, 1000)):
        container = running(rig)
        if number % 2:
            container.kill_shim()
            container.cleanup()
        else:
            container.task.kill(9)
            container.wait()
            container.delete()
        assert sockets(container) == []
    assert rig.leaks.sockets() == []  # of this rig's shims alone: other programs' come and go in that folder


# red: the sockets' removal moved behind the server's shutdown
def test_C8_at_shutdown_the_socket_goes_before_slow_work(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    path = lab.session.started.address.removeprefix("unix://")
    slow = Later(lambda: lab.call("sleep", seconds=1.5))
    until(lambda: lab.process()["threads"] >= 5)
    lab.session.task.shutdown()
    until(lambda: not os.path.lexists(path) and not os.path.lexists(path + DEBUG_SUFFIX))
    assert slow.running, "the socket went only when the call in flight had been answered"
    with contextlib.suppress(ShimError, AssertionError):
        slow.result()


# red: bind_or_reuse without its probe: a stale socket is an error; without its look at the file: a file is removed
def test_C9_what_lies_at_the_address(rig: Rig) -> None:
    first = rig.container(["true"])
    path = Path(first.started.address.removeprefix("unix://"))
    first.task.shutdown()
    until(lambda: not path.exists())
    bundle = rig.bundle_path(first.id)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    started = rig.activator.start(first.id, bundle)  # a stale socket
    assert started.address == first.started.address
    again = rig.activator.start(first.id, bundle)  # a live shim
    assert again.address == started.address
    with contextlib.suppress(NotFound):  # nothing was created
        first.reconnect()
    first.task.shutdown()
    until(lambda: not path.exists())
    path.write_text("precious")
    with pytest.raises(ActivationError, match="a file that is not a socket is there"):
        rig.activator.start(first.id, bundle)
    assert path.read_text() == "precious" and stat.S_ISREG(path.stat().st_mode)
    path.unlink()


# red: `delete` dials containerd before it does its work
def test_C11_delete_works_with_containerd_away(rig: Rig) -> None:
    container = running(rig)
    container.kill_shim()
    there, rig.activator.events = rig.activator.events, "/nowhere/at/all.ttrpc"
    try:
        deleted = container.cleanup()
    finally:
        rig.activator.events = there
    assert deleted.exit_status == 137


# red: _kill_init left out: `delete` finds a container that runs
def test_C12_delete_after_the_shims_death_kills_what_runs(rig: Rig) -> None:
    container = running(rig)
    fd = os.pidfd_open(container.pid)
    container.kill_shim()
    deleted = container.cleanup()
    assert select.select([fd], [], [], 20)[0], "init lives"
    os.close(fd)
    assert (deleted.pid, deleted.exit_status) == (container.pid, 137)


# red: the socket's path made of the names instead of their digest
def test_C13_long_names(shim_dir: Path, rootfs: Path) -> None:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, namespace="n" * 76) as rig:
        container = rig.container(["true"], id="i" * 76)
        assert container.run() == 0
        container.delete()
    with pytest.raises(Closed):
        container.task.state()
