"""The daemon's life, and `delete`'s: the two actions in which children are reaped."""

from __future__ import annotations

import os
from _thread import allocate_lock

from . import _reaper, logger, monitor
from .daemon import PRINTED, READY, READY_ENV, SOCKET_FD, start_thread
from .debug import Debug, no_crash, report, watch_for_crashes
from .errors import FailedPrecondition, Unavailable
from .jobs import Task as Coroutine
from .jobs import resume
from .publisher import RemotePublisher, new_core
from .shim import one_line, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from ._ttrpc import Server
    from .bootstrap import Config, Invocation
    from .shim import Shim
    from .task import Task

    class Ready(Protocol):
        def tell(self, words: bytes) -> None: ...
        def confirmed(self) -> None: ...


SHUTDOWN_TIMEOUT = 5.0  # seconds for calls in flight, and as many for events not acknowledged yet

_SIGUSR1 = 10
_SIGTERM = 15
_SIGNALS = {2: "SIGINT", 10: "SIGUSR1", 13: "SIGPIPE", 15: "SIGTERM"}


def _on_leader(core: _reaper.Core, work: Callable[[], Any], paused: Callable[[], object] = bool) -> Any:
    """Run `work` on another thread while this one, the leader, is the exit thread; return or raise as it does. paused: what the
    leader does when the core has been paused, before it goes on."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            core.stop()

    start_thread(body)
    while core.run():
        paused()
    if failure:
        raise failure[0]
    return outcome[0] if outcome else None


def _reap(core: _reaper.Core, config: Config) -> None:
    prepare(config)
    core.install_signals(not config.no_reaper)


def _log_signal(signum: int) -> None:
    logger.debug("signal", signal=_SIGNALS.get(signum, str(signum)))


def _alive(core: _reaper.Core) -> bool:
    return any(slot.phase in (_reaper.OPENED, _reaper.BOUND, _reaper.EXITED) for slot in core.slots())


def _tear_down(core: _reaper.Core, task: Task, slot: _reaper.Slot) -> None:
    from ._ttrpc import COROUTINE
    from .task import kind_of

    teardown = task._served("teardown")

    def done(_: Any, error: BaseException | None) -> None:
        if error is not None:
            logger.error("teardown failed", id=slot.container_id, exec_id=slot.exec_id, error=one_line(error))
        slot.teardown_done()

    def in_pool() -> None:
        try:
            teardown(slot)
        except BaseException as error:
            done(None, error)
        else:
            done(None, None)

    if kind_of(teardown) == COROUTINE:
        Coroutine(core, teardown(slot), done).step()
    else:
        core.pool.submit(in_pool)


def _note(
    core: _reaper.Core, task: Task | None, end: Callable[[], None], debug: Debug | None = None, asked: list[int] | None = None
) -> Callable[[tuple[Any, ...]], None]:
    """What becomes of the core's notes that no RPC waits for. end: called after a SIGTERM once no process is alive, and the
    task service holds nothing else. asked: the SIGTERMs that there have been."""
    asked = [] if asked is None else asked

    def end_if_asked() -> None:
        if asked and task is not None and task.native and not _alive(core) and not task.holds():
            end()

    def tell(task: Task, hook: str, *args: Any) -> None:
        made = task._served(hook)(*args)
        if made is not None:
            Coroutine(core, made).step()

    if task is not None:
        task._let_go = end_if_asked

    def handle(note: tuple[Any, ...]) -> None:
        kind = note[0]
        if kind == _reaper.NOTE_PID:
            monitor.monitor_notify_by_pid(note[1], note[2])
            if task is not None:
                tell(task, "on_pid", note[1], note[2])
        elif kind == _reaper.NOTE_TOLD:
            slot = note[1]
            monitor.monitor_notify_by_exec(slot.container_id, slot.exec_id, slot.exit_status)
            if task is not None:
                tell(task, "on_exit", slot)
            end_if_asked()
        elif kind == _reaper.NOTE_TEARDOWN and task is not None:
            _tear_down(core, task, note[1])
        elif kind == _reaper.NOTE_SIGNAL:
            _log_signal(note[1])
            if task is not None:
                tell(task, "on_signal", note[1])
            if note[1] == _SIGTERM:
                asked.append(note[1])
                end_if_asked()
            elif note[1] == _SIGUSR1 and debug is not None:
                debug.write()
        elif kind == _reaper.NOTE_ASKED and debug is not None:
            debug.asked()

    return handle


def _take(core: _reaper.Core, handle: Callable[[tuple[Any, ...]], None], timeout: float | None = None) -> None:
    """Wait for notes, at most so many seconds, and handle them as the RPC thread does, where there is none."""
    for note in core.notes(timeout):
        try:
            if not resume(note):
                handle(note)
        except BaseException as error:
            logger.error("a note's handler failed", note=str(note), error=repr(error))


# ---- delete ----

LEFT_TIMEOUT = 2.0  # seconds for a dead shim's events; containerd kills `delete` after 5


def _send_left(core: _reaper.Core, invocation: Invocation) -> None:
    """Hand over what the shim of this bundle could not, unless that shim lives and will do so itself."""
    from .address import known_address, parse_sockaddr, somebody_answers

    try:
        address = known_address(invocation.flags.bundle or ".")
        path = spill_path(parse_sockaddr(address)[1])
        if not invocation.ttrpc_address or not os.path.exists(path) or somebody_answers(address):
            return
        core.spill(path)
    except Exception:  # no bundle, no address: nothing was left that could be found
        return
    core.drain(LEFT_TIMEOUT)


def delete(cls: type[Shim], runtime_id: str, config: Config, invocation: Invocation) -> bytes:
    """Make the shim and let it clean up, children being reaped meanwhile; DeleteResponse, serialized."""
    from .bootstrap import encode_delete

    core = new_core(invocation.flags.namespace, invocation.ttrpc_address)
    core.tell_pids = True

    def notes() -> None:
        handle = _note(core, None, core.stop)
        while True:
            _take(core, handle)

    def work() -> bytes:
        shim = cls(runtime_id, invocation.flags, config)
        _reap(core, config)
        start_thread(notes)
        result = encode_delete(shim.delete_shim())
        _send_left(core, invocation)
        return result

    result: bytes = _on_leader(core, work)
    _keep(core)
    return result


# ---- serve ----


class _Ready:
    """Tells the `start` that made this daemon that it serves, or why it does not, and hears from it that the address is printed.

    `confirmed` raises Unavailable when that does not come: containerd kills a `start` that takes too long, and would never hear
    of this daemon."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = -1
        number = os.environ.pop(READY_ENV, "")
        if number.isdigit():
            self._fd = int(number)
            os.set_inheritable(self._fd, False)

    def tell(self, words: bytes) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, words)
        except OSError:  # it has gone, which `confirmed` finds out
            pass
        if words != READY:
            self._close()

    def confirmed(self) -> None:
        if self._fd < 0:
            return
        try:
            word = os.read(self._fd, 1)
        except OSError:
            word = b""
        self._close()
        if word != PRINTED:
            raise Unavailable("who started this daemon has gone, and told nobody its address")

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


def spill_path(socket_path: str) -> str:
    """Where the events of the shim at this socket wait when memory is full, or the shim has ended before containerd took them."""
    return socket_path + ".events"


class _Socket:
    """The listener's own path, found now, so that an author's chdir or another shim's socket of that name does no harm."""

    __slots__ = ("_inode", "path", "spill")

    def __init__(self, fd: int) -> None:
        from .address import listening_path

        try:
            name = listening_path(fd)
        except OSError:
            raise FailedPrecondition(f"fd {fd} is not a listening socket: a daemon is started by `start`") from None
        self.path = name if name.startswith("/") else ""
        self._inode = self._look()
        self.spill = spill_path(self.path) if self.path else ""

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def remove(self) -> None:
        if self.path and self._inode is not None and self._look() == self._inode:
            try:
                os.unlink(self.path)
            except OSError as error:
                logger.warn("socket not removed", error=one_line(error))


def new_server(core: _reaper.Core, shim: Shim, task: Task, publisher: RemotePublisher) -> Server:
    from ._ttrpc import Server
    from .task import Task as TaskBase
    from .task import register

    server = Server(core)
    register(server, task)
    shim.register_services(server, publisher)
    core.tell_pids = not task.native
    if type(task).teardown is not TaskBase.teardown:
        core.teardown_timeout = task.teardown_timeout
    return server


UPGRADE = "shimcore.v1.Upgrade"


class Life:
    """A daemon's, as far as an upgrade needs to know (upgrade.py).

    lock: who ends the shim, or lets new code go on with it, has it. leader_does, leader_says: to the leader, when the core has
    been paused, what to do before it goes on; from it that it has been, and the error of what it did."""

    __slots__ = ("asked", "debug", "leader_does", "leader_says", "lock", "shim", "upgrading")

    def __init__(self) -> None:
        from _queue import SimpleQueue

        self.leader_does: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.leader_says: SimpleQueue[BaseException | None] = SimpleQueue()
        self.lock = allocate_lock()
        self.upgrading = False
        self.asked: list[int] = []
        self.debug: Debug
        self.shim: Shim

    def paused(self) -> None:
        """On the leader."""
        self.leader_says.put(None)
        try:
            self.leader_does.get()()
        except BaseException as error:
            self.leader_says.put(error)
        self.debug.core.pause(False)

    def serve_upgrades(self) -> None:
        from ._ttrpc import COROUTINE
        from .wire import Raw

        def handler(request: Raw, context: Any) -> Any:
            from .upgrade import upgrade

            return upgrade(self, request, context)

        self.debug.server.add_service(UPGRADE, {"Upgrade": (COROUTINE, handler, Raw)})


def serve(cls: type[Shim], runtime_id: str, config: Config, invocation: Invocation, ready: Ready | None = None) -> None:
    """Be the daemon: serve on SOCKET_FD until the shim's wait() returns, then leave nothing behind.

    ready: whom to tell that it serves, by default whoever made this process."""
    ready = ready or _Ready()
    flags = invocation.flags
    inherited = os.environ.pop("SHIMCORE_UPGRADE", "")
    try:
        state = None
        if inherited:
            from .upgrade import inherit

            state = inherit(int(inherited))
        socket = _Socket(SOCKET_FD)
        core = new_core(flags.namespace, invocation.ttrpc_address)
        if state is not None:
            core.restore(state["core"])
        life = Life()

        def work() -> None:
            _serve(cls, runtime_id, config, invocation, core, socket, ready, life, state)

        _on_leader(core, work, life.paused)
        _keep(core)
    except BaseException as error:
        ready.tell(one_line(error).encode("utf-8", "replace"))
        report(error, "the shim")
        raise


def _keep(core: _reaper.Core) -> None:
    """What containerd has not acknowledged goes into the spill file: `delete`, or the next shim of this address, sends it."""
    try:
        kept = core.keep()
    except OSError as error:
        logger.error("events could not be kept", error=one_line(error), **core.stats())
    else:
        if kept:
            logger.warn("events kept for containerd's return", events=kept)


def _preload(cls: type[Shim]) -> None:
    from . import upgrade  # noqa: F401  # now: once it is asked for, what is on the disk may be another version

    try:
        cls.preload()
    except Exception as error:  # whoever needs it will hear of it again
        logger.error("preload failed", error=one_line(error))


def _serve(
    cls: type[Shim], runtime_id: str, config: Config, invocation: Invocation, core: _reaper.Core, socket: _Socket, ready: Ready,
    life: Life, state: dict[str, Any] | None,
) -> None:  # fmt: skip
    """state: what an earlier image of this process has left."""
    import gc

    from .daemon import warm

    flags = invocation.flags
    bundle = state["bundle"] if state else os.getcwd()
    watch_for_crashes(bundle)
    shim = cls(runtime_id, flags, config)
    if not config.no_setup_logger:
        logger.init(
            flags.debug, flags.namespace, flags.id,
            default_level=config.default_log_level, default_format=config.log_format,
        )  # fmt: skip
    if state is None:
        _reap(core, config)
    if socket.spill and (state is None or state["core"]["spill"] is None):
        core.spill(socket.spill)
    publisher = RemotePublisher(core, flags.namespace)
    task = shim._make_task(publisher)
    early = _note(core, task, shim.exit.signal, None, life.asked)
    shim._set_up(lambda timeout: _take(core, early, timeout))
    server = new_server(core, shim, task, publisher)
    server.add_listener(SOCKET_FD)
    debug = Debug(core, server, task, runtime_id=runtime_id, flags=flags, bundle=bundle, socket=socket.path)
    life.shim, life.debug = shim, debug
    life.serve_upgrades()
    handle = _note(core, task, shim.exit.signal, debug, life.asked)
    server.on_note(handle)
    if state is not None:
        from . import upgrade

        upgrade.restore(life, state)
        _reap(core, config)
    told = allocate_lock()
    told.acquire()

    def run() -> None:
        told.acquire()  # connections queue; two threads that want the interpreter's lock would only keep the caller waiting
        server.run()

    start_thread(run)
    try:
        try:
            ready.tell(READY)
        finally:
            told.release()
            gc.enable()
        if state is not None:
            upgrade.answer(life, state)
        # What follows is not on the way of a start.
        if state is not None and state["debug_fd"] >= 0:
            debug.adopt(state["debug_fd"])
        else:
            debug.listen()
        if warm is None or warm.bound is not None:
            core.pool.submit(lambda: _preload(cls))
        logger.info("serving", pid=os.getpid())
        try:
            ready.confirmed()
        except Unavailable:
            from .address import withdraw_address

            no_crash(os.curdir)
            withdraw_address()
            raise
        shim.wait()
    finally:
        life.lock.acquire()
        logger.info("shutting down")
        debug.close()
        socket.remove()  # soon: whoever starts a shim of this name now must not find one that is about to end
        ended = server.shutdown(SHUTDOWN_TIMEOUT)
        shim._end((lambda timeout: _take(core, handle, timeout)) if ended else None)
        core.drain(SHUTDOWN_TIMEOUT)
        no_crash(bundle)
