"""Which operation is legal in which state of a process, and what becomes of it.

Two kinds of process have a life: a container's init, and its execs. Theory of the table below:

* A row is an operation or an event, a column a state; a cell is the state after it. An empty cell is refused, with the error that
  `check` makes. Nothing else in the project decides legality, and nothing here does anything about it.
* Events are not refused by anybody: EXITED comes when the exit is *told*, not when the process dies. Between the two State says
  RUNNING, Delete refuses, and Kill says NotFound, because the process is gone (the exit table knows; see `check_kill`).
* STOPPED is final but for DELETE. DELETED is no state of a table's entry but the lack of one: every operation is NotFound.
* A task may be deleted in CREATED, when its start has failed or it was never started; never while it runs, since containerd
  removes the bundle then.
* PAUSING is PAUSED's waiting room: the freezer takes its time. A failed pause goes back by PAUSE_FAILED. A kill is legal in both,
  and takes effect on thaw; an exec is not, it could not run.
* Wrong codes hang clients. Kill of what has ended is NotFound: the client then waits for the exit. FailedPrecondition means done
  to it, so it is for what can't happen in this state at all: an exec without a pid yet, a second start.
* KILL_ALL is Kill with `all`: on a stopped init it is legal, for what its container may have left behind.
* Resize and CloseIO never depend on the state while the process has not ended: without a console they do nothing, and CloseIO may
  come any number of times.

Source: the states of containerd's runc shim (init_state.go, exec_state.go) and the rules of its clients.
"""

from __future__ import annotations

from .errors import FailedPrecondition, NotFound, ShimError

# containerd.v1.types.Status; DELETED is ours and never sent.
UNKNOWN, CREATED, RUNNING, STOPPED, PAUSED, PAUSING, DELETED = range(7)
STATE_NAMES = ("unknown", "created", "running", "stopped", "paused", "pausing", "deleted")

INIT, EXEC = "init", "exec"

# Operations, by the RPC's name.
START, DELETE, KILL, KILL_ALL = "start", "delete", "kill", "kill all"
PAUSE, RESUME, CHECKPOINT, UPDATE = "pause", "resume", "checkpoint", "update"
ADD_EXEC = "exec"
RESIZE, CLOSE_IO = "resize", "close io"
STATE, WAIT, PIDS, STATS = "state", "wait", "pids", "stats"
# Events.
EXITED, FROZEN, PAUSE_FAILED = "exited", "frozen", "pause failed"

_ASKS = (STATE, WAIT, PIDS, STATS)


def _same(*states: int) -> dict[int, int]:
    return {state: state for state in states}


_ANY = _same(CREATED, RUNNING, STOPPED, PAUSED, PAUSING)
_ALIVE = _same(CREATED, RUNNING, PAUSED, PAUSING)

TABLE: dict[str, dict[str, dict[int, int]]] = {
    INIT: {
        START: {CREATED: RUNNING},
        PAUSE: {RUNNING: PAUSING},
        FROZEN: {PAUSING: PAUSED},
        PAUSE_FAILED: {PAUSING: RUNNING},
        RESUME: {PAUSED: RUNNING},
        EXITED: {CREATED: STOPPED, RUNNING: STOPPED, PAUSED: STOPPED, PAUSING: STOPPED},
        DELETE: {CREATED: DELETED, STOPPED: DELETED},
        KILL: _ALIVE,
        KILL_ALL: _ANY,
        CHECKPOINT: _same(RUNNING, PAUSED),
        UPDATE: _ALIVE,
        ADD_EXEC: _same(CREATED, RUNNING),
        RESIZE: _ALIVE,
        CLOSE_IO: _ANY,
        **dict.fromkeys(_ASKS, _ANY),
    },
    EXEC: {
        START: {CREATED: RUNNING},
        EXITED: {CREATED: STOPPED, RUNNING: STOPPED},
        DELETE: {CREATED: DELETED, STOPPED: DELETED},
        KILL: _same(RUNNING),
        KILL_ALL: _same(RUNNING),
        RESIZE: _same(CREATED, RUNNING),
        CLOSE_IO: _same(CREATED, RUNNING, STOPPED),
        STATE: _same(CREATED, RUNNING, STOPPED),
        WAIT: _same(CREATED, RUNNING, STOPPED),
    },
}

_VERBS = {
    KILL_ALL: "kill", ADD_EXEC: "exec in", RESIZE: "resize", CLOSE_IO: "close the io of",
    STATE: "ask the state of", WAIT: "wait for", PIDS: "list the pids of", STATS: "take the stats of",
}  # fmt: skip


def after(kind: str, state: int, operation: str) -> int:
    """The state after an operation or event on a process of `kind` (INIT or EXEC). Raises as `check` does."""
    result = TABLE[kind].get(operation, {}).get(state)
    if result is None:
        raise refusal(kind, state, operation)
    return result


def legal(kind: str, state: int, operation: str) -> bool:
    """Whether `after` would not raise."""
    return state in TABLE[kind].get(operation, {})


def check(kind: str, state: int, operation: str) -> None:
    """Raise the error that the operation is refused with in this state: NotFound or FailedPrecondition, or
    nothing.
    """
    if not legal(kind, state, operation):
        raise refusal(kind, state, operation)


def refusal(kind: str, state: int, operation: str) -> ShimError:
    """The error for an empty cell of the table."""
    if state in (DELETED, UNKNOWN):
        return NotFound("process does not exist: not found")
    if operation in (KILL, KILL_ALL):
        if state == STOPPED:
            return NotFound("process already finished: not found")
        return FailedPrecondition("process has not been started")
    verb = _VERBS.get(operation, operation)
    # "cannot delete a running process" are the words that clients look for.
    thing = "process" if kind == EXEC or operation in (START, DELETE) else "container"
    if operation not in TABLE[kind]:
        thing = f"{kind} process"
    return FailedPrecondition(f"cannot {verb} a {STATE_NAMES[state]} {thing}")


def check_kill(kind: str, state: int, exited: bool, all: bool = False) -> None:
    """As check for Kill. exited: the process has died, told or not; then there is nothing to signal, whatever
    State says.
    """
    if exited and state in _ALIVE and not (all and kind == INIT):
        raise NotFound("process already finished: not found")
    check(kind, state, KILL_ALL if all else KILL)


def check_exec_start(state: int, init_state: int, init_exited: bool) -> None:
    """As check for Start of an exec, which can't be done once its container's init has exited, told or not,
    or is paused.
    """
    check(EXEC, state, START)
    if init_exited or init_state not in (CREATED, RUNNING):
        what = STOPPED if init_exited else init_state
        raise FailedPrecondition(f"cannot exec in a {STATE_NAMES[what]} container")
