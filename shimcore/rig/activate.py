"""Runs a shim binary's actions the way containerd runs them: the same flags, environment, stdin and stdout.

Three generations of the start protocol are spoken, and each is as strict here as the containerd that speaks
it:

======  =====================================  =================================================
name    stdin of start                         stdout of start
======  =====================================  =================================================
1.6     Any of the options, or /dev/null       a plain address
1.7     the same (and 2.0 to 2.2)              a plain address, or JSON of version 2
2.3     BootstrapParams                        also JSON of version 3, or BootstrapResult
======  =====================================  =================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from shimcore.protos import anys, bootstrap_pb2, task_pb2, types_pb2

GENERATIONS = ("1.6", "1.7", "2.3")

#: Seconds after which containerd kills `delete`.
DELETE_TIMEOUT = 5.0

_VERSIONS = {"1.6": (2,), "1.7": (2,), "2.3": (2, 3)}


class ActivationError(Exception):
    """An action failed. output: all that it wrote, bytes; status: its exit status, None when it was killed
    late.
    """

    def __init__(self, message: str, output: bytes = b"", status: int | None = None) -> None:
        text = output.decode(errors="replace").strip()
        super().__init__(f"{message}: {text}" if text else message)
        self.output = output
        self.status = status


@dataclass(frozen=True, slots=True)
class Started:
    """What `start` answered. began, ended: monotonic ns around the action, exec and end of output.

    address: as a ttrpc client takes it. form: "plain", "json" or "protobuf". output: the bytes themselves.
    """

    address: str
    version: int
    protocol: str
    form: str
    output: bytes
    began: int
    ended: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """What `delete` answered. exited_at: ns since 1970; warnings: its stderr; began, ended: monotonic ns."""

    pid: int
    exit_status: int
    exited_at: int
    warnings: str
    began: int
    ended: int


def _as_any(options: Message | None) -> Any | None:
    if options is None or isinstance(options, Any):
        return options
    return anys.pack(Any(), options)


class Activator:
    """Runs one shim binary's actions in one containerd's name.

    binary: path of the shim. namespace: containerd's. events: path of the Events endpoint.
    generation: one of GENERATIONS. containerd: what -publish-binary names. grpc: containerd's own address.
    env: variables on top of this process's. socket_dir: told to the shim from 2.3 on. debug: adds -debug.
    """

    def __init__(
        self,
        binary: str | Path,
        *,
        namespace: str,
        events: str,
        generation: str = "1.6",
        containerd: str = "/usr/bin/containerd",
        grpc: str = "",
        env: Mapping[str, str] | None = None,
        socket_dir: str = "",
        debug: bool = False,
    ) -> None:
        if generation not in GENERATIONS:
            raise ValueError(f"generation {generation!r} is none of {', '.join(GENERATIONS)}")
        self.binary = str(binary)
        self.namespace = namespace
        self.events = events
        self.generation = generation
        self.containerd = containerd
        self.grpc = grpc or events.removesuffix(".ttrpc")
        self.socket_dir = socket_dir
        self.debug = debug
        self._extra = dict(env or {})

    @property
    def environment(self) -> dict[str, str]:
        """All of an action's environment. A template, which would outlive the rig, is used when somebody asks for it."""
        env = {"SHIMCORE_TEMPLATE": "0", **os.environ}
        env.update(GOMAXPROCS="2", TTRPC_ADDRESS=self.events)
        if self.generation != "1.6":
            env.update(GRPC_ADDRESS=self.grpc, NAMESPACE=self.namespace, MAX_SHIM_VERSION="2")
        else:
            for name in ("GRPC_ADDRESS", "NAMESPACE", "MAX_SHIM_VERSION"):
                env.pop(name, None)
        return env | self._extra

    def arguments(self, id: str, action: str, bundle: str = "") -> list[str]:
        """The command line of an action on container `id`; `bundle` is given to delete only."""
        args = [self.binary, "-namespace", self.namespace, "-address", self.grpc]
        args += ["-publish-binary", self.containerd, "-id", id]
        if bundle:
            args += ["-bundle", bundle]
        if self.debug:
            args.append("-debug")
        return [*args, action]

    def stdin(self, id: str, options: Message | None = None) -> bytes:
        """What `start` reads. options: the runtime's, any message, or one that is packed already."""
        packed = _as_any(options)
        if self.generation != "2.3":
            return packed.SerializeToString() if packed is not None else b""
        params = bootstrap_pb2.BootstrapParams(
            instance_id=id,
            namespace=self.namespace,
            log_level=bootstrap_pb2.LOG_LEVEL_DEBUG if self.debug else bootstrap_pb2.LOG_LEVEL_INFO,
            containerd_version="2.3.0",
            containerd_ttrpc_address=self.events,
            containerd_grpc_address=self.grpc,
            containerd_binary=self.containerd,
        )
        if self.socket_dir:
            params.socket_dir = self.socket_dir
        if packed is not None:
            params.extensions.add().value.CopyFrom(packed)
        return params.SerializeToString()

    def start(self, id: str, bundle: str | Path, options: Message | None = None, *, timeout: float = 10.0) -> Started:
        """Runs `start` in `bundle` and reads its merged output to the end; `timeout` in seconds.

        Raises ActivationError: a non-zero exit, an output that this generation would not take, or one that
        had not ended in time, which is what a daemon does that kept stdout or stderr.
        """
        began = time.monotonic_ns()
        args = self.arguments(id, "start")
        status, output, _ = self._run(args, bundle, self.stdin(id, options), timeout, merge=True)
        ended = time.monotonic_ns()
        if status:
            raise ActivationError(f"start exited with {status}", output, status)
        address, version, protocol, form = parse_result(output, self.generation)
        return Started(address, version, protocol, form, output, began, ended)

    def delete(self, id: str, bundle: str | Path, *, timeout: float = DELETE_TIMEOUT) -> Deleted:
        """Runs `delete` in `bundle`, as containerd does after every task and after a shim's death.

        Raises ActivationError when it fails or has not ended within `timeout` seconds.
        """
        began = time.monotonic_ns()
        args = self.arguments(id, "delete", str(bundle))
        status, output, warnings = self._run(args, bundle, b"", timeout, merge=False)
        ended = time.monotonic_ns()
        if status:
            raise ActivationError(f"delete exited with {status}", warnings, status)
        try:
            answer = task_pb2.DeleteResponse.FromString(output)
        except DecodeError:
            raise ActivationError("delete printed what is no DeleteResponse", output, status) from None
        text = warnings.decode(errors="replace")
        exited_at = answer.exited_at.ToNanoseconds()
        return Deleted(answer.pid, answer.exit_status, exited_at, text, began, ended)

    def info(self, options: Message | None = None, *, timeout: float = 10.0) -> types_pb2.RuntimeInfo:
        """Runs `-info`, which shims have from containerd 2.0 on. Raises ActivationError."""
        packed = _as_any(options) or Any()
        args = [self.binary, "-info"]
        status, output, errors = self._run(args, None, packed.SerializeToString(), timeout, merge=False)
        if status:
            raise ActivationError(f"-info exited with {status}", errors or output, status)
        try:
            return types_pb2.RuntimeInfo.FromString(output)
        except DecodeError:
            raise ActivationError("-info printed what is no RuntimeInfo", output, status) from None

    def _run(
        self, args: list[str], cwd: str | Path | None, stdin: bytes, timeout: float, *, merge: bool
    ) -> tuple[int, bytes, bytes]:
        deadline = time.monotonic() + timeout
        try:
            child = subprocess.Popen(
                args,
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if merge else subprocess.PIPE,
                process_group=0,
            )
        except OSError as error:
            raise ActivationError(f"can't run {args[0]}: {error.strerror}") from None
        late = False
        with child:
            try:
                # Small enough for a pipe's buffer; a shim that does not read it is no error.
                if child.stdin:
                    with contextlib.suppress(BrokenPipeError):
                        child.stdin.write(stdin)
                        child.stdin.flush()
                    with contextlib.suppress(BrokenPipeError):
                        child.stdin.close()
                output, errors, late = _read_both(child, deadline)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(deadline - time.monotonic(), 0))
            finally:
                if child.poll() is None:
                    late = True
                    child.send_signal(signal.SIGKILL)
        if late:
            what = "output did not end" if child.returncode == 0 else "did not end"
            raise ActivationError(f"{args[-1]} {what} within {timeout} s", output + errors)
        return child.returncode, output, errors


def _read_both(child: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes, bool]:
    """stdout, stderr, and whether the deadline came before both had ended."""
    got = {stream.fileno(): bytearray() for stream in (child.stdout, child.stderr) if stream}
    first, *rest = got
    waiting = set(got)
    poll = select.poll()
    for fd in got:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(max(deadline - time.monotonic(), 0) * 1000)
        if not ready:
            break
        for fd, _ in ready:
            data = os.read(fd, 65536)
            got[fd] += data
            if not data:
                waiting.discard(fd)
                poll.unregister(fd)
    return bytes(got[first]), bytes(got[rest[0]]) if rest else b"", bool(waiting)


def parse_result(output: bytes, generation: str = "2.3") -> tuple[str, int, str, str]:
    """(address, version, protocol, form) of what `start` printed, as containerd `generation` understands it.

    A plain address without a scheme is abstract, and is returned with "@" before it. Raises ActivationError.
    """
    text = output.strip()
    version, protocol = 2, "ttrpc"
    if not text:
        raise ActivationError("start printed nothing")
    if text.startswith(b"{"):
        form = "json"
        try:
            answer = json.loads(text)
            address, protocol = str(answer["address"]), str(answer["protocol"])
            version = int(answer["version"])
        except (ValueError, KeyError, TypeError):
            raise ActivationError("start printed broken JSON", output) from None
    elif all(0x20 < byte < 0x7F for byte in text):
        form = "plain"
        address = text.decode()
    else:
        # No message of that kind is all printable: its first byte is a tag below 0x33 or a control character.
        form = "protobuf"
        try:
            result = bootstrap_pb2.BootstrapResult.FromString(output)
        except DecodeError:
            raise ActivationError("start printed what is no address", output) from None
        address, version, protocol = result.address, result.version, result.protocol
    allowed = {"1.6": ("plain",), "1.7": ("plain", "json")}.get(generation, ("plain", "json", "protobuf"))
    if form not in allowed or version not in _VERSIONS[generation]:
        raise ActivationError(f"containerd {generation} takes no {form} of version {version}", output)
    if protocol != "ttrpc":
        raise ActivationError(f"protocol {protocol!r} is not supported here", output)
    if not address.removeprefix("unix://"):
        raise ActivationError("start printed no address", output)
    if "://" not in address:
        address = "@" + address.lstrip("\0")
    elif not address.startswith("unix://"):
        raise ActivationError(f"address {address!r} is not supported here", output)
    return address, version, protocol, form
