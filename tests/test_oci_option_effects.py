"""Each runtime option, from the request to what it does; docs/options.md has the table."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shimcore.cgroup import add_task_to_cgroup, hierarchies
from shimcore.errors import FailedPrecondition
from shimcore.oci import options as known
from shimcore.oci.options import GENERIC_OPTIONS, LINUX_RUNC_OPTIONS
from shimcore.protos import linux_runc_pb2, runc_options_pb2, runtimeoptions_pb2, task_pb2
from shimcore.rig import Rig as RealRig
from tests.test_oci_checkpoint import Told
from tests.test_oci_service import Context, Rig, rig

__all__ = ["rig"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def told(rig: Rig, tmp_path: Path) -> Told:
    return Told(rig, tmp_path)


def calls(told: Told) -> list[list[str]]:
    """The argument vectors of every call, without the binary."""
    return [line.split() for line in (told.root / "argv").read_text().splitlines()]


def test_option_binary_name(told: Told) -> None:
    told.running()
    assert (told.rig.bundle("c1") / "runtime").read_text() == str(told.rig.runtime)  # which `delete` reads
    assert [words[words.index("json") + 1] for words in calls(told)] == ["create", "start"]


def test_option_root(told: Told) -> None:
    told.running()
    told.end()
    assert {tuple(words[:2]) for words in calls(told)} == {("--root", str(told.root / "state" / "ns"))}


def test_option_systemd_cgroup(told: Told) -> None:
    """It is said in all calls: runc takes another cgroup manager for each."""
    case = "--log-format) shift 2 ;;"
    told.rig.runtime.write_text(told.rig.runtime.read_text().replace(case, case + "\n    --systemd-cgroup) shift ;;"))
    told.running(systemd_cgroup=True)
    told.rig.exec("e")
    told.rig.start(exec_id="e")
    told.rig.kill(exec_id="e")
    told.rig.told(exec_id="e")
    told.end()
    assert len(calls(told)) == 4 and all("--systemd-cgroup" in words for words in calls(told))


@pytest.mark.parametrize("set", [True, False])
def test_option_no_pivot_root(told: Told, set: bool) -> None:
    told.running(no_pivot_root=set)
    assert ("--no-pivot" in told.argv("create")) is set


@pytest.mark.parametrize("set", [True, False])
def test_option_no_new_keyring(told: Told, set: bool) -> None:
    told.running(no_new_keyring=set)
    assert ("--no-new-keyring" in told.argv("create")) is set


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given away by root alone")
def test_option_io_uid_and_io_gid(told: Told) -> None:
    for name in ("out", "err", "in"):
        os.mkfifo(told.root / name)
    options = told.options(io_uid=1234, io_gid=2345)
    told.rig.create(stdin=str(told.root / "in"), stdout=str(told.root / "out"), stderr=str(told.root / "err"), options=options)
    owners = {name: (told.root / name).stat() for name in ("out", "err")}
    assert {(found.st_uid, found.st_gid) for found in owners.values()} == {(1234, 2345)}
    assert (told.root / "in").stat().st_uid == 0


def test_option_shim_cgroup(shim_dir: Path, tmp_path: Path, rootfs: Path, namespace: str) -> None:
    group = f"/{namespace}-shims-{uuid.uuid4().hex[:6]}"
    tops = [Path(found.mountpoint) for found in hierarchies()]
    made = [top / group[1:] for top in tops if not (top / "cpuset.cpus").exists()]  # which takes nobody before it is set up
    options = runc_options_pb2.Options(shim_cgroup=group, root=str(tmp_path / "runc"))
    for path in made:
        path.mkdir()
    try:
        with RealRig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, options=options) as real:
            box = real.container(["true"])
            paths = {line.split(":", 2)[2] for line in Path(f"/proc/{box.shim_pid}/cgroup").read_text().splitlines()}
            assert group in paths
            box.run()
            box.delete()
    finally:
        for path in made:
            path.rmdir()


def test_a_shim_cgroup_that_takes_nobody_says_what_to_do(namespace: str) -> None:
    top = next((found.mountpoint for found in hierarchies() if Path(found.mountpoint, "cpuset.cpus").exists()), "")
    if not top:
        pytest.skip("there is no cpuset hierarchy of cgroup v1")
    path = Path(top, f"{namespace}-cpuset-{uuid.uuid4().hex[:6]}")
    path.mkdir()
    try:
        with pytest.raises(FailedPrecondition, match=f"{path} takes no process: set its cpuset.cpus and cpuset.mems first"):
            add_task_to_cgroup(f"/{path.name}", os.getpid())
    finally:
        path.rmdir()


@pytest.mark.parametrize("field", ["criu_path", "criu_image_path", "criu_work_path"])
def test_option_criu_paths(told: Told, field: str) -> None:
    told.running(**{field: "/given"})
    told.checkpoint(path="" if field == "criu_image_path" else "/image")
    flag = {"criu_path": "--criu", "criu_image_path": "--image-path", "criu_work_path": "--work-path"}[field]
    argv = told.argv("checkpoint")
    assert argv[argv.index(flag) + 1] == "/given"


def test_option_task_api_address_and_version(told: Told) -> None:
    """For containerd itself, to find the shim of a sandbox: they are kept and change no call."""
    told.running(task_api_address="unix:///elsewhere", task_api_version=3)
    assert not [words for words in calls(told) if "elsewhere" in " ".join(words)]
    assert '"task_api_version": 3' in (told.rig.bundle("c1") / "options.json").read_text().replace('":3', '": 3')


# --- the other two messages, from the request to the call


def test_create_options_of_1_6(told: Told) -> None:
    message = linux_runc_pb2.CreateOptions(no_pivot_root=True, no_new_keyring=True)
    argv = created(told, AnyMessage(type_url=LINUX_RUNC_OPTIONS, value=message.SerializeToString()))
    assert "--no-pivot" in argv and "--no-new-keyring" in argv


def test_toml_from_cri(told: Told) -> None:
    toml = f'BinaryName = "{told.rig.runtime}"\nRoot = "{told.root}/other"\nNoPivotRoot = true\n'
    message = runtimeoptions_pb2.Options(type_url="containerd.runc.v1.Options", config_body=toml.encode())
    argv = created(told, AnyMessage(type_url=GENERIC_OPTIONS, value=message.SerializeToString()))
    assert "--no-pivot" in argv
    assert calls(told)[0][1] == f"{told.root}/other/ns"


def created(told: Told, options: AnyMessage) -> list[str]:
    """The call of create, of the runtime that is called runc on PATH."""
    (told.root / "bin").mkdir()
    link = told.root / "bin" / "runc"
    link.write_text(f'#!/bin/sh\nexec {told.rig.runtime} "$@"\n')
    link.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(told.root / "bin"), prepend=os.pathsep)
        request = task_pb2.CreateTaskRequest(id="c1", bundle=str(told.rig.bundle("c1")), options=options)
        told.rig.call(told.rig.task.create(request, Context()))
        argv = told.argv("create")
        told.rig.kill()
        told.rig.told()
        told.rig.delete()
    return argv


# --- the page


def rows() -> list[list[str]]:
    page = (ROOT / "docs" / "options.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]


def test_the_table_is_what_the_code_knows() -> None:
    found: dict[str, Any] = {row[0].strip("`"): row for row in rows() if len(row) == 6}
    assert list(found) == list(known._RUNC_FIELDS.values())
    for number, name in known._RUNC_FIELDS.items():
        old = next((str(at) for at, field in known._LINUX_FIELDS.items() if field == name), "–")
        key = found[name][3].strip("`")
        assert found[name][1:3] == [str(number), old], name
        assert known._BY_TOML_KEY[key.lower()] == name
    sources = Path(__file__).read_text()
    named = [test for row in found.values() for test in re.findall(r"`(test_\w+)`", row[5])]
    assert len(named) == len(found) and all(f"def {test}(" in sources for test in named)
