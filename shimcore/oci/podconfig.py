"""What a pod asks of its sandbox: the parts of CRI's runtime.v1.PodSandboxConfig that a shim has a use for.

Decoded by hand: a message of a few thousand lines of .proto for ten fields. Field numbers: api.proto of k8s.io/cri-api.
"""

from __future__ import annotations

from .. import wire
from ..errors import InvalidArgument, Unimplemented

POD_CONFIG = "runtime.v1.PodSandboxConfig"

# NamespaceMode
POD, CONTAINER, NODE = 0, 1, 2


class PodConfig:
    """hostname, dns (lines of a resolv.conf), cgroup_parent and sysctls; network, pid, ipc: whose namespace, a NamespaceMode."""

    __slots__ = ("cgroup_parent", "dns", "hostname", "ipc", "network", "pid", "sysctls")

    def __init__(self) -> None:
        self.hostname = ""
        self.dns: list[str] = []
        self.cgroup_parent = ""
        self.sysctls: dict[str, str] = {}
        self.network = self.ipc = POD
        self.pid = CONTAINER


def from_any(type_url: str, value: bytes) -> PodConfig:
    """The defaults when it is another message, or none: whoever makes a sandbox without CRI says nothing of these.

    Raises InvalidArgument when it can't be read, and Unimplemented for a user namespace."""
    config = PodConfig()
    if type_url.rpartition("/")[2] == POD_CONFIG:
        try:
            _pod(config, value)
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"the pod's configuration can't be read: {error}") from None
    return config


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number stands where a message or string should")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()


def _pod(config: PodConfig, data: bytes) -> None:
    for number, value in wire.fields(data):
        if number == 2:
            config.hostname = _text(value)
        elif number == 4:
            _dns(config, _bytes(value))
        elif number == 8:
            config.pid = POD  # proto3's default, once there is a Linux part
            _linux(config, _bytes(value))


def _dns(config: PodConfig, data: bytes) -> None:
    words: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for number, value in wire.fields(data):
        words.setdefault(number, []).append(_text(value))
    config.dns = [f"nameserver {server}" for server in words[1]]
    config.dns += [f"{name} {' '.join(words[number])}" for number, name in ((2, "search"), (3, "options")) if words[number]]


def _linux(config: PodConfig, data: bytes) -> None:
    for number, value in wire.fields(data):
        if number == 1:
            config.cgroup_parent = _text(value)
        elif number == 2:
            for inner, options in wire.fields(_bytes(value)):
                if inner == 1:
                    _namespaces(config, _bytes(options))
        elif number == 3:
            pair = {key: _text(word) for key, word in wire.fields(_bytes(value))}
            config.sysctls[pair.get(1, "")] = pair.get(2, "")


def _namespaces(config: PodConfig, data: bytes) -> None:
    for number, value in wire.fields(data):
        if number == 1:
            config.network = int(value)
        elif number == 2:
            config.pid = int(value)
        elif number == 3:
            config.ipc = int(value)
        elif number == 5 and dict(wire.fields(_bytes(value))).get(1, POD) == POD:
            raise Unimplemented("a pod with a user namespace of its own: use sandboxer = \"podsandbox\" for it")
