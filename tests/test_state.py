"""state.py: the table against the rules that it is made from, cell by cell."""

from __future__ import annotations

import itertools

import pytest

from shimcore import state as s
from shimcore.errors import FailedPrecondition, NotFound, ShimError
from shimcore.protos import task_pb2

STATES = (s.CREATED, s.RUNNING, s.STOPPED, s.PAUSED, s.PAUSING)
OPERATIONS = sorted(set(s.TABLE[s.INIT]) | set(s.TABLE[s.EXEC]))

CASES = list(itertools.product((s.INIT, s.EXEC), OPERATIONS))

# One column per state: created running stopped paused pausing. A digit is the state after, "." FailedPrecondition,
# "!" NotFound. Written from the contract, not from the table.
INIT = {
    s.START: "2....",
    s.DELETE: "6.6..",
    s.KILL: "12!45",
    s.KILL_ALL: "12345",
    s.PAUSE: ".5...",
    s.FROZEN: "....4",
    s.PAUSE_FAILED: "....2",
    s.RESUME: "...2.",
    s.CHECKPOINT: ".2.4.",
    s.UPDATE: "12.45",
    s.ADD_EXEC: "12...",
    s.RESIZE: "12.45",
    s.CLOSE_IO: "12345",
    s.EXITED: "33.33",
    s.STATE: "12345",
    s.WAIT: "12345",
    s.PIDS: "12345",
    s.STATS: "12345",
}
EXEC = {
    s.START: "2....",
    s.DELETE: "6.6..",
    s.KILL: ".2!..",
    s.KILL_ALL: ".2!..",
    s.RESIZE: "12...",
    s.CLOSE_IO: "123..",
    s.EXITED: "33...",
    s.STATE: "123..",
    s.WAIT: "123..",
}


def outcome(kind: str, state: int, operation: str) -> str:
    try:
        return str(s.after(kind, state, operation))
    except NotFound:
        return "!"
    except FailedPrecondition:
        return "."


@pytest.mark.parametrize(("kind", "operation"), CASES)
def test_every_cell(kind: str, operation: str) -> None:
    wanted = (INIT if kind == s.INIT else EXEC).get(operation, ".....")
    assert "".join(outcome(kind, state, operation) for state in STATES) == wanted
    for state, cell in zip(STATES, wanted, strict=True):
        assert s.legal(kind, state, operation) is cell.isdigit()
        if cell.isdigit():
            s.check(kind, state, operation)
        else:
            with pytest.raises(ShimError):
                s.check(kind, state, operation)


@pytest.mark.parametrize(("kind", "operation"), CASES)
def test_what_is_deleted_is_not_found(kind: str, operation: str) -> None:
    for state in (s.DELETED, s.UNKNOWN):
        with pytest.raises(NotFound):
            s.after(kind, state, operation)


@pytest.mark.parametrize(
    ("kind", "state", "operation", "text"),
    [
        (s.INIT, s.RUNNING, s.DELETE, "cannot delete a running process"),
        (s.EXEC, s.RUNNING, s.DELETE, "cannot delete a running process"),
        (s.INIT, s.RUNNING, s.START, "cannot start a running process"),
        (s.INIT, s.CREATED, s.PAUSE, "cannot pause a created container"),
        (s.INIT, s.PAUSED, s.ADD_EXEC, "cannot exec in a paused container"),
        (s.EXEC, s.CREATED, s.KILL, "process has not been started"),
        (s.INIT, s.STOPPED, s.KILL, "process already finished: not found"),
        (s.EXEC, s.RUNNING, s.PAUSE, "cannot pause a running exec process"),
    ],
)
def test_words(kind: str, state: int, operation: str, text: str) -> None:
    assert str(s.refusal(kind, state, operation)) == text


def test_the_numbers_are_those_of_the_wire() -> None:
    field = task_pb2.StateResponse.DESCRIPTOR.fields_by_name["status"]
    wire = {value.name.lower(): value.number for value in field.enum_type.values}
    assert wire == {name: number for number, name in enumerate(s.STATE_NAMES[:6])}


@pytest.mark.parametrize("state", [s.CREATED, s.RUNNING, s.PAUSED, s.PAUSING])
def test_kill_of_the_dead_but_untold_is_not_found(state: int) -> None:
    s.check_kill(s.INIT, state, exited=False)
    with pytest.raises(NotFound):
        s.check_kill(s.INIT, state, exited=True)
    s.check_kill(s.INIT, state, exited=True, all=True)  # what it left behind
    with pytest.raises(NotFound):
        s.check_kill(s.EXEC, s.RUNNING, exited=True, all=True)


def test_kill_after_the_exit_was_told() -> None:
    with pytest.raises(NotFound):
        s.check_kill(s.INIT, s.STOPPED, exited=True)
    s.check_kill(s.INIT, s.STOPPED, exited=True, all=True)


def test_exec_start_needs_a_living_init() -> None:
    """Trial A5."""
    s.check_exec_start(s.CREATED, s.RUNNING, False)
    for init, exited in ((s.RUNNING, True), (s.STOPPED, True), (s.STOPPED, False), (s.PAUSED, False), (s.PAUSING, False)):
        with pytest.raises(FailedPrecondition):
            s.check_exec_start(s.CREATED, init, exited)
    with pytest.raises(FailedPrecondition, match="cannot start a running process"):
        s.check_exec_start(s.RUNNING, s.RUNNING, False)


def test_every_life_ends_in_deletion() -> None:
    """From wherever a life can get, DELETED can be reached, and there is no way on from it."""
    for table in s.TABLE.values():
        reach = {state: {t for row in table.values() for f, t in row.items() if f == state} for state in STATES}
        seen, todo = set(), [s.CREATED]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += reach.get(state, ())
        assert s.DELETED in seen
        assert all(f in STATES for row in table.values() for f in row)
