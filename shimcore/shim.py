"""The Shim that an author derives from, and `run`, the one place that wires the rest together.

containerd runs a shim's executable for three things: `start`, `delete`, and, through `start`, the daemon that serves. `run`
reads which it is, makes the author's class, and does what is common to all shims.

Threads. The leader of the process is the core's exit thread and runs no code of the author's: orphans that the kernel gives to
a subreaper go to its leader, and only so can they be told from children that the author's code makes (core/children.c). So for
serve and delete the author's constructor, methods and hooks run on another thread.
"""

from __future__ import annotations

import os
import sys

from . import bootstrap
from .errors import InvalidArgument, from_exception

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from google.protobuf.message import Message

    from ._ttrpc import Server
    from .bootstrap import Config, DeleteResult, Flags, StartOpts
    from .forked import Guard
    from .publisher import RemotePublisher
    from .task import Task

_STDIN_MAX = 16 << 20


class Shim:
    """One class per shim. containerd's three calls come in three processes, and in each of them it is made anew.

    runtime_id: str, the runtime's name, as "io.containerd.empty.v1"; flags: the command line; config: Config, which the
    constructor may change: whatever it sets is honoured, no_reaper and no_sub_reaper too.
    """

    # 3: this shim may be told of the containers of its pod without a `start` for each, as containerd 2.3 and later does from that
    # version on. 2: each has a `start` of its own. The Task API is served as both either way.
    api_version = 2

    def __init__(self, runtime_id: str, flags: Flags, config: Config) -> None:
        from ._reaper import ExitSignal

        self.runtime_id = runtime_id
        self.flags = flags
        self.config = config
        self.exit = ExitSignal()

    def start_shim(self, opts: StartOpts) -> str:
        """Answer `start`: make the daemon and return its address. cwd is the bundle."""
        from .daemon import spawn

        _, address = spawn(opts, opts.id)
        return address

    def delete_shim(self) -> DeleteResult | Message:
        """Answer `delete`: undo what a daemon that is gone has left, and say how its process ended. cwd is the bundle.

        It runs at every container's ordinary end too, when there is nothing left to undo; it must be quick (containerd allows
        5 s) and must work without containerd."""
        from .util import now_ns

        return bootstrap.DeleteResult(0, 137, now_ns())

    @classmethod
    def preload(cls) -> None:
        """Import what the daemon will need. Called once in the warm template, which is forked for each action: open no file,
        start no thread, keep nothing that must differ from shim to shim. Without a template a daemon calls it once it serves."""

    def wait(self) -> None:
        """Block until the daemon should end: by default, until self.exit is signalled."""
        self.exit.wait()

    def create_task_service(self, publisher: RemotePublisher) -> Task:
        """The service that the daemon serves."""
        raise NotImplementedError(f"{type(self).__name__}.create_task_service")

    # For a flavour that has more to begin and to end than the server (aio). `take` waits for notes of the core, at most so many
    # seconds, and handles them: nobody else does where these are called.

    def _make_task(self, publisher: RemotePublisher) -> Task:
        """Also for the trial of an upgrade, which goes no further."""
        return self.create_task_service(publisher)

    def _set_up(self, take: Callable[[float | None], None]) -> None:
        """Before anything is served."""

    def _end(self, take: Callable[[float | None], None] | None) -> None:
        """Once calls are served no more. None: the RPC thread does not end, and takes the notes."""

    def _unfinished(self) -> str | None:
        """What an upgrade has to wait for, besides calls and the core."""
        return None

    def register_services(self, server: Server, publisher: RemotePublisher) -> None:
        """Register services besides Task, if the shim has any."""

    def shim_info(self, invocation: bootstrap.Invocation) -> bytes:
        """Answer `-info`: containerd.types.RuntimeInfo, serialized."""
        from . import __version__

        return bootstrap.encode_info(self.runtime_id, __version__)


def print_to_log() -> None:
    """Make the bundle's log stdout and stderr, /dev/null where nobody reads it."""
    try:
        sink = os.open("log", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)


class _Guard:
    """Keeps stdout and stderr for the result and the error line: what code of the author's prints goes to the log.

    containerd reads both, merged, to their end, and takes what it reads for the address."""

    __slots__ = ("_err", "_out")

    def __init__(self) -> None:
        self._out = os.dup(1)  # dup's result is close-on-exec
        self._err = os.dup(2)
        print_to_log()

    def fds(self) -> tuple[int, int]:
        """stdout and stderr as they came."""
        return self._out, self._err

    def release(self) -> None:
        """For the daemon, which has no result: its stdout and stderr are the log already."""
        if "SHIMCORE_UPGRADE" in os.environ:  # the log's reader may be away just now, and what we have is its FIFO
            os.dup2(self._out, 1)
            os.dup2(self._err, 2)
        os.close(self._out)
        os.close(self._err)
        self._out, self._err = 1, 2

    def result(self, data: bytes) -> None:
        """Write the whole result. Raises OSError."""
        while data:
            data = data[os.write(self._out, data) :]

    def error(self, line: str) -> None:
        try:
            os.write(self._err, line.encode("utf-8", "replace") + b"\n")
        except OSError:
            pass


def one_line(error: BaseException) -> str:
    """An error as the one line that containerd shows to its user."""
    _, text = from_exception(error)
    return "; ".join(part.strip() for part in text.splitlines() if part.strip())


def load(shim: type[Shim] | str) -> type[Shim]:
    """The class itself, or the one that "module:Class" names. Raises InvalidArgument when it is none."""
    found: object = shim
    if isinstance(shim, str):
        module, _, name = shim.partition(":")
        __import__(module)
        found = getattr(sys.modules[module], name, None)
        if found is None:
            raise InvalidArgument(f"module {module} has no class {name}")
    if not isinstance(found, type) or not issubclass(found, Shim):
        raise InvalidArgument(f"{shim!r} is not a subclass of Shim")
    return found


def _read_stdin() -> bytes:
    if os.isatty(0):
        return b""
    data = b""
    while len(data) <= _STDIN_MAX:
        piece = os.read(0, 65536)
        if not piece:
            return data
        data += piece
    raise InvalidArgument(f"stdin is longer than {_STDIN_MAX} bytes")


def prepare(config: Config) -> None:
    """What every action does to the process before the shim's work: kernel check, fd limit, subreaper."""
    from . import _reaper

    _reaper.kernel_check()
    _reaper.raise_nofile()
    if not config.no_sub_reaper:
        _reaper.set_subreaper()


def _start(cls: type[Shim], runtime_id: str, config: Config, invocation: bootstrap.Invocation) -> bytes:
    shim = cls(runtime_id, invocation.flags, config)
    prepare(config)
    address = shim.start_shim(invocation.start_opts())
    return bootstrap.encode_address(address, invocation.generation, version=invocation.version(cls.api_version))


def _become(cls: type[Shim], runtime_id: str, config: Config, guard: _Guard | Guard, result: bytes) -> bytes:
    """Be the daemon that start_shim has asked for, in the process that became it; the result is told when it serves."""
    from . import daemon

    if daemon.warm is None or daemon.warm.listener < 0:
        return result
    from . import forked

    assert isinstance(guard, forked.Guard)
    forked.become(cls, runtime_id, config, guard, result, daemon.warm)
    return b""


def _dispatch(
    runtime_id: str, shim: type[Shim] | str, config: Config, invocation: bootstrap.Invocation, guard: _Guard | Guard
) -> bytes:
    action = invocation.action
    if action == bootstrap.HELP:
        return bootstrap.USAGE.encode()
    if action == bootstrap.VERSION:
        from . import __version__

        name = os.path.basename(sys.argv[0]).removesuffix(".py")
        return f"{name}:\n  Runtime:  {runtime_id}\n  Version:  {__version__}\n".encode()
    cls = load(shim)
    if action == bootstrap.INFO:
        return cls(runtime_id, invocation.flags, config).shim_info(invocation)
    if action == bootstrap.START:
        result = _start(cls, runtime_id, config, invocation)
        return _become(cls, runtime_id, config, guard, result)
    trial = os.environ.get("SHIMCORE_UPGRADE", "")
    if action == bootstrap.SERVE and trial.startswith("try "):
        from . import upgrade

        return upgrade.rehearse(cls, runtime_id, config, invocation, int(trial[4:]))
    from . import serve

    if action == bootstrap.DELETE:
        return serve.delete(cls, runtime_id, config, invocation)
    guard.release()
    serve.serve(cls, runtime_id, config, invocation)
    return b""


def run(runtime_id: str, shim: type[Shim] | str, config: Config | None = None) -> NoReturn:
    """Be a shim's executable: do what the command line says and end the process.

    shim: the author's class, or "module:Class". The string is imported only after stdout and stderr have been put aside, so that
    whatever its module prints cannot reach containerd; `python -m shimcore.install` writes executables that use it.
    An error is told in one line on stderr, and the exit status is 1.
    """
    if sys.argv[1:2] == ["--shimcore-template"]:
        from .template import main

        main(runtime_id, shim, config or bootstrap.Config(), sys.argv[2:])
    import gc

    # A collection finds next to nothing in what is only imported; a daemon has it on again once it serves. Not so in a template:
    # what is found late leaves holes all over it, and what its forks put there is in so many pages of their own.
    gc.disable()
    act(runtime_id, shim, config or bootstrap.Config(), _Guard())


def _divided(runtime_id: str, guard: _Guard) -> _Guard | Guard:
    """In a `start` that no code of an author's has run in yet: where the result of the one that acts goes (see forked.py)."""
    if len(os.listdir("/proc/self/task")) > 1:
        return guard
    from . import forked

    return forked.divide(runtime_id, *guard.fds())


def act(runtime_id: str, shim: type[Shim] | str, config: Config, guard: _Guard | Guard) -> NoReturn:
    """Do what sys.argv says, give the result to the guard, and end the process."""
    status = 1
    try:
        flags = bootstrap.parse_flags(sys.argv[1:])
        if flags.action == bootstrap.START and isinstance(shim, str) and isinstance(guard, _Guard):
            guard = _divided(runtime_id, guard)
        stdin = _read_stdin() if bootstrap.reads_stdin(flags) else b""
        invocation = bootstrap.parse_invocation(sys.argv[1:], os.environ, stdin)
        guard.result(_dispatch(runtime_id, shim, config, invocation, guard))
        if invocation.action == bootstrap.START:
            from .daemon import printed

            printed()
        status = 0
    except SystemExit as end:
        guard.error(f"{runtime_id}: the shim's code called exit({end.code})")
    except BaseException as error:
        guard.error(f"{runtime_id}: {one_line(error)}")
    os._exit(status)  # no destructors, no atexit of imported modules: a millisecond
