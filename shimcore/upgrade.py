"""Upgrade in place: a daemon that runs goes on with new code, as the same process, by executing itself (docs/upgrade.md).

Three steps, of which the first two may fail and then have changed nothing. The new code is tried: a child runs it as it will be
run, with a copy of what there is to be taken over, and says that it understands. Then everything comes to rest: no request is
read, no call is under way, no runtime runs, the exit thread has left its loop. Then what there is is written into a memory file,
and the leader executes the new code, which takes the file up.

The kernel keeps the rest: pid, children and their zombies, subreaper, working directory, and the fds that are not closed. The
leader executes, since a child is its thread's: those of other threads would be given away, and those that are to die with their
thread would.

All of this is imported when somebody asks for it, by the ttrpc service below, on the shim's own socket.
"""

from __future__ import annotations

import os
import sys
import time

from . import _reaper, jobs, logger
from .daemon import SOCKET_FD, command
from .errors import FailedPrecondition, InvalidArgument, ShimError
from .util import json_dumps, json_loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import Any, NoReturn

    from ._ttrpc import Context
    from .bootstrap import Config, Invocation
    from .serve import Life
    from .shim import Shim
    from .wire import Raw
else:
    import _signal  # the module signal wraps it in enums

VARIABLE = "SHIMCORE_UPGRADE"  # of the new code: the number of the file; "try N": only say whether it could be taken over
FORMAT = 1  # of the file. Newer code reads what is older; what it does not know it refuses
TIMEOUT = 10.0  # seconds for the new code to say that it is ready, and as many for everything to come to rest
HOLD = 1.0  # seconds that requests wait at most while it does: containerd allows State 2 s
PAUSE = 0.2  # between two of these
LOOK = 0.005
LEADER_TIMEOUT = 5.0

_READY = "ready: "
_TRIAL_FD = 3
_SIGINT, _SIGUSR1, _SIGPIPE, _SIGTERM = 2, 10, 13, 15


# --- JSON with bytes in it


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        from binascii import b2a_base64

        return {"base64": b2a_base64(value, newline=False).decode()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and "base64" in value:
            from binascii import a2b_base64

            return a2b_base64(value["base64"])
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _write(state: dict[str, Any]) -> int:
    """A memory file with it, at its start. Raises FailedPrecondition when there is in it what JSON has not."""
    try:
        view = memoryview(json_dumps(_plain(state)).encode())
    except TypeError as error:
        raise FailedPrecondition(f"the task service's hand_over() has returned what JSON can't hold: {error}") from None
    fd = os.memfd_create("upgrade", os.MFD_CLOEXEC)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _read(fd: int) -> dict[str, Any]:
    with open(fd, "rb", buffering=0) as file:
        state = json_loads(file.readall())
    if not isinstance(state, dict) or not 1 <= state.get("format", 0) <= FORMAT:
        raise FailedPrecondition(f"the running shim hands over in a form that this shimcore does not know: it knows {FORMAT}")
    whole: dict[str, Any] = _whole(state)
    return whole


# --- in the daemon that runs


async def upgrade(life: Life, request: Raw, context: Context) -> Raw:
    """The service's one method. The request is JSON: `to`, the path of a shim's executable ("": what this one was started by),
    and `timeout` in seconds. The new code answers it; here it can only fail."""
    wish = json_loads(request.data) if request.data else {}
    to, timeout = wish.get("to", ""), float(wish.get("timeout", TIMEOUT))
    if to and not to.startswith("/"):
        raise InvalidArgument(f"{to!r} is not an absolute path")
    if life.upgrading:
        raise FailedPrecondition("an upgrade is under way")
    life.upgrading = True
    try:
        argv = [*([to] if to else command()), *sys.argv[1:]]
        began = time.monotonic()
        version = await _try(argv, _collect(life, None), timeout)
        logger.info("upgrade", to=version, command=argv[0])
        return await _hand_over(life, argv, context, began, timeout)
    finally:
        life.upgrading = False


def _collect(life: Life, context: Context | None) -> dict[str, Any]:
    """All that is to be taken over; without a context for a trial, in which nothing need be at rest. Raises what hand_over()
    raises."""
    from . import __version__

    trial = context is None
    debug = life.debug
    task = debug.task.hand_over(trial)
    core = debug.core.save(not trial)
    clients = [] if trial else debug.server.save()
    fds = [*core["fds"], *task.get("fds", ()), *(client["fd"] for client in clients)]
    return {
        "format": FORMAT,
        "from": __version__,
        "bundle": debug.bundle,
        "core": core,
        "task": task,
        "clients": clients,
        "debug_fd": debug.fd,
        "started": debug.started,
        "log": [] if trial else logger.get_logger().lines(0),
        "terminate": bool(life.asked),
        "nofile": list(_reaper.nofile_before()),
        "answer": None if context is None else list(context.place),
        "fds": [*fds, *([debug.fd] if debug.fd >= 0 else [])],
    }


async def _try(command: list[str], state: dict[str, Any], timeout: float) -> str:
    """The version that the new code says it is. Raises FailedPrecondition with what is wrong with it."""
    fd = _write(state)
    try:
        environment = {**os.environ, VARIABLE: f"try {_TRIAL_FD}"}
        result = await jobs.run_job(command, timeout=timeout, env=environment, fds={_TRIAL_FD: fd})
    except OSError as error:
        raise FailedPrecondition(f"the new code can't be started: {command[0]}: {error.strerror}") from None
    finally:
        os.close(fd)
    lines = [line.strip() for line in result.output.decode("utf-8", "replace").splitlines() if line.strip()]
    if result.timed_out:
        raise FailedPrecondition(f"the new code is refused: it was not ready within {timeout:g} s")
    if result.status != 0 or not lines or not lines[-1].startswith(_READY):
        words = lines[-1] if lines else "not a word"
        raise FailedPrecondition(f"the new code is refused: it ended with status {result.status}: {words}")
    return lines[-1].removeprefix(_READY)


def _busy(life: Life, context: Context) -> str | None:
    """What there still is to be waited for."""
    debug = life.debug
    calls = sorted({name for *place, name in debug.server.under_way() if tuple(place) != context.place})
    if calls:
        return f"calls are under way: {', '.join(calls)}"
    if not debug.core.pool.idle:
        return "a thread of the pool is at work"
    return debug.core.busy() or life.shim._unfinished()


async def _hand_over(life: Life, command: list[str], context: Context, began: float, timeout: float) -> NoReturn:
    """Raises FailedPrecondition when there is no rest to be had, or the new code can't be executed."""
    server = life.debug.server
    deadline = time.monotonic() + timeout
    while True:
        until = time.monotonic() + HOLD
        server.hold(True)
        try:
            while time.monotonic() < until:
                why = _busy(life, context) or _go(life, command, context, began)
                await jobs.sleep(LOOK)
        finally:
            server.hold(False)
        if time.monotonic() > deadline:
            raise FailedPrecondition(f"the shim does not come to rest within {timeout:g} s: {why}")
        await jobs.sleep(PAUSE)


def _go(life: Life, command: list[str], context: Context, began: float) -> str:
    """Execute the new code. Returns what was under way again when everything had stopped. Raises FailedPrecondition."""
    if life.shim.exit.is_set() or not life.lock.acquire(blocking=False):
        raise FailedPrecondition("the shim is about to end")
    core, server = life.debug.core, life.debug.server
    stopped = False
    while not life.leader_says.empty():
        life.leader_says.get()
    try:
        core.pause(True)
        life.leader_says.get(timeout=LEADER_TIMEOUT)
        server.catch_up()
        why = _busy(life, context)
        if why is not None or server.catch_up() or life.shim.exit.is_set():
            life.leader_does.put(_nothing)
            return why or "something came meanwhile"
        stopped = True
        return _execute(life, command, context, began)
    except BaseException:
        if not stopped:
            life.leader_does.put(_nothing)
        raise
    finally:
        life.lock.release()


def _nothing() -> None:
    pass


def _execute(life: Life, command: list[str], context: Context, began: float) -> NoReturn:
    """Everything has stopped, and goes on again if this raises FailedPrecondition."""
    task = life.debug.task
    fds: list[int] = []
    error: BaseException | None = None
    try:
        state = _collect(life, context)
        state["began"] = began
        fds = [*state["fds"], _write(state)]
    except BaseException as failed:
        error = failed
        life.leader_does.put(_nothing)
    else:
        life.leader_does.put(lambda: _exec(command, fds))
        error = life.leader_says.get()
        os.close(fds[-1])
    task.go_on()
    if isinstance(error, ShimError):  # what there is can't be handed over
        raise error
    raise FailedPrecondition(f"the new code can't be executed: {error}") from None


def _exec(command: list[str], fds: list[int]) -> NoReturn:
    """By the leader. Raises OSError: then all is as before. The last fd is the state's."""
    # Who sends one meanwhile is heard by the new code.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_SIGINT, _SIGUSR1, _SIGPIPE, _SIGTERM))
    try:
        for fd in (SOCKET_FD, *fds):
            os.set_inheritable(fd, True)
        os.execve(command[0], command, {**os.environ, VARIABLE: str(fds[-1])})
    finally:
        for fd in (SOCKET_FD, *fds):
            os.set_inheritable(fd, False)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


# --- in the new code


def rehearse(cls: type[Shim], runtime_id: str, config: Config, invocation: Invocation, fd: int) -> bytes:
    """Say whether it could all be taken over, without a trace: what the old one's fds stand for is not there."""
    from . import __version__, serve
    from .publisher import RemotePublisher, new_core
    from .template import import_all

    state = _read(fd)
    import_all()
    cls.preload()
    core = new_core(invocation.flags.namespace, invocation.ttrpc_address)
    core.restore(state["core"])
    shim = cls(runtime_id, invocation.flags, config)
    publisher = RemotePublisher(core, invocation.flags.namespace)
    task = shim._make_task(publisher)
    task.take_over(state["task"])
    serve.new_server(core, shim, task, publisher)
    return f"{_READY}{__version__}\n".encode()


def inherit(fd: int) -> dict[str, Any]:
    """What the old code has left for us."""
    state = _read(fd)
    for kept in (SOCKET_FD, *state["fds"]):
        os.set_inheritable(kept, False)
    _reaper.nofile_before(tuple(state["nofile"]))
    _reaper.early_signals()
    return state


def restore(life: Life, state: dict[str, Any]) -> None:
    """Take it up: before anybody reads the mailbox, and before children are waited for."""
    debug = life.debug
    debug.task.take_over(state["task"])
    for slot in debug.core.slots():
        if debug.core.teardown_timeout > 0:
            slot.set_teardown(debug.core.teardown_timeout)
    debug.server.adopt(state["clients"])
    debug.core.resume(state["core"])
    debug.task.go_on()
    debug.started = state.get("started", debug.started)
    if state.get("log"):
        logger.get_logger().count, logger.get_logger().recent = state["log"]
    if state["terminate"]:
        life.asked.append(_SIGTERM)


def answer(life: Life, state: dict[str, Any]) -> None:
    """To whoever asked for it."""
    from . import __version__

    told = {"pid": os.getpid(), "from": state["from"], "to": __version__, "seconds": time.monotonic() - state["began"]}
    logger.info("upgraded", **{name: value for name, value in told.items() if name != "pid"})
    if state["answer"] is not None:
        fd, stream = state["answer"]
        life.debug.server.answer(fd, stream, json_dumps(told).encode())
