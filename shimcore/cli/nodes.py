"""The shims on this node, found without containerd: by their processes, and by the sockets that they listen on."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..address import DEBUG_SUFFIX

# containerd makes a shim's name from the runtime's: io.containerd.runc.v2 -> containerd-shim-runc-v2.
NAME = re.compile(r"containerd-shim-[^/]+-v\d[^/]*")
TIMEOUT = 5.0  # seconds for a shim to answer
_READS_MAX = 5
LISTEN_TIMEOUT = 0.5  # seconds from a socket's binding to its listening


@dataclass
class Shim:
    """One shim's daemon. debug: its debug socket, "" where it has none, as other people's shims; socket: that of its Task API."""

    pid: int
    name: str
    namespace: str
    id: str
    bundle: str
    debug: str = ""
    socket: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # its dump, once asked


class NoAnswer(Exception):
    """A shim could not be asked; says why."""


def _words(pid: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _flag(words: list[str], name: str) -> str:
    for at, word in enumerate(words):
        if word in (f"-{name}", f"--{name}") and at + 1 < len(words):
            return words[at + 1]
        if word.startswith((f"-{name}=", f"--{name}=")):
            return word.partition("=")[2]
    return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def listeners() -> dict[str, str]:
    """Path to inode of every unix socket that has a path and listens (/proc/net/unix, flags 00010000).

    That file is of one network namespace (network_namespaces(7)), while a socket with a path may be connected to from any: each
    namespace of a process that we may look at is read. While sockets come and go the kernel may leave out others between two of a
    read's pages: it is read until nothing is added, and what one read has seen counts.
    """
    found: dict[str, str] = {}
    seen = set()
    for name in ["self", *(name for name in os.listdir("/proc") if name.isdigit())]:
        space = _link(f"/proc/{name}/ns/net")
        if not space or space in seen:
            continue
        try:
            for _ in range(_READS_MAX):
                before = len(found)
                found |= _listening(_unix_sockets(name))
                if len(found) == before and space in seen:
                    break
                seen.add(space)
        except OSError:
            continue  # gone: another of its namespace may be there
    return found


def _unix_sockets(pid: str) -> str:
    """The unix sockets of this process's network namespace. Raises OSError."""
    return Path(f"/proc/{pid}/net/unix").read_text(errors="replace")


def _listening(text: str) -> dict[str, str]:
    lines = (line.split(None, 7) for line in text.splitlines()[1:])
    return {fields[7]: fields[6] for fields in lines if len(fields) == 8 and fields[3] == "00010000"}


def _sockets_of(pid: int) -> set[str]:
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            link = _link(f"/proc/{pid}/fd/{fd}")
            if link.startswith("socket:["):
                found.add(link[8:-1])
    except OSError:
        pass
    return found


def namespace_of(pid: int) -> str:
    """The containerd namespace that a shim's command line names; "" when it is gone."""
    return _flag(_words(pid), "namespace")


def shims(namespace: str = "") -> list[Shim]:
    """Every shim's daemon whose process we may look at, ours and other people's, in the order of pids. namespace: "" for all."""
    paths = {inode: path for path, inode in listeners().items()}
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        words = _words(pid)
        names = [os.path.basename(word) for word in words[:3]]  # of a script its interpreter comes first
        name = next((name.removesuffix(".py") for name in names if NAME.fullmatch(name)), "")
        if not name or "-id" not in words or words[-1] in ("start", "delete"):
            continue
        if namespace and _flag(words, "namespace") != namespace:
            continue
        if _words(_parent(pid)) == words:  # the trial of new code, by the shim that is to be upgraded
            continue
        listening = sorted(paths[inode] for inode in _sockets_of(pid) if inode in paths)
        debug = next((path for path in listening if path.endswith(DEBUG_SUFFIX)), "")
        task = next((path for path in listening if not path.endswith(DEBUG_SUFFIX)), "")
        bundle = _link(f"/proc/{pid}/cwd")
        found.append(Shim(pid, name, _flag(words, "namespace"), _flag(words, "id"), bundle, debug, task))
    return found


def containers(shim: Shim) -> list[str]:
    """The ids of the containers that a shim serves.

    As it tells itself; of one that can't be asked, the bundles beside its own that name the same address: shims write it into
    `address`, containerd 2.x into bootstrap.json.
    """
    if look(shim).told:
        return sorted({one["container"] for one in shim.told["processes"] if not one["exec"]})
    found = [shim.id]
    try:
        beside = sorted(path for path in Path(shim.bundle).parent.iterdir() if path.name != shim.id)
    except OSError:
        return found
    for bundle in beside:
        for name in ("address", "bootstrap.json"):
            try:
                if shim.socket and shim.socket in (bundle / name).read_text(errors="replace"):
                    found.append(bundle.name)
                    break
            except OSError:
                continue
    return found


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("shim", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def ask(shim: Shim, path: str) -> bytes:
    """What a shim answers on its debug socket. Raises NoAnswer."""
    if not shim.debug:
        raise NoAnswer(f"{shim.name} (pid {shim.pid}) has no debug socket")
    connection = _Connection(shim.debug)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{shim.name} (pid {shim.pid}) does not answer on {shim.debug}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise NoAnswer(f"{shim.name} (pid {shim.pid}) answers {response.status}: {body.decode(errors='replace').strip()}")
    return body


class Lines:
    """Lines of what a debug socket goes on to tell, until the shim ends, or goes on with new code. A context manager.

    pid: the shim's. asked: whether there may be any.

    namespace: nothing is asked of a shim of another, and there are no lines; "" for any. Raises NoAnswer where nobody listens, or
    the answer is not 200.
    """

    def __init__(self, path: str, target: str, namespace: str = "") -> None:
        self._response: Iterable[bytes] = ()
        self.asked = False
        self._connection = _Connection(path)
        try:
            self._connect()
            self.pid: int = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            if namespace and namespace_of(self.pid) != namespace:
                return
            self._connection.request("GET", target)
            response = self._connection.getresponse()
            self._socket.settimeout(None)
            if response.status == 404:
                raise NoAnswer(f"the shim of pid {self.pid} is of an older shimcore: it does not tell this")
            if response.status != 200:
                why = response.read().decode(errors="replace").strip()
                raise NoAnswer(f"the shim of pid {self.pid} answers {response.status}: {why}")
            self._response = response
            self.asked = True
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise NoAnswer(f"nobody answers on {path}: {error}") from None
        except NoAnswer:
            self._connection.close()
            raise

    def _connect(self) -> None:
        """A socket that is bound may not listen yet, for an instant."""
        until = time.monotonic() + LISTEN_TIMEOUT
        while True:
            try:
                self._connection.connect()
            except ConnectionRefusedError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.001)
            else:
                self._socket = self._connection.sock
                return

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def __iter__(self) -> Iterator[bytes]:
        with contextlib.suppress(OSError):  # the shim was killed: what it told is all that there is
            yield from self._response


def look(shim: Shim) -> Shim:
    """With what it tells of itself, where it can be asked."""
    if shim.debug:
        try:
            shim.told = json.loads(ask(shim, "/dump"))
        except (NoAnswer, ValueError):
            pass
    return shim


def choose(wanted: str, among: list[Shim]) -> Shim:
    """The shim of a container's id (or namespace/id), of a unique beginning of it, or with this pid. Raises NoAnswer."""
    exact = [shim for shim in among if wanted in (shim.id, f"{shim.namespace}/{shim.id}", str(shim.pid))]
    served = exact or [shim for shim in among if any(one["container"] == wanted for one in look(shim).told.get("processes", ()))]
    found = served or [shim for shim in among if shim.id.startswith(wanted)]
    if not found:
        raise NoAnswer(f"no shim of a container {wanted}, and none with that pid")
    if len(found) > 1:
        raise NoAnswer(f"{wanted} fits several: " + ", ".join(f"{shim.namespace}/{shim.id} (pid {shim.pid})" for shim in found))
    return found[0]
