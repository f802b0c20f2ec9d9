"""What an upgrade in place hands over, piece by piece, and what it refuses to."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shimcore.cli import nodes
from shimcore.cli.nodes import NoAnswer
from shimcore.rig import FakeRuntime, Rig
from shimcore.rig.events import DOWN, FROZEN, MUTE, SLOW, UP
from shimcore.rig.session import Session
from shimcore.state import CREATED, PAUSED, RUNNING, STOPPED
from tests.authors import TASK, Make, author
from tests.test_oci_binlog import LOGGER, script
from tests.test_oci_sandbox import Shim as Sandbox
from tests.trials.test_f import HOG, limited, memory_folder
from tests.upgrades import HANG, Copy, Later, command, copy, exits, rig, told, until, upgrade

__all__ = ["author", "copy", "rig"]


def running(rig: Rig, *args: str, **options: object) -> Session:
    one = rig.container(args or ("sleep", "1000"), **options)  # type: ignore[arg-type]
    one.create()
    one.start()
    return one


def end(one: Session) -> None:
    one.task.kill(signal.SIGKILL)
    assert one.wait(timeout=HANG) == 137
    one.delete()


# --- stdio


def test_stdin_and_its_end(rig: Rig, copy: Copy) -> None:
    one = running(rig, "cat", stdin=True)
    one.stdio.write(b"before\n")
    until("output", lambda: one.output == "before\n")
    upgrade(one)
    one.stdio.write(b"after\n")
    one.close_stdin()
    assert one.wait(timeout=HANG) == 0
    assert one.stdio.drain(HANG) and one.output == "before\nafter\n"
    one.delete()


def test_a_terminal(rig: Rig, copy: Copy) -> None:
    one = running(rig, "sh", "-c", "while read x; do stty size; echo got $x; done", stdin=True, terminal=True)
    one.task.resize_pty(100, 40)
    one.stdio.write(b"one\n")
    until("an answer", lambda: "got one" in one.output)
    upgrade(one)
    one.task.resize_pty(120, 50)
    one.stdio.write(b"two\n")
    until("an answer", lambda: "got two" in one.output)
    assert "40 100" in one.output and "50 120" in one.output
    # It ends by the terminal's own end of file.
    one.stdio.write(b"\x04")
    assert one.wait(timeout=HANG) == 0
    one.delete()
    assert one.stdio.drain(HANG)


def test_a_terminals_output_that_nobody_has_read(rig: Rig, copy: Copy) -> None:
    """More than the FIFO holds: the rest is in the shim, and in the terminal."""
    one = running(rig, "sh", "-c", "i=0; while [ $i -lt 40000 ]; do echo $i; i=$((i+1)); done", terminal=True, read=False)
    fifo = os.open(one.stdio.stdout, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        time_of_rest = until("a full FIFO", lambda: _full(fifo))
        assert time_of_rest
        for _ in range(2):
            upgrade(one)
        one.stdio.open_readers()
        assert one.wait(timeout=HANG) == 0
        one.delete()
    finally:
        os.close(fifo)
    assert one.stdio.drain(HANG)
    assert one.output.split() == [str(number) for number in range(40000)]


def _full(fifo: int) -> bool:
    """Nothing has been added for a moment, and there is something."""
    from fcntl import ioctl

    def held() -> int:
        return int.from_bytes(ioctl(fifo, 0x541B, b"\0\0\0\0"), "little")

    before = held()
    time.sleep(0.1)
    return before > 0 and held() == before


def test_output_without_a_reader_is_dropped_on(rig: Rig, copy: Copy) -> None:
    one = running(
        rig, "sh", "-c", "i=0; while [ $i -lt 60000 ]; do echo line $i; i=$((i+1)); done; exit 6",
        read=False, annotations={"io.shimcore.stdio": "drop,after=0.2"},
    )  # fmt: skip
    fifo = os.open(one.stdio.stdout, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(fifo)
    upgrade(one)
    assert one.wait(timeout=HANG) == 6
    one.delete()


def test_a_logging_binary(rig: Rig, copy: Copy, tmp_path: Path) -> None:
    one = rig.container(["sh", "-c", "i=0; while [ $i -lt 300 ]; do echo $i; sleep 0.01; i=$((i+1)); done"])
    one.stdio.stdout = one.stdio.stderr = script(tmp_path, LOGGER)
    one.create()
    one.start()
    upgrade(one)
    assert one.wait(timeout=HANG) == 0
    one.delete()  # waits for the logger
    assert (tmp_path / "ended").exists()
    assert (tmp_path / "stdout").read_text().split() == [str(number) for number in range(300)]


# --- the life of containers


def test_the_containers_of_a_pod(rig: Rig, copy: Copy) -> None:
    group = {"io.kubernetes.cri.sandbox-id": "pod"}
    pause = running(rig, "sleep", "1000", annotations=group)
    other = running(rig, "sleep", "1000", annotations=group)
    assert pause.shim_pid == other.shim_pid
    upgrade(pause)
    third = running(rig, "sh", "-c", "exit 3", annotations=group)
    assert third.shim_pid == pause.shim_pid and third.wait(timeout=HANG) == 3
    third.delete()
    end(other)
    assert pause.task.state().status == RUNNING
    end(pause)


def test_created_and_paused_and_stopped(rig: Rig, copy: Copy) -> None:
    one = rig.container(["sleep", "1000"])
    one.create()
    upgrade(one)
    assert one.task.state().status == CREATED
    one.start()
    one.task.pause()
    upgrade(one)
    assert one.task.state().status == PAUSED
    one.task.resume()
    assert one.task.state().status == RUNNING
    one.task.kill(signal.SIGKILL)
    until("its exit", lambda: one.task.state().status == STOPPED)
    stopped = one.task.state()
    upgrade(one)
    assert one.task.state() == stopped and one.wait() == 137
    assert one.delete().exit_status == 137
    assert exits(one) == [(one.id, 137)]


def test_an_oom_kill_is_told_before_its_exit(rig: Rig, copy: Copy) -> None:
    if memory_folder() is None:
        pytest.skip("no memory controller here")
    one = limited(rig, "sleep", "1000")
    upgrade(one)
    other = one.exec(["sh", "-c", f"{HOG}; exit $?"])
    assert other.wait(timeout=HANG) != 0
    one.task.kill(signal.SIGKILL)
    one.wait(timeout=HANG)
    rig.events.wait("/tasks/exit", container=one.id)
    topics = rig.events.topics(one.id)
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit"), topics
    one.delete()


def test_nothing_is_left_open_by_one_upgrade_after_another(rig: Rig, copy: Copy) -> None:
    one = running(rig)
    kept = one.exec(["sh", "-c", "ulimit -n; exec sleep 1000"])
    upgrade(one)
    first = sorted(os.listdir(f"/proc/{one.shim_pid}/fd"))
    threads = until("its threads", lambda: len(os.listdir(f"/proc/{one.shim_pid}/task")))
    for _ in range(4):
        upgrade(one)
    # A file that is just being read may be open besides.
    until("no fd more", lambda: len(os.listdir(f"/proc/{one.shim_pid}/fd")) <= len(first))
    assert len(os.listdir(f"/proc/{one.shim_pid}/task")) <= threads + 1
    # What children are given is what the first daemon had been given.
    again = one.exec(["sh", "-c", "ulimit -n"])
    again.wait(timeout=HANG)
    again.stdio.drain()
    assert again.stdio.output() == kept.stdio.output() != b""
    blocked = Path(f"/proc/{one.shim_pid}/status").read_text().split("SigBlk:")[1].split()[0]
    assert int(blocked, 16) == 0
    end(one)


def test_a_sigterm_between_old_and_new_is_heard(rig: Rig, copy: Copy) -> None:
    """It ends the shim once no process is alive, as at any time."""
    one = running(rig)
    shim = os.pidfd_open(one.shim_pid)
    copy.in_the_window("import signal; os.kill(os.getpid(), signal.SIGTERM)")
    upgrade(one)
    assert one.task.state().status == RUNNING
    one.task.kill(signal.SIGKILL)
    assert select.select([shim], [], [], HANG)[0], "the shim has not ended"
    os.close(shim)
    until("its exit", lambda: exits(one) == [(one.id, 137)])
    one.cleanup()


# --- events


@pytest.mark.parametrize("away", [FROZEN, MUTE, SLOW])
def test_events_that_containerd_has_not_taken_are_sent_once(rig: Rig, copy: Copy, away: str) -> None:
    one = running(rig)
    rig.events.set_mode(away, delay=0.2)
    others = [one.exec(["sh", "-c", f"exit {number}"]) for number in range(5)]
    assert [other.wait(timeout=HANG) for other in others] == list(range(5))
    upgrade(one)
    last = one.exec(["sh", "-c", "exit 9"])
    assert last.wait(timeout=HANG) == 9
    upgrade(one)
    rig.events.set_mode(UP)
    if away == MUTE:  # nobody will answer what it has read: as at any time, it is sent again once the connection has gone
        rig.events.set_mode(DOWN)
        rig.events.set_mode(UP)
    until("exits", lambda: {id for id, _ in exits(one)} == {last.id, *(other.id for other in others)})
    if away != MUTE:
        assert exits(one) == [(other.id, number) for number, other in enumerate(others)] + [(last.id, 9)]
        assert len(rig.events.topics(one.id)) == 2 + 3 * 6
        assert {event.connection for event in one.events} == {1}
    for other in [*others, last]:
        topics = [event.topic for event in one.events if event.process == other.id]
        assert list(dict.fromkeys(topics)) == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    end(one)


# --- refusals


def test_a_call_under_way_is_waited_for_and_named(copy: Copy, rootfs: Path, session_root: Path) -> None:
    with (
        FakeRuntime(session_root / f"r{os.urandom(3).hex()}") as runtime,
        Rig(copy.binary, rootfs=rootfs, runtime=str(runtime.binary), env=runtime.environment) as rig,
    ):
        one = running(rig, "@sleep")
        runtime.rule("exec", "begin hold", id=one.id)
        other = one.exec(["@exit", "5"], start=False)
        start = Later(lambda: other.start(timeout=HANG))
        with runtime.wait("exec", "begin"):
            began = time.monotonic()
            with pytest.raises(NoAnswer, match=r"does not come to rest within 1 s: calls are under way: .*/Start"):
                upgrade(one, timeout=1.0)
            # Meanwhile nobody waits for long: containerd gives State 2 s.
            assert one.task.state(timeout=HANG).status == RUNNING
            assert time.monotonic() - began < HANG
            done = Later(lambda: upgrade(one, timeout=HANG))
        assert start.get() > 0
        assert done.get()["pid"] == one.shim_pid
        assert other.wait(timeout=HANG) == 5
        runtime.forget("exec", id=one.id)
        end(one)


def test_a_pods_sandbox_is_refused(rig: Rig) -> None:
    sandbox = Sandbox(rig)
    sandbox.create()
    sandbox.call("StartSandbox")
    pid = sandbox.client.peer_credentials()[0]
    done = command(str(pid))
    assert done.returncode == 1 and "this shim is a pod's sandbox" in done.stderr
    sandbox.call("PingSandbox")
    sandbox.call("ShutdownSandbox")


def test_a_service_derived_from_ours_with_something_of_its_own_is_refused(author: Make) -> None:
    shim = author("""
        from shimcore.oci.service import RuncTask
        from shimcore.oci.shim import RuncShim

        class Mine(RuncTask):
            def __init__(self, publisher, exit):
                super().__init__(publisher, exit)
                self.mine = {}

        class Author(RuncShim):
            def task_class(self):
                return Mine
    """)
    address = shim.start()
    pid = shim.pid(address)
    done = command(str(pid))
    assert done.returncode == 1 and "Mine has an __init__ of its own, and no hand_over() and take_over()" in done.stderr
    shim.stop(address)


HANDS_OVER = """
    from shimcore import _reaper
    went_on = []

    class Mine(Service):
        native = True
        def __init__(self, shim):
            super().__init__(shim)
            self.names, self.file = {}, -1
        def begin(self, core):
            slot = core.open("c1")
            read, self.file = os.pipe()
            pid, fd = _reaper.spawn(["/bin/sh", "-c", "read x; exit 6"], fds={0: read}, new_session=True)
            os.close(fd)
            os.close(read)
            slot.bind(pid)
            slot.announce()
            self.names["c1"] = b"\\xff"
            return pid
        def hand_over(self, trial):
            return {"names": self.names, "file": self.file, "fds": [self.file]}
        def take_over(self, state):
            self.names, self.file = state["names"], state["file"]
        def go_on(self):
            went_on.append([slot.pid for slot in self.core.slots()])

    class Author(Author):
        def create_task_service(self, publisher):
            self.publisher = publisher
            self.core = publisher.core
            self.task = Mine(self)
            self.task.core = publisher.core
            return self.task
"""


def test_an_authors_own_service(author: Make) -> None:
    from shimcore.protos import task_pb2
    from shimcore.ttrpc import Client

    shim = author(HANDS_OVER)
    address = shim.start()
    pid = shim.look(address, "shim.task.begin(shim.core)")
    daemon = shim.pid(address)
    with Client(address) as client:
        wait = Later(
            lambda: client.call(TASK, "Wait", task_pb2.WaitRequest(id="c1"), task_pb2.WaitResponse, timeout=HANG).exit_status
        )
        done = command(str(daemon))
        assert done.returncode == 0, done.stderr
        assert shim.look(address, "went_on, shim.task.names") == ([[pid]], {"c1": b"\xff"})
        shim.look(address, "os.write(shim.task.file, b'x\\n')")
        assert wait.get() == 6
    shim.look(address, "shim.core.find('c1').forget()")
    shim.stop(address)
    Path(address.removeprefix("unix://") + ".events").unlink()  # its exit, which here nobody takes


def test_a_daemon_of_the_template(copy: Copy, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was a fork is a process of its own from then on."""
    from shimcore.install import install

    monkeypatch.setenv("SHIMCORE_TEMPLATE", "1")
    monkeypatch.setenv("SHIMCORE_TEMPLATE_DIR", str(tmp_path / "t"))
    monkeypatch.setenv("SHIMCORE_TEMPLATE_IDLE", "5")
    (tmp_path / "t").mkdir(mode=0o700)
    binary = install(str(tmp_path / "bin"))
    with Rig(binary, rootfs=rootfs) as rig:
        for _ in range(2):  # the first one starts the template
            one = running(rig)
            before = Path(f"/proc/{one.shim_pid}/cmdline").read_bytes()
            upgrade(one, to=binary)  # the launcher, which must not ask the template
            assert Path(f"/proc/{one.shim_pid}/cmdline").read_bytes() == before
            assert one.exec(["sh", "-c", "exit 4"]).wait(timeout=HANG) == 4
            end(one)


# --- what the shim tells of itself


def has_told(one: Session, exits: int) -> dict[str, Any] | None:
    found = told(one)
    return found if found["core"]["told"] == exits and not found["core"]["in_flight"] else None


def test_counters_and_the_last_events_and_lines_go_on(rig: Rig, copy: Copy) -> None:
    one = running(rig)
    assert one.exec(["sh", "-c", "exit 1"]).wait(timeout=HANG) == 1
    before = until("an exit", lambda: has_told(one, 1))
    upgrade(one)
    assert one.exec(["sh", "-c", "exit 2"]).wait(timeout=HANG) == 2
    after = until("an exit", lambda: has_told(one, 2))
    assert after["core"]["events"] == before["core"]["events"] + 3 and after["core"]["connections"] == 1
    assert after["started"] == before["started"] and after["shimcore"] == before["shimcore"]
    shim = nodes.Shim(one.shim_pid, "shim", "", "", "", debug=one.started.address.removeprefix("unix://") + ".debug")
    numbers = [json.loads(line)["number"] for line in nodes.ask(shim, "/events").splitlines()]
    assert numbers == list(range(1, 9))
    lines = nodes.ask(shim, "/log").decode().splitlines()
    assert [line for line in lines if "serving" in line][1:] and 'msg="upgraded"' in "\n".join(lines)
    end(one)


def test_who_follows_its_events_misses_none(rig: Rig, copy: Copy) -> None:
    one = running(rig)
    words = [sys.executable, "-m", "shimcore.cli", "events", one.id, "--past", "--json", "--count", "11"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        first = follower.stdout.readline()  # it follows
        for number in range(3):
            assert one.exec(["sh", "-c", "exit 1"]).wait(timeout=HANG) == 1
            if number < 2:
                upgrade(one)
        rest = Later(follower.stdout.read).get()
    assert follower.returncode == 0
    assert [json.loads(line)["number"] for line in [first, *rest.splitlines()]] == list(range(1, 12))
    end(one)


def test_the_trial_is_no_shim_to_others(rig: Rig, copy: Copy, tmp_path: Path) -> None:
    one = running(rig)
    os.mkfifo(tmp_path / "gate")
    copy.edit("upgrade.py", lambda text: text + f"\nif 'try' in os.environ.get(VARIABLE, ''): open({str(tmp_path / 'gate')!r})\n")
    done = Later(lambda: upgrade(one, timeout=HANG))
    with open(tmp_path / "gate", "w"):  # opens when the trial is there
        assert [found.pid for found in nodes.shims(rig.namespace)] == [one.shim_pid]
    assert done.get()["pid"] == one.shim_pid
    end(one)
