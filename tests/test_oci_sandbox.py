"""The Sandbox service, by the rig: containerd's calls and their answers, without containerd."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shimcore import wire
from shimcore.errors import AlreadyExists, Closed, FailedPrecondition, InvalidArgument, NotFound, ShimError, Unimplemented
from shimcore.oci import podconfig
from shimcore.oci.sandbox import READY, SERVICE, pod_cgroups
from shimcore.protos import sandbox_pb2 as pb
from shimcore.rig import Rig
from shimcore.rig.bundle import spec
from shimcore.testing.leaks import CGROUPS
from shimcore.ttrpc import Client
from tests.containerd.daemon import alive, wait_for

GROUP = "io.kubernetes.cri.sandbox-id"


def pod(network: int = 2, pid: int = 1, ipc: int = 0, **words: str) -> AnyMessage:
    """A runtime.v1.PodSandboxConfig: modes of its namespaces; words: hostname, server (of DNS), parent, sysctl "name=value"."""
    options = b"".join(wire.integer(number, value) for number, value in ((1, network), (2, pid), (3, ipc)))
    linux = wire.string(1, words.get("parent", "")) + wire.message(2, wire.message(1, options))
    if "sysctl" in words:
        name, _, value = words["sysctl"].partition("=")
        linux += wire.message(3, wire.string(1, name) + wire.string(2, value))
    if "userns" in words:
        linux = wire.message(2, wire.message(1, options + wire.message(5, wire.integer(1, 0))))
    value = wire.string(2, words.get("hostname", ""))
    if "server" in words:
        value += wire.message(4, wire.string(1, words["server"]) + wire.string(2, "example.org"))
    return AnyMessage(type_url=podconfig.POD_CONFIG, value=value + wire.message(8, linux))


class Shim:
    """A shim that was started for a sandbox, as containerd does it: a bundle without config.json."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.id = f"pod{os.urandom(3).hex()}"
        self.bundle = rig.bundle_path(self.id)
        self.bundle.mkdir(parents=True)
        os.mkfifo(self.bundle / "log")
        self.log = os.open(self.bundle / "log", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        started = rig.activator.start(self.id, self.bundle, rig.options)
        self.address = started.address
        rig.leaks.addresses.add(started.address)
        self.client = Client(started.address, namespace=rig.namespace)
        self.pid = self.client.peer_credentials()[0]

    def call(self, method: str, *, timeout: float = 10.0, **fields: Any) -> Any:
        name = "Ping" if method == "PingSandbox" else method
        request = getattr(pb, f"{name}Request")(sandbox_id=fields.pop("sandbox_id", self.id), **fields)
        return self.client.call(SERVICE, method, request, getattr(pb, f"{name}Response"), timeout)

    def create(self, options: AnyMessage | None = None, **fields: Any) -> None:
        self.call("CreateSandbox", bundle_path=str(self.bundle), options=options or pod(), **fields)

    def end(self) -> None:
        """containerd's way: Stop, Shutdown, close, `delete`. Also when there is no sandbox, or no shim any more."""
        for method in ("StopSandbox", "ShutdownSandbox"):
            try:
                self.call(method)
            except (ShimError, Closed):
                pass
        try:
            self.client.call("containerd.task.v3.Task", "Shutdown", b"", None, 5.0)
        except (ShimError, Closed):
            pass
        self.client.close()
        self.rig.activator.delete(self.id, self.bundle)
        wait_for("end of the shim", lambda: not alive(self.pid))
        os.close(self.log)
        assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.bundle) in line]
        shutil.rmtree(self.bundle)


@pytest.fixture
def shim(make_rig: Callable[..., Rig], shim_dir: Path) -> Iterator[Shim]:
    made = Shim(make_rig(shim_dir / "containerd-shim-runc-v2-py", generation="2.3"))
    yield made
    made.end()


def namespaces(pid: int) -> dict[str, str]:
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "ipc", "uts", "pid", "mnt")}


def test_from_create_to_shutdown(shim: Shim) -> None:
    shim.create()
    before = shim.call("SandboxStatus")
    assert (before.state, before.pid, before.HasField("created_at")) == ("SANDBOX_NOTREADY", 0, False)
    started = shim.call("StartSandbox")
    assert alive(started.pid)
    status = shim.call("SandboxStatus", verbose=True)
    assert (status.sandbox_id, status.state, status.pid) == (shim.id, READY, started.pid)
    assert status.created_at == started.created_at and not status.HasField("exited_at")
    assert json.loads(status.info["shim"])["shim"] == shim.pid
    shim.call("PingSandbox")
    platform = shim.call("Platform").platform
    assert (platform.os, platform.architecture) == ("linux", {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine])

    ended: list[Any] = []
    waiter = threading.Thread(target=lambda: ended.append(shim.call("WaitSandbox", timeout=60.0)))
    waiter.start()
    shim.call("StopSandbox")
    waiter.join(10)
    assert ended[0].exit_status == 137 and not alive(started.pid)
    shim.call("StopSandbox")
    assert shim.call("WaitSandbox") == ended[0]
    after = shim.call("SandboxStatus")
    assert (after.state, after.exited_at) == ("SANDBOX_NOTREADY", ended[0].exited_at)
    shim.call("ShutdownSandbox")
    wait_for("end of the shim", lambda: not alive(shim.pid))


# red: only the processes of the exit table looked at after a SIGTERM
def test_sigterm_waits_for_the_end_of_the_sandbox(make_rig: Callable[..., Rig], shim_dir: Path) -> None:
    shim = Shim(make_rig(shim_dir / "containerd-shim-runc-v2-py", generation="2.3", debug=True))
    gone = os.pidfd_open(shim.pid)
    try:
        shim.create()
        shim.call("StartSandbox")
        os.kill(shim.pid, signal.SIGTERM)
        log = b""
        while b"SIGTERM" not in log:  # it is handled on the thread that answers
            assert select.select([shim.log], [], [], 10)[0], log
            log += os.read(shim.log, 65536)
        assert shim.call("SandboxStatus").state == READY
        assert not select.select([gone], [], [], 0.2)[0]
        shim.call("StopSandbox")
        assert shim.call("WaitSandbox").exit_status == 137
        assert select.select([gone], [], [], 10)[0], "the shim did not end"
    finally:
        os.close(gone)
        shim.end()


def test_of_namespaces_the_pod_gets_what_it_asks_for(shim: Shim) -> None:
    shim.create(pod(pid=0))
    found, own = namespaces(shim.call("StartSandbox").pid), namespaces(shim.pid)
    assert [kind for kind in own if found[kind] != own[kind]] == ["ipc", "pid"]


def test_a_network_namespace_a_name_and_sysctls(shim: Shim, tmp_path: Path) -> None:
    holder = os.fork()
    if not holder:  # a network namespace to hand over, as CRI makes one
        os.execvp("unshare", ["unshare", "--net", "sleep", "1000"])
    try:
        path = f"/proc/{holder}/ns/net"
        wait_for("network namespace", lambda: os.readlink(path) != os.readlink("/proc/self/ns/net"))
        config = pod(0, hostname="podhost", server="10.0.0.53", sysctl="net.ipv4.ip_unprivileged_port_start=81")
        shim.create(config, netns_path=path)
        found = namespaces(shim.call("StartSandbox").pid)
        own = namespaces(shim.pid)
        assert found["net"] == os.readlink(path)
        assert [kind for kind in own if found[kind] != own[kind]] == ["net", "ipc", "uts"]
        container = joined(shim, "cat /etc/hostname /etc/resolv.conf; hostname; sysctl -n net.ipv4.ip_unprivileged_port_start")
        assert container.run() == 0
        assert container.output.split("\n") == ["podhost", "nameserver 10.0.0.53", "search example.org", "podhost", "81", ""]
        container.delete()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def joined(shim: Shim, script: str, readonly: bool = False) -> Any:
    """A container of the pod; the session of the rig."""
    pid = shim.call("SandboxStatus").pid
    config = spec(["sh", "-c", script], root=str(shim.rig.rootfs), cgroups_path=f"/{shim.rig.namespace}/c{os.urandom(3).hex()}")
    config["annotations"] = {GROUP: shim.id}
    config["root"]["readonly"] = readonly
    kinds = {"network": "net", "ipc": "ipc", "uts": "uts"}
    for one in config["linux"]["namespaces"]:
        if one["type"] in kinds:
            one["path"] = f"/proc/{pid}/ns/{kinds[one['type']]}"
    return shim.rig.container(spec=config)


def test_the_pods_containers_share_its_shim_and_memory(shim: Shim) -> None:
    shim.create()
    shim.call("StartSandbox")
    one = joined(shim, "echo shared >/dev/shm/file; exec sleep 1000")
    one.create()
    one.start()
    wait_for("file", lambda: (shim.bundle / "pod/shm/file").exists())
    two = joined(shim, "cat /dev/shm/file")
    assert two.run() == 0 and two.output == "shared\n"
    assert {one.started.address, two.started.address} == {shim.address}
    two.delete()
    one.task.kill(signal.SIGKILL)
    one.wait()
    one.delete()
    # containerd says Shutdown of each container's task: the sandbox lives on.
    shim.call("PingSandbox")
    assert shim.call("SandboxStatus").state == READY


def test_what_is_killed_from_outside_ends_the_sandbox(shim: Shim) -> None:
    shim.create()
    pid = shim.call("StartSandbox").pid
    os.kill(pid, signal.SIGKILL)
    assert shim.call("WaitSandbox").exit_status == 137
    assert shim.call("SandboxStatus").state == "SANDBOX_NOTREADY"
    shim.call("StopSandbox")


def test_the_pause_process_ends_with_a_killed_shim(shim: Shim) -> None:
    shim.create()
    pid = shim.call("StartSandbox").pid
    os.kill(shim.pid, signal.SIGKILL)
    wait_for("end of the pause process", lambda: not alive(pid))


def test_refusals(shim: Shim) -> None:
    for method in ("StartSandbox", "StopSandbox", "SandboxStatus", "PingSandbox", "Platform", "ShutdownSandbox", "WaitSandbox"):
        with pytest.raises(NotFound):
            shim.call(method)
    with pytest.raises(Unimplemented, match="podsandbox"):
        shim.create(pod(userns="pod"))
    with pytest.raises(InvalidArgument, match="would be the node's"):
        shim.create(pod(sysctl="net.ipv4.ip_forward=1"))
    with pytest.raises(InvalidArgument, match="can't be read"):
        shim.create(AnyMessage(type_url=podconfig.POD_CONFIG, value=b"\x42\xff"))
    with pytest.raises(InvalidArgument):
        shim.call("CreateSandbox", bundle_path="relative")
    shim.create(netns_path="/no/such/namespace")
    with pytest.raises(AlreadyExists):
        shim.create()
    with pytest.raises(NotFound):
        shim.call("PingSandbox", sandbox_id="another")
    with pytest.raises(ShimError, match="can't enter the network namespace /no/such/namespace: No such file"):
        shim.call("StartSandbox")
    with pytest.raises(NotFound, match="no cgroup"):
        shim.call("SandboxMetrics")


def test_a_sandbox_starts_once(shim: Shim) -> None:
    shim.create()
    shim.call("StartSandbox")
    with pytest.raises(FailedPrecondition):
        shim.call("StartSandbox")


def test_metrics_are_the_pods(shim: Shim) -> None:
    parent = f"/{shim.rig.namespace}/{shim.id}"
    shim.create(pod(parent=parent))
    shim.call("StartSandbox")
    container = joined(shim, "exec sleep 1000")
    config = json.loads((container.bundle.path / "config.json").read_text())
    config["linux"]["cgroupsPath"] = f"{parent}/one"
    (container.bundle.path / "config.json").write_text(json.dumps(config))
    container.create()
    container.start()
    metric = shim.call("SandboxMetrics").metrics
    assert metric.id == shim.id and metric.data.type_url.startswith("io.containerd.cgroups.v")
    from shimcore.protos import metrics_v1_pb2, metrics_v2_pb2

    v1 = metric.data.type_url.endswith("v1.Metrics")
    found = (metrics_v1_pb2.Metrics if v1 else metrics_v2_pb2.Metrics).FromString(metric.data.value)
    assert (found.memory.usage.usage if v1 else found.memory.usage) > 0
    container.task.kill(signal.SIGKILL)
    container.wait()
    container.delete()
    for folder in {*CGROUPS.glob(f"*{parent}"), *CGROUPS.glob(parent[1:])}:
        folder.rmdir()


def test_a_slice_is_in_its_parents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shimcore import cgroup

    found = [cgroup.Hierarchy(str(tmp_path), "/", (), True)]
    monkeypatch.setattr(cgroup, "hierarchies", lambda: found)
    folder = tmp_path / "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab.slice"
    folder.mkdir(parents=True)
    assert pod_cgroups("kubepods-burstable-podab.slice") == {"": str(folder)}
    assert pod_cgroups("") == {} and pod_cgroups("/none") == {}
