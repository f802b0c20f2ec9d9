"""Trials A4, A6, A7, A13: exits lost, late, misordered, doubled."""

from __future__ import annotations

import os
import time

import pytest

from shimcore.errors import FailedPrecondition, NotFound, ShimError
from tests.faults import FULL, Lab, scale


def test_A4_init_and_exec_exit_together(lab: Lab) -> None:
    gate = None
    for number in range(scale(60, 10000)):
        gate = lab.runtime.gate(f"a4-{number}")
        box = lab.box(f"a4-{number}", gate.args(3))
        box.exec("e", gate.args(4))
        gate.open()
        assert box.status() == 3
        assert box.told().message.exit_status == 3
        gate.close()
        assert box.exits() == [("e", 4), ("", 3)]
        assert box.delete() == 3
        assert [event.topic for event in box.events][-2] == "/tasks/exit"


def test_A4_an_exec_in_flight_ends_before_init(lab: Lab) -> None:
    for number in range(scale(5, 200)):
        box = lab.box(f"a4f-{number}")
        box.task.exec("e", box.process(["@exit", "4"]))
        lab.runtime.rule("exec", "made dead", "end hold", id=box.id)
        from tests.faults import Later

        start = Later(lambda: box.task.start("e"))
        with lab.runtime.wait("exec", "end", id=box.id):
            os.kill(box.pid, 9)
            state = box.task.state()
            assert state.status == 2
        start.result()
        box.told()
        assert box.exits() == [("e", 4), ("", 137)]
