"""Pods through containerd's CRI plugin, as a kubelet asks for them: by the stock shim and by ours, and by ours as the sandbox."""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore.cli import nodes
from shimcore.testing.leaks import RUNC, Guard
from tests.containerd.conftest import TRAPPED
from tests.containerd.cri import CNI, SUBNET, Cri, Pod, containerd_version, crictl_path
from tests.containerd.daemon import alive, wait_for

# Handlers by which the shim is the pod's sandbox; stdio of the second are streams.
BY_SHIM = ("ours-sandbox", "ours-streaming", "shimcore-sandbox")

NewPod = Callable[..., Pod]


@pytest.fixture(scope="module")
def cri(session_root: Path, namespace: str, rootfs: Path, shim_dir: Path) -> Iterator[Cri]:
    if crictl_path() is None:
        pytest.skip("there is no crictl: `make cri` builds it")
    daemon = Cri(session_root / "cri", namespace, [shim_dir])
    try:
        daemon.start()
        daemon.load(rootfs)
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(params=["stock", "ours", "ours-sandbox", "ours-streaming"])
def handler(request: pytest.FixtureRequest) -> str:
    if request.param in BY_SHIM and containerd_version() < (2, 0):
        pytest.skip("sandboxes by the shim, and streams, came with containerd 2.0")
    return str(request.param)


@pytest.fixture
def new_pod(cri: Cri, handler: str, leak_guard: Guard, request: pytest.FixtureRequest) -> Iterator[NewPod]:
    """A function that makes a pod; after the test they are removed, and nothing of them may be left."""
    before = set(leak_guard.find())
    pods: list[Pod] = []

    def make(**options: object) -> Pod:
        if handler in BY_SHIM and not options.get("network") and cri.version < (2, 3):
            pytest.skip("containerd before 2.3 crashes as it makes a sandbox by the shim in the node's network")
        pods.append(Pod(cri, handler, f"p{uuid.uuid4().hex[:8]}", **options))  # type: ignore[arg-type]
        return pods[-1]

    def ids() -> list[str]:
        return [one for pod in pods for one in (pod.id, *pod.containers)]

    yield make
    if not getattr(request.node, "passed", False):
        cri.crictl("rmp", "-f", "-a", check=False)
        for pod in pods:
            pod.destroy()
        for id in ids():
            shutil.rmtree(RUNC / "k8s.io" / id, ignore_errors=True)
        return
    made = ids()
    for pod in pods:
        pod.remove()

    def left() -> list[str]:
        found = [one for one in set(leak_guard.find()) - before if not one.startswith(f"process {cri.pid}:")]
        state = cri.root / "state"
        found += [str(path) for id in made for path in [RUNC / "k8s.io" / id, *state.glob(f"*/k8s.io/{id}")] if path.exists()]
        return found

    wait_for("clean machine", lambda: not left(), detail=left)


def test_cri_a_pod_from_run_to_remove(cri: Cri, new_pod: NewPod) -> None:
    pod = new_pod()
    assert pod.state == "SANDBOX_READY"
    made = pod.create("one", f"echo out; echo err >&2; {TRAPPED}")
    assert pod.status(made)["state"] == "CONTAINER_CREATED"
    cri.crictl("start", made)
    assert pod.status(made)["state"] == "CONTAINER_RUNNING"

    assert cri.crictl("exec", "--sync", made, "/bin/echo", "at once").stdout.strip() == "at once"
    done = cri.crictl("exec", made, "/bin/sh", "-c", "echo inside; exit 3", check=False)
    assert done.stdout == "inside\n" and "exit code 3" in done.stderr
    assert cri.crictl("exec", "-i", made, "/bin/cat", input="over the stream\n").stdout == "over the stream\n"

    wait_for("logs", lambda: len(cri.crictl("logs", made).stdout.splitlines()) == 1)
    logs = cri.crictl("logs", made)
    assert (logs.stdout, logs.stderr) == ("out\n", "err\n")

    stats = cri.ask("stats", "--id", made)["stats"]
    assert len(stats) == 1 and int(stats[0]["memory"]["workingSetBytes"]["value"]) > 0
    assert int(stats[0]["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
    of_pod = cri.ask("statsp", "--id", pod.id)["stats"]
    assert [one["attributes"]["id"] for one in of_pod] == [pod.id]

    cri.crictl("stop", "--timeout", "10", made)
    assert pod.wait(made) == 7
    cri.crictl("rm", made)
    pod.containers.remove(made)
    cri.crictl("stopp", pod.id)
    assert pod.state == "SANDBOX_NOTREADY"


# red: the shim's sockets are in the network namespace of this containerd, which is not ours
def test_cri_the_shims_tell_of_themselves(cri: Cri, new_pod: NewPod, handler: str) -> None:
    if handler == "stock":
        pytest.skip("the stock shim has no debug socket")
    pod = new_pod()
    (shim,) = [nodes.look(one) for one in nodes.shims("k8s.io") if one.id == pod.id]
    wanted = {"id": pod.id, "state": "SANDBOX_READY"} if handler in BY_SHIM else None
    told = shim.told["task"]["sandbox"]
    assert (told and {key: told[key] for key in ("id", "state")}) == wanted
    assert nodes.containers(shim) == ([] if handler in BY_SHIM else [pod.id])


@pytest.mark.parametrize("handler", ["shimcore", "shimcore-sandbox"])
def test_the_handlers_of_deploy(new_pod: NewPod, handler: str) -> None:
    pod = new_pod()
    made = pod.run("hello", "echo hello from a shim in Python; exit 4")
    assert pod.wait(made) == 4


def test_cri_exit_codes(new_pod: NewPod) -> None:
    pod = new_pod()
    made = [pod.run(f"n{code}", f"exit {code}") for code in (0, 1, 42)]
    assert [pod.wait(one) for one in made] == [0, 1, 42]
    assert [pod.status(one)["reason"] for one in made] == ["Completed", "Error", "Error"]


def test_cri_a_network_and_files_of_the_pods_own(cri: Cri, new_pod: NewPod) -> None:
    if not (CNI / "bridge").exists():
        pytest.skip("there are no CNI plugins (Debian's containernetworking-plugins)")
    pod = new_pod(network=True)
    address = cri.ask("inspectp", pod.id)["status"]["network"]["ip"]
    assert address.startswith(f"{SUBNET}.")
    made = pod.run("one", TRAPPED)
    other = pod.run("two", TRAPPED)
    for one in (made, other):
        assert address in cri.crictl("exec", "--sync", one, "/bin/ip", "address", "show", "eth0").stdout
    cri.crictl("exec", "--sync", other, "/bin/ping", "-c", "1", f"{SUBNET}.1")
    # What the containers of a pod share: its name, its resolver, its shared memory.
    for file in ("hostname", "resolv.conf", "hosts"):
        texts = {cri.crictl("exec", one, "/bin/cat", f"/etc/{file}").stdout for one in (made, other)}
        assert len(texts) == 1 and texts != {""}, file
    assert cri.crictl("exec", made, "/bin/cat", "/etc/hostname").stdout.strip() == "podhost"
    assert cri.crictl("exec", made, "/bin/hostname").stdout.strip() == "podhost"
    assert "nameserver 10.0.0.53" in cri.crictl("exec", made, "/bin/cat", "/etc/resolv.conf").stdout.splitlines()
    cri.crictl("exec", made, "/bin/sh", "-c", "echo shared >/dev/shm/file")
    assert cri.crictl("exec", other, "/bin/cat", "/dev/shm/file").stdout == "shared\n"
    assert cri.crictl("exec", made, "/bin/cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").stdout == "81\n"


def test_cri_a_pid_namespace_shared_in_the_pod(cri: Cri, new_pod: NewPod) -> None:
    pod = new_pod(pid=0)
    made = pod.run("one", TRAPPED)
    other = pod.run("two", "sleep 1000")
    seen = cri.crictl("exec", "--sync", made, "/bin/ps", "-o", "args").stdout
    assert "sleep 1000" in seen.splitlines()
    # Without a pid namespace of its own a container's children don't die with its init: the shim ends them.
    child = pod.run("three", "sleep 2000 & exit 5")
    assert pod.wait(child) == 5
    wait_for("end of the child", lambda: "sleep 2000" not in cri.crictl("exec", "--sync", made, "/bin/ps", "-o", "args").stdout)
    assert pod.status(other)["state"] == "CONTAINER_RUNNING"


def test_cri_a_pod_outlives_containerd(cri: Cri, new_pod: NewPod) -> None:
    pod = new_pod()
    made = pod.run("one", TRAPPED)
    cri.restart()
    assert pod.state == "SANDBOX_READY" and pod.status(made)["state"] == "CONTAINER_RUNNING"
    assert cri.crictl("exec", made, "/bin/echo", "still here").stdout == "still here\n"
    later = pod.run("two", "exit 9")
    assert pod.wait(later) == 9


def test_cri_a_killed_shim_ends_the_pod(cri: Cri, new_pod: NewPod, handler: str) -> None:
    pod = new_pod()
    made = pod.run("one", TRAPPED)
    pid = cri.ask("inspect", made)["info"]["pid"]
    socket = cri.shim_socket(pod.id)
    os.kill(cri.shim_pid(pod.id), signal.SIGKILL)
    if handler == "stock":
        socket.unlink(missing_ok=True)  # 1.6's leaves it
    pod.wait(made)
    wait_for("end of the pod", lambda: pod.state == "SANDBOX_NOTREADY")
    wait_for("end of the container", lambda: not alive(pid))
