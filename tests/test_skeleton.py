"""examples/skeleton.py: a whole shim in under 100 lines, driven by the rig as containerd would."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import _reaper
from shimcore.address import remove_socket
from shimcore.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from shimcore.rig import Rig, Session
from shimcore.testing import Install
from tests.containerd.daemon import Containerd

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "skeleton.py"


@pytest.fixture(scope="module")
def binary(install_shim: Install) -> str:
    return install_shim("skeleton:Skeleton", "io.containerd.skeleton.v1", EXAMPLE.parent)


@pytest.fixture
def rig(binary: str, namespace: str, rootfs: Path) -> Iterator[Rig]:
    with Rig(binary, namespace=f"{namespace}-skeleton", rootfs=rootfs) as made:
        yield made


def topics(session: Session) -> list[str]:
    return [event.topic for event in session.events]


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_a_container_from_start_to_delete(rig: Rig) -> None:
    session = rig.container(["sh", "-c", "echo hello; echo oops >&2; exit 42"])
    assert session.run() == 42
    assert (session.output, session.errors) == ("hello\n", "oops\n")
    exited = rig.events.wait("/tasks/exit", container=session.id)
    pid = session.task.connect().task_pid
    assert (exited.message.pid, exited.message.exit_status, exited.message.id) == (pid, 42, session.id)
    pidfd = os.pidfd_open(session.shim_pid)
    answer = session.delete()
    assert (answer.pid, answer.exit_status) == (pid, 42)
    assert answer.exited_at == exited.message.exited_at
    rig.events.wait("/tasks/delete", container=session.id)
    assert [event.topic for event in rig.events.of(session.id)] == [
        "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete",
    ]  # fmt: skip
    assert select.select([pidfd], [], [], 60)[0]  # Shutdown has ended it
    os.close(pidfd)


def test_states(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    state = session.task.state()
    assert (state.id, state.status, state.pid) == (session.id, _reaper.CREATED, 0)
    assert (state.bundle, state.stdout) == (str(session.bundle.path), session.stdio.stdout)
    pid = session.start()
    state = session.task.state()
    assert (state.status, state.pid) == (_reaper.RUNNING, pid)
    with pytest.raises(FailedPrecondition):
        session.task.delete()
    session.task.kill(signal.SIGTERM)
    assert session.wait() == 143
    state = session.task.state()
    assert (state.status, state.exit_status) == (_reaper.STOPPED, 143)
    with pytest.raises(NotFound):
        session.task.kill(signal.SIGTERM)
    assert session.delete().exit_status == 143


def test_environment_and_cwd(rig: Rig) -> None:
    session = rig.container(["sh", "-c", 'echo "$WORD"; pwd'], env=["PATH=/usr/bin:/bin", "WORD=two words"], cwd="/usr")
    assert session.run() == 0
    assert session.output == "two words\n/usr\n"
    session.delete()


def test_what_cannot_be_run(rig: Rig) -> None:
    session = rig.container(["/nonexistent"])
    session.create()
    with pytest.raises(InvalidArgument, match="/nonexistent: exec: No such file"):
        session.start()
    session.delete()
    rig.events.wait("/tasks/delete", container=session.id)
    assert [event.topic for event in rig.events.of(session.id)] == ["/tasks/create", "/tasks/delete"]


def test_a_container_that_is_never_started(rig: Rig) -> None:
    session = rig.container(["true"])
    session.create()
    with pytest.raises(AlreadyExists):
        session.create()
    with pytest.raises(FailedPrecondition):
        session.task.kill(signal.SIGTERM)
    session.delete()


def test_what_it_does_not_offer(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    session.start()
    for call in session.task.pause, session.task.resume, session.task.pids, session.task.stats:
        with pytest.raises(Unimplemented):
            call()
    session.task.kill(signal.SIGKILL)
    assert session.wait() == 137
    session.delete()


def test_an_exit_too_early_to_see(rig: Rig) -> None:
    """Whatever the race between the process's end and Start's answer, the order of events is the same."""
    for _ in range(10):
        session = rig.container(["true"])
        assert session.run() == 0
        rig.events.wait("/tasks/exit", container=session.id)
        assert topics(session) == ["/tasks/create", "/tasks/start", "/tasks/exit"]
        session.delete()


def test_events_survive_containerds_restart(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    session.start()
    rig.events.wait("/tasks/start", container=session.id)
    rig.events.set_mode("down")
    session.task.kill(signal.SIGKILL)
    assert session.wait() == 137  # the answer to Wait does not depend on the event
    rig.events.set_mode("up")
    assert rig.events.wait("/tasks/exit", container=session.id).message.exit_status == 137
    session.delete()


def test_the_shim_dies_and_delete_cleans_up(rig: Rig) -> None:
    session = rig.container(["sleep", "1000"])
    session.create()
    pid = session.start()
    session.kill_shim()
    assert session.cleanup().exit_status == 137
    # This example does not know what its dead shim had made.
    os.kill(pid, signal.SIGKILL)
    remove_socket(session.started.address)


def test_under_containerd(containerd: Containerd, binary: str) -> None:
    """ctr run of a plain process, which sees the host's files."""
    words = ("run", "--rm", "--runtime", binary, "--rootfs", "/", "skeleton-plain", "/bin/sh", "-c", "echo $0 here; exit 5")
    done = containerd.ctr(*words, check=False)
    assert (done.returncode, done.stdout) == (5, "/bin/sh here\n"), done.stderr
    assert containerd.tasks() == {}
