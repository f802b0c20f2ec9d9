"""The rig: stands in for containerd around any shim binary, and for its client around any container."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from google.protobuf.message import Message

from shimcore.errors import Closed, NotFound, ShimError
from shimcore.protos import task_pb2, types_pb2
from shimcore.protos.runc_options_pb2 import Options
from shimcore.rig import bundle as bundles
from shimcore.rig.activate import DELETE_TIMEOUT, ActivationError, Activator, Deleted, Started
from shimcore.rig.events import Event, Events
from shimcore.rig.leaks import MARKER, Leaks
from shimcore.rig.stdio import Stdio
from shimcore.rig.task import Task
from shimcore.ttrpc import Client

SHIM = "containerd-shim-runc-v2"

#: Seconds that containerd allows Shutdown.
SHUTDOWN_TIMEOUT = 3.0


class LeakError(Exception):
    """Something was left behind. `left`: a line each."""

    def __init__(self, left: Sequence[str]) -> None:
        super().__init__("left behind:\n  " + "\n  ".join(left))
        self.left = list(left)


class Exec:
    """A process that was added to a container. id: its exec id; pid: 0 until started."""

    def __init__(self, session: Session, id: str, stdio: Stdio) -> None:
        self.session = session
        self.id = id
        self.stdio = stdio
        self.pid = 0

    def start(self, *, timeout: float | None = None) -> int:
        """Start; returns the pid."""
        self.pid = self.session.task.start(self.id, timeout=timeout)
        return self.pid

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait; returns the exit status."""
        return self.session.task.wait(self.id, timeout=timeout).exit_status

    def delete(self, *, timeout: float | None = None) -> int:
        """Drains the output, then Delete; returns the exit status."""
        self.stdio.drain()
        status = self.session.task.delete(self.id, timeout=timeout).exit_status
        self.stdio.close()
        return status


class Session:
    """One container under one shim, from its bundle to `delete`. Made by Rig.container, which has started the
    shim.

    bundle, stdio, started (what `start` answered), client, task (any RPC), shim_pid and, after create, pid.
    """

    def __init__(
        self,
        rig: Rig,
        id: str,
        bundle: bundles.Bundle,
        stdio: Stdio,
        started: Started,
        client: Client,
        timeout: float,
    ) -> None:
        self.rig = rig
        self.id = id
        self.bundle = bundle
        self.stdio = stdio
        self.started = started
        self.client = client
        self.task = Task(client, id, version=started.version, timeout=timeout)
        self.shim_pid = self.task.connect().shim_pid
        self.pid = 0
        self.execs: list[Exec] = []
        self._numbers = itertools.count()
        self.deleted: Deleted | None = None

    # ---- what containerd's client does ---------------------------------------------------------------------

    def create(self, *, rootfs: Sequence[types_pb2.Mount] = (), timeout: float | None = None) -> int:
        """Create, with the rig's options; returns init's pid. rootfs: mounts that the shim is to make."""
        self.pid = self.task.create(
            str(self.bundle.path),
            rootfs=rootfs,
            terminal=self.stdio.terminal,
            stdin=self.stdio.stdin,
            stdout=self.stdio.stdout,
            stderr=self.stdio.stderr,
            options=self.rig.options,
            timeout=timeout,
        )
        return self.pid

    def start(self, *, timeout: float | None = None) -> int:
        """Start of init; returns its pid."""
        return self.task.start(timeout=timeout)

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait for init; returns its exit status."""
        return self.task.wait(timeout=timeout).exit_status

    def run(self, *, timeout: float | None = None) -> int:
        """Create, Start, Wait, and the output to its end; returns init's exit status."""
        self.create(timeout=timeout)
        self.start(timeout=timeout)
        status = self.wait(timeout=timeout)
        self.stdio.drain()
        return status

    def exec(
        self,
        args: Sequence[str],
        *,
        id: str = "",
        env: Sequence[str] = bundles.ENV,
        cwd: str = "/",
        stdin: bool = False,
        terminal: bool = False,
        start: bool = True,
    ) -> Exec:
        """Exec of `args` with streams of its own and, unless told otherwise, its Start."""
        id = id or f"exec{next(self._numbers)}"
        stdio = Stdio(self.rig.root / "fifo", f"{self.id}-{id}", stdin=stdin, terminal=terminal)
        process = Exec(self, id, stdio)
        self.execs.append(process)
        self.task.exec(
            id,
            bundles.process(args, env=env, cwd=cwd, terminal=terminal),
            terminal=terminal,
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
        )
        if start:
            process.start()
        return process

    def close_stdin(self, exec_id: str = "") -> None:
        """Lets init, or an exec, see the end of its stdin: closes our end and says CloseIO."""
        stdio = next((item.stdio for item in self.execs if item.id == exec_id), self.stdio)
        stdio.close_stdin()
        self.task.close_io(exec_id)

    @property
    def output(self) -> str:
        """init's stdout so far."""
        return self.stdio.output().decode(errors="replace")

    @property
    def errors(self) -> str:
        """init's stderr so far."""
        return self.stdio.errors().decode(errors="replace")

    @property
    def events(self) -> list[Event]:
        """The container's events so far."""
        return self.rig.events.of(self.id)

    # ---- what containerd does ------------------------------------------------------------------------------

    def delete(self, *, timeout: float | None = None) -> task_pb2.DeleteResponse:
        """All that containerd does to delete a task: Delete, Shutdown, close, `delete`, removal of the
        bundle.

        `deleted` holds what the binary said. Raises what Delete raises, ActivationError, and OSError when a
        mount is left on the bundle's rootfs.
        """
        answer = self.task.delete(timeout=timeout)
        self.end()
        return answer

    def end(self) -> Deleted:
        """The same without Delete: what follows a Create that failed, or a shim's death."""
        with contextlib.suppress(ShimError):
            self.task.shutdown(timeout=SHUTDOWN_TIMEOUT)
        return self.cleanup()

    def cleanup(self, *, timeout: float = DELETE_TIMEOUT) -> Deleted:
        """What containerd does when it finds the shim gone: closes, runs `delete` and removes the bundle."""
        self.client.close()
        self.deleted = self.rig.activator.delete(self.id, self.bundle.path, timeout=timeout)
        self.stdio.close()
        for process in self.execs:
            process.stdio.close()
        self.bundle.remove()
        self.rig.forget(self)
        return self.deleted

    def reconnect(self) -> None:
        """What a restarted containerd does (1.6, 1.7): reads the address file, dials, Connect, Pids.

        Raises Closed, OSError without the file, and what the RPCs raise.
        """
        self.client.close()
        address = (self.bundle.path / "address").read_text()
        self.client = Client(address, namespace=self.rig.namespace)
        self.task.client = self.client
        self.shim_pid = self.task.connect().shim_pid
        self.task.pids()

    def kill_shim(self, number: int = signal.SIGKILL, *, timeout: float = 5.0) -> None:
        """Sends the shim a signal; with SIGKILL waits until it has gone. Raises TimeoutError,
        ProcessLookupError.
        """
        fd = os.pidfd_open(self.shim_pid)
        try:
            signal.pidfd_send_signal(fd, number)
            # A pidfd is readable once its process is a zombie, reaped or not.
            if number == signal.SIGKILL and not select.select([fd], [], [], timeout)[0]:
                raise TimeoutError(f"shim {self.shim_pid} has not gone {timeout} s after SIGKILL")
        finally:
            os.close(fd)

    def dispose(self) -> None:
        """Ends the container whatever state it is in: kills, deletes, and falls back on the `delete`
        binary.
        """
        with contextlib.suppress(ShimError):
            with contextlib.suppress(NotFound):
                self.task.kill(signal.SIGKILL, all=True, timeout=5)
            self.task.wait(timeout=5)
            self.task.delete(timeout=5)
        with contextlib.suppress(ActivationError, OSError):
            self.end()


class Rig:
    """A containerd for shim authors; a context manager.

    shim: path or name of the binary. runtime: the OCI binary that runc's options name, "" for the shim's own
    choice.
    generation: of the start protocol, see shimcore.rig.activate. namespace: containerd's; must belong to this
    rig alone, for cgroups are named after it. options: for `start` and Create, instead of runc's. timeout:
    seconds for each RPC and for `start`. strict: whether leaving with something left behind raises LeakError.

    On leaving, containers that still live are ended through their shims, then it is checked that no process,
    mount, socket or cgroup is left (`left`), and whatever is left is removed. Nothing is touched that the rig
    did not start.

    Raises FileNotFoundError when there is no such shim.
    """

    def __init__(
        self,
        shim: str | Path = SHIM,
        *,
        generation: str = "1.6",
        namespace: str = "",
        runtime: str = "",
        options: Message | None = None,
        rootfs: Path | None = None,
        env: Mapping[str, str] | None = None,
        debug: bool = False,
        timeout: float = 10.0,
        strict: bool = True,
    ) -> None:
        binary = shutil.which(str(shim))
        if binary is None:
            raise FileNotFoundError(f"no executable shim {str(shim)!r}")
        self.shim = os.path.abspath(binary)
        self.namespace = namespace or f"rig-{uuid.uuid4().hex[:8]}"
        self.timeout = timeout
        self.strict = strict
        self.left: list[str] = []
        # Short: the path of a unix socket has 107 bytes at most.
        self.root = Path(tempfile.mkdtemp(prefix="rig-"))
        self.options: Message = options or Options(binary_name=runtime, root=str(self.root / "runc"))
        self._rootfs = rootfs
        self.sessions: list[Session] = []
        marker = uuid.uuid4().hex
        self.leaks = Leaks(marker, self.namespace, self.root)
        self.events = Events(self.root / "containerd.sock.ttrpc")
        self.activator = Activator(
            self.shim,
            namespace=self.namespace,
            events=self.events.address,
            generation=generation,
            env={MARKER: marker, **(env or {})},
            debug=debug,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        left = self.close()
        if left and self.strict and kind is None:
            raise LeakError(left)

    @property
    def rootfs(self) -> Path:
        """The root filesystem that containers share: the one given, or one of busybox, made when first asked
        for.
        """
        if self._rootfs is None:
            self._rootfs = bundles.busybox_rootfs(self.root / "rootfs")
        return self._rootfs

    def bundle_path(self, id: str) -> Path:
        """Where the bundle of container `id` is or will be; its name is the id, which shims rely on."""
        return self.root / "state" / self.namespace / id

    def container(
        self,
        args: Sequence[str] = ("true",),
        *,
        id: str = "",
        env: Sequence[str] = bundles.ENV,
        cwd: str = "/",
        stdin: bool = False,
        terminal: bool = False,
        read: bool = True,
        spec: Mapping[str, Any] | None = None,
        annotations: Mapping[str, str] | None = None,
        namespaces: Sequence[str] = bundles.NAMESPACES,
    ) -> Session:
        """Makes a bundle for `args` and starts a shim for it; nothing is created yet.

        spec: the whole of config.json, instead of what the other arguments make. read: see Stdio.
        Raises ActivationError when `start` fails, Closed when nobody serves at the address; the bundle is
        gone then.
        """
        id = id or f"c{uuid.uuid4().hex[:8]}"
        if spec is None:
            spec = bundles.spec(
                args,
                root=str(self.rootfs),
                cgroups_path=f"/{self.namespace}/{id}",
                env=env,
                cwd=cwd,
                terminal=terminal,
                annotations=annotations,
                namespaces=namespaces,
            )
        work = self.root / "work" / self.namespace / id
        bundle = bundles.Bundle(self.bundle_path(id), spec, work=work)
        stdio = Stdio(self.root / "fifo", id, stdin=stdin, terminal=terminal, read=read)
        try:
            started = self.activator.start(id, bundle.path, self.options, timeout=self.timeout)
            self.leaks.addresses.add(started.address)
            client = Client(started.address, namespace=self.namespace)
            try:
                session = Session(self, id, bundle, stdio, started, client, self.timeout)
            except BaseException:
                client.close()
                raise
        except BaseException as error:
            stdio.close()
            if isinstance(error, ActivationError | Closed) and bundle.log:
                error.add_note(f"the shim's log: {bundle.log.strip()}")
            bundle.remove()
            raise
        self.sessions.append(session)
        return session

    def forget(self, session: Session) -> None:
        """Called by a session that has come to its end."""
        if session in self.sessions:
            self.sessions.remove(session)

    def close(self) -> list[str]:
        """Ends what still lives, checks, removes; returns what had been left behind. Idempotent."""
        for session in list(self.sessions):
            session.dispose()
            session.bundle.close()
            session.stdio.close()
        self.left += self.leaks.settle()
        self.events.close()
        self.leaks.remove()
        return self.left
