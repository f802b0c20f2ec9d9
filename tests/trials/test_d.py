"""Trials D1, D2 and D4: the start protocol of one installed shim. Each says what would turn it red.

D3 stands in tests/test_shim.py (stray output), D5 in tests/test_shim_daemon.py; `make matrix` runs it under real containerds.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any

from shimcore.protos import anys, bootstrap_pb2
from shimcore.protos.runc_options_pb2 import Options
from shimcore.rig import ActivationError, Rig, Session
from shimcore.rig.activate import GENERATIONS
from shimcore.rig.leaks import alive
from tests.faults import until

GROUPS = (None, "io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
NOWHERE = "/there/is/no/such/cgroup"


@pytest.fixture(params=GENERATIONS)
def rig(request: pytest.FixtureRequest, shim_dir: Path, rootfs: Path) -> Rig:
    rig = Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, generation=request.param)
    request.addfinalizer(lambda: rig.__exit__(None, None, None))
    return rig


# red: the answer always JSON of version 3: 1.6 and 1.7 take it for an address
def test_D1_one_shim_for_every_containerd(rig: Rig) -> None:
    container = rig.container(["sh", "-c", "echo out; exit 5"])
    started = container.started
    newest = rig.activator.generation == "2.3"
    assert (started.form, started.version) == (("protobuf", 3) if newest else ("plain", 2))
    assert container.run() == 5 and container.output == "out\n"
    container.delete()


def params(id: str, namespace: str, rig: Rig, options: Options | None = None) -> bytes:
    message = bootstrap_pb2.BootstrapParams(instance_id=id, namespace=namespace, containerd_ttrpc_address=rig.events.address)
    if options is not None:
        anys.pack(message.extensions.add().value, options)
    return message.SerializeToString()


def packed(options: Options) -> bytes:
    return anys.pack(Any(), options).SerializeToString()


def give(rig: Rig, stdin: bytes) -> None:
    """From now on `start` reads this, whatever containerd's generation."""
    rig.activator.stdin = lambda id, options=None: stdin  # type: ignore[method-assign]


# red: the first that parses is taken: an Any of options is BootstrapParams for a container called like its type
# Who sends BootstrapParams is answered as 2.3 is.
@pytest.mark.parametrize(
    ("rig", "kind"), [("2.3", "params"), *((one, kind) for one in GENERATIONS for kind in ("any", "empty"))], indirect=["rig"]
)
def test_D2_stdin_is_understood(rig: Rig, kind: str) -> None:
    """Options that ask for the impossible show that they were read; without them it starts as if nothing had been said."""
    id = f"d2-{uuid.uuid4().hex[:8]}"
    wrong = Options(shim_cgroup=NOWHERE)
    bad, good = {
        "params": (params(id, rig.namespace, rig, wrong), params(id, rig.namespace, rig)),
        "any": (packed(wrong), packed(Options(root=str(rig.root / "runc")))),
        "empty": (b"", b""),
    }[kind]
    if bad:
        give(rig, bad)
        with pytest.raises(ActivationError, match=NOWHERE):
            rig.container(["true"], id=id)
    give(rig, good)
    container = rig.container(["sh", "-c", "exit 3"], id=id)
    assert container.run() == 3
    container.delete()
    # It was this container that came, in this namespace, and no other was made of what was read.
    assert {(event.container, event.namespace) for event in rig.events.all} == {(id, rig.namespace)}


# red: what does not parse is taken for no options: a shim with the wrong runtime is started in silence
@pytest.mark.parametrize("kind", ["another's params", "another namespace's", "cut short", "text", "zeros", "random"])
def test_D2_stdin_is_not_understood(rig: Rig, kind: str) -> None:
    id = f"d2-{uuid.uuid4().hex[:8]}"
    stdin = {
        "another's params": params("somebody", rig.namespace, rig),
        "another namespace's": params(id, "elsewhere", rig),
        "cut short": packed(Options(root="/a/folder", binary_name="runc"))[:-3],
        "text": b"options, please\n",
        "zeros": bytes(64),
        "random": bytes.fromhex("fe8b19c3e0aa07d14b9c3d00ff71"),
    }[kind]
    give(rig, stdin)
    before = set(rig.leaks.processes())
    with pytest.raises(ActivationError) as failed:
        rig.container(["true"], id=id)
    assert failed.value.status == 1 and b"Traceback" not in failed.value.output
    assert set(rig.leaks.processes()) == before
    assert not rig.bundle_path(id).exists()


def other(rig: Rig, annotations: dict[str, str], version: int = 0) -> Session:
    """version: of the Task service; the one that `start` has named when 0."""
    container = rig.container(["sh", "-c", "exit 6"], annotations=annotations)
    if version:
        container.task.service = f"containerd.task.v{version}.Task"
    return container


# red: the group looked for under one name alone; task v3 not served
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", GROUPS, ids=["alone", "group", "sandbox"])
def test_D4_groups_and_versions(shim_dir: Path, rootfs: Path, name: str | None, version: int) -> None:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        group = {name: f"pod-{uuid.uuid4().hex[:8]}"} if name else {}
        containers = [other(rig, group, version) for _ in range(3)]
        assert len({container.shim_pid for container in containers}) == (1 if name else 3)
        assert len({container.started.address for container in containers}) == (1 if name else 3)
        for container in containers:
            assert container.run() == 6
        for number, container in enumerate(containers):
            container.delete()
            rest = containers[number + 1 :]
            for one in rest:
                assert one.task.state().exit_status == 6
            if not rest or not name:
                until(lambda: not alive(container.shim_pid))  # noqa: B023
                assert not os.path.exists(container.started.address.removeprefix("unix://"))


# red: a sandbox's annotation beside a group's makes a shim of its own
def test_D4_the_group_comes_before_the_sandbox(shim_dir: Path, rootfs: Path) -> None:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs) as rig:
        group = f"pod-{uuid.uuid4().hex[:8]}"
        first = other(rig, {GROUPS[1]: group, GROUPS[2]: "a"})  # type: ignore[dict-item]
        second = other(rig, {GROUPS[1]: group, GROUPS[2]: "b"})  # type: ignore[dict-item]
        assert first.shim_pid == second.shim_pid
        for container in (first, second):
            assert container.run() == 6
        first.delete()
        second.delete()
