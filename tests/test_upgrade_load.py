"""Upgrades in place while clients call as fast as they can: no call fails, and each exit is told once, in its place."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from itertools import count

from shimcore.errors import NotFound
from shimcore.rig import Rig
from shimcore.rig.bundle import process
from shimcore.rig.session import Session
from shimcore.rig.task import Task
from shimcore.ttrpc import Client
from tests.upgrades import HANG, Copy, Later, copy, exits, parent, rig, told, until, upgrade

__all__ = ["copy", "rig"]

UPGRADES = 6
WRITER = "i=0; while :; do echo $i; i=$((i+1)); done"


class Load:
    """Clients of one container, each on a thread and a connection of its own. codes: exec id to the status that it must have."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.over = threading.Event()
        self.codes: dict[str, int] = {}
        self.calls = Counter[str]()
        self.failures: list[BaseException] = []
        works = [self.execs, self.execs, self.killed, self.states, self.connects]
        self.threads = [threading.Thread(target=self._run, args=(work, number)) for number, work in enumerate(works)]
        for thread in self.threads:
            thread.start()

    def _run(self, work: object, number: int) -> None:
        try:
            with Client(self.session.started.address) as client:
                work(Task(client, self.session.id, timeout=HANG), number)  # type: ignore[operator]
        except BaseException as error:
            self.failures.append(error)

    def go_on(self) -> None:
        """Until calls of each kind have come to their end."""
        before = self.calls.copy()
        until("calls", lambda: self.failures or all(self.calls[kind] > before[kind] for kind in ("round", "state", "connect")))

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(HANG)
        assert not self.failures, self.failures

    def _round(self, task: Task, id: str, code: int, args: list[str], kill: int = 0) -> None:
        self.codes[id] = code
        task.exec(id, process(args))
        pid = task.start(id)
        if kill:
            assert parent(pid) == self.session.shim_pid
            task.kill(kill, exec_id=id)
        assert task.wait(id).exit_status == code
        assert task.state(id).exit_status == code
        assert task.delete(id).exit_status == code
        self.calls["round"] += 1

    def execs(self, task: Task, number: int) -> None:
        for turn in count():
            if self.over.is_set():
                return
            code = turn % 200
            self._round(task, f"e{number}-{turn}", code, ["sh", "-c", f"exit {code}"])

    def killed(self, task: Task, number: int) -> None:
        for turn in count():
            if self.over.is_set():
                return
            self._round(task, f"k{number}-{turn}", 137, ["sleep", "1000"], signal.SIGKILL)

    def states(self, task: Task, number: int) -> None:
        first = task.state()
        while not self.over.is_set():
            assert task.state() == first
            assert task.pids()
            try:
                task.kill(0, exec_id="nobody")
            except NotFound:
                self.calls["state"] += 1

    def connects(self, task: Task, number: int) -> None:
        while not self.over.is_set():
            with Client(self.session.started.address) as client:
                assert Task(client, self.session.id, timeout=HANG).connect().shim_pid == self.session.shim_pid
                self.calls["connect"] += 1


def test_no_call_fails_and_each_exit_is_told_once(rig: Rig, copy: Copy) -> None:
    one = rig.container(["sh", "-c", WRITER])
    one.create()
    one.start()
    wait = Later(lambda: one.task.wait(timeout=HANG))
    load = Load(one)
    try:
        load.go_on()
        for _ in range(UPGRADES):
            version = copy.change()
            assert upgrade(one, timeout=HANG)["to"] == version
            assert told(one)["shimcore"] == version
            load.go_on()
    finally:
        load.stop()
    assert parent(one.pid) == one.shim_pid
    one.task.kill(signal.SIGKILL)
    assert wait.get().exit_status == 137
    one.stdio.drain(HANG)
    lines = one.output.split("\n")
    assert lines[:-1] == [str(number) for number in range(len(lines) - 1)]
    until("exits", lambda: len(exits(one)) >= len(load.codes) + 1)
    assert sorted(exits(one)) == sorted([*load.codes.items(), (one.id, 137)])
    assert exits(one)[-1] == (one.id, 137)
    steps = ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    seen: dict[str, list[str]] = {}
    for event in one.events:
        seen.setdefault(event.process, []).append(event.topic)
    assert seen.pop("") == ["/tasks/create", "/tasks/start", "/tasks/exit"]
    assert seen == dict.fromkeys(load.codes, steps)
    one.delete()
