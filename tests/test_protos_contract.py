"""Our messages and services, held field by field against the .proto files that containerd itself ships.

There are two references. Debian's -dev packages hold containerd 1.6, cgroups 1.0 and ttrpc 1.1; the Go module
cache, if somebody has downloaded into it, holds the newest. How they differ from ours is written down in the
tables here, and a difference that is in no table fails.

    golang-github-containerd-containerd-dev golang-github-containerd-cgroups-dev
    golang-github-containerd-ttrpc-dev golang-github-gogo-protobuf-dev golang-github-gogo-googleapis-dev

    go mod download github.com/containerd/containerd/api@latest github.com/containerd/cgroups/v3@latest \
        github.com/containerd/ttrpc@latest
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from shimcore import protos

grpc_tools = pytest.importorskip("grpc_tools")

DEBIAN = Path("/usr/share/gocode/src")
CONTAINERD = "github.com/containerd/containerd"
MODULES = sorted(path.stem for path in Path(protos.__file__).parent.glob("*.proto"))

# Compiled by a run of protoc each: two of Debian's import gogo.proto by different names.
DEBIAN_FILES = [
    f"{CONTAINERD}/runtime/v2/task/shim.proto",
    f"{CONTAINERD}/runtime/v2/runc/options/oci.proto",
    f"{CONTAINERD}/runtime/linux/runctypes/runc.proto",
    f"{CONTAINERD}/pkg/runtimeoptions/v1/api.proto",
    f"{CONTAINERD}/api/types/descriptor.proto",
    f"{CONTAINERD}/api/types/metrics.proto",
    f"{CONTAINERD}/api/types/mount.proto",
    f"{CONTAINERD}/api/types/platform.proto",
    f"{CONTAINERD}/api/types/task/task.proto",
    f"{CONTAINERD}/api/services/ttrpc/events/v1/events.proto",
    f"{CONTAINERD}/api/events/task.proto",
    "github.com/containerd/cgroups/stats/v1/metrics.proto",
    "github.com/containerd/cgroups/v2/stats/metrics.proto",
    "google/rpc/status.proto",
]
NEWEST_FILES = [
    ("containerd/api", "runtime/task/v2/shim.proto"),
    ("containerd/api", "runtime/task/v3/shim.proto"),
    ("containerd/api", "runtime/sandbox/v1/sandbox.proto"),
    ("containerd/api", "runtime/bootstrap/v1/bootstrap.proto"),
    ("containerd/api", "events/task.proto"),
    ("containerd/api", "services/ttrpc/events/v1/events.proto"),
    ("containerd/api", "types/descriptor.proto"),
    ("containerd/api", "types/event.proto"),
    ("containerd/api", "types/introspection.proto"),
    ("containerd/api", "types/metrics.proto"),
    ("containerd/api", "types/mount.proto"),
    ("containerd/api", "types/platform.proto"),
    ("containerd/api", "types/runc/options/oci.proto"),
    ("containerd/api", "types/runtimeoptions/v1/api.proto"),
    ("containerd/api", "types/sandbox.proto"),
    ("containerd/api", "types/task/task.proto"),
    ("containerd/api", "services/streaming/v1/streaming.proto"),
    ("containerd/api", "types/transfer/streaming.proto"),
    ("cgroups/v3", "cgroup1/stats/metrics.proto"),
    ("cgroups/v3", "cgroup2/stats/metrics.proto"),
    ("ttrpc", "request.proto"),
]

# A type whose name is not on the wire, by the name we give it.
RENAMED = {
    "google.rpc.Status": "ttrpc.Status",
    "containerd.types.Envelope": "containerd.services.events.ttrpc.v1.Envelope",
}
# Messages of the reference that no shim sends or gets.
UNWANTED = {
    "ttrpc.StringList",
    "containerd.types.ActiveMount",
    "containerd.types.ActivationInfo",
    "containerd.types.transfer.ReadStream",
    "containerd.types.transfer.WriteStream",
}
# Fields of ours that the reference does not have: what came after 1.6, and what 2.x no longer has.
SINCE_1_6 = {
    "containerd.runc.v1.Options": {"task_api_address", "task_api_version"},
    "containerd.runc.v1.CheckpointOptions": {"parent_path"},
    "containerd.types.Platform": {"os_version", "os_features"},
    "runtimeoptions.v1.Options": {"config_body"},
    "io.containerd.cgroups.v2.Metrics": {"network"},
    "io.containerd.cgroups.v2.CPUStat": {"psi", "nr_bursts", "burst_usec"},
    "io.containerd.cgroups.v2.MemoryStat": {
        "max_usage",
        "swap_max_usage",
        "psi",
        "workingset_refault_anon",
        "workingset_refault_file",
        "workingset_activate_anon",
        "workingset_activate_file",
    },
    "io.containerd.cgroups.v2.MemoryEvents": {"oom_group_kill"},
    "io.containerd.cgroups.v2.IOStat": {"psi"},
    "io.containerd.cgroups.v2.HugeTlbStat": {"failcnt"},
}
# The counters that Linux 5.9 split are on cgroups' main branch, in no release up to 3.1.3.
NOT_IN_NEWEST = {
    "containerd.runc.v1.Options": {"criu_path"},
    "io.containerd.cgroups.v2.MemoryStat": {
        "workingset_refault_anon",
        "workingset_refault_file",
        "workingset_activate_anon",
        "workingset_activate_file",
    },
}

# By full name: a message's fields, an enum's values or a service's methods, by their name.
Contract = dict[str, dict[str, tuple[object, ...]]]


def _field_names(type_name: str) -> str:
    name = type_name.lstrip(".")
    return RENAMED.get(name, name)


def _enum(enum: EnumDescriptorProto) -> dict[str, tuple[object, ...]]:
    return {value.name: (value.number,) for value in enum.value}


def _message(into: Contract, prefix: str, message: DescriptorProto) -> None:
    full = f"{prefix}.{message.name}"
    into[RENAMED.get(full, full)] = {
        field.name: (
            field.number,
            field.type,
            field.label,
            _field_names(field.type_name),
            field.proto3_optional,
        )
        for field in message.field
    }
    for enum in message.enum_type:
        into[f"{full}.{enum.name}"] = _enum(enum)
    for nested in message.nested_type:
        _message(into, full, nested)


def contract(*files: FileDescriptorProto) -> Contract:
    """What `files` say, in a form that compares without regard to order, comments, options or file names."""
    into: Contract = {}
    for file in files:
        for message in file.message_type:
            _message(into, file.package, message)
        for enum in file.enum_type:
            into[f"{file.package}.{enum.name}"] = _enum(enum)
        for service in file.service:
            into[f"{file.package}.{service.name}"] = {
                method.name: (
                    _field_names(method.input_type),
                    _field_names(method.output_type),
                    method.client_streaming,
                    method.server_streaming,
                )
                for method in service.method
            }
    return into


def differences(ours: Contract, theirs: Contract, extra: dict[str, set[str]]) -> list[str]:
    """One line for each way in which `ours` is not `theirs`; `extra` is what has to be ours alone."""
    lines = []
    for name, members in theirs.items():
        if name in UNWANTED or name.rpartition(".")[0] in UNWANTED:
            continue
        if name not in ours:
            lines.append(f"{name}: not ours")
            continue
        for member, facts in members.items():
            if member not in ours[name]:
                lines.append(f"{name}.{member}: not ours")
            elif ours[name][member] != facts:
                lines.append(f"{name}.{member}: ours {ours[name][member]}, theirs {facts}")
        if ours[name].keys() - members.keys() != extra.get(name, set()):
            lines.append(f"{name}: ours alone: {sorted(ours[name].keys() - members.keys())}")
    return lines


def our_files() -> list[FileDescriptorProto]:
    """What the generated modules hold at run time, which is what counts."""
    files = []
    for name in MODULES:
        file = FileDescriptorProto()
        importlib.import_module(f"shimcore.protos.{name}_pb2").DESCRIPTOR.CopyToProto(file)
        files.append(file)
    return files


def compile_proto(file: str, includes: list[Path], out: Path) -> FileDescriptorProto:
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    flags = [f"-I{path}" for path in [*includes, builtin]]
    command = [sys.executable, "-m", "grpc_tools.protoc", *flags, f"--descriptor_set_out={out}", file]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{file} does not compile:\n{done.stdout}"
    return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def debian_contract(tmp_path: Path) -> tuple[Contract, list[str]]:
    """The contract of Debian's packages, and the files that are not there."""
    includes = [DEBIAN / "github.com/gogo/protobuf", DEBIAN, DEBIAN / "github.com/gogo/googleapis"]
    there = [file for file in DEBIAN_FILES if any((path / file).exists() for path in includes)]
    files = [compile_proto(file, includes, tmp_path / "set") for file in there]
    return contract(*files), [file for file in DEBIAN_FILES if file not in there]


def module_cache() -> Path:
    cache = os.environ.get("GOMODCACHE") or Path(os.environ.get("GOPATH") or Path.home() / "go") / "pkg/mod"
    return Path(cache) / "github.com/containerd"


def _version(path: Path) -> list[int]:
    # A pre-release sorts below its release, by the -1.
    number, _, pre = path.name.rpartition("@")[2].lstrip("v").partition("-")
    return [*map(int, number.split(".")), -1 if pre else 0]


def newest_contract(tmp_path: Path) -> tuple[Contract, list[str]]:
    files, absent = [], []
    for module, file in NEWEST_FILES:
        found = sorted(module_cache().glob(f"{module}@v*"), key=_version)
        if not found:
            absent.append(f"{module}: {file}")
            continue
        includes = [found[-1], DEBIAN / "github.com/gogo/googleapis"]
        files.append(compile_proto(file, includes, tmp_path / "set"))
    return contract(*files), absent


def report(capsys: pytest.CaptureFixture[str], what: str, theirs: Contract, absent: list[str]) -> None:
    ours = contract(*our_files())
    with capsys.disabled():
        print(f"\n{what}: {len(theirs.keys() & ours.keys())} of our {len(ours)} types compared")
        for file in absent:
            print(f"  not there: {file}")
        left = sorted(ours.keys() - theirs.keys())
        packages: dict[str, list[str]] = {}
        for name in left:
            package = re.sub(r"\.[A-Z].*", "", name)
            packages.setdefault(package, []).append(name.removeprefix(package + "."))
        for package, names in packages.items():
            print(f"  not in it: {package}: {' '.join(names) if len(names) < 10 else f'{len(names)} types'}")


@pytest.mark.skipif(not DEBIAN.exists(), reason="no golang-github-containerd-*-dev packages")
def test_ours_are_those_of_debians_containerd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, absent = debian_contract(tmp_path)
    report(capsys, "Debian's containerd 1.6", theirs, absent)
    assert theirs
    assert differences(contract(*our_files()), theirs, SINCE_1_6) == []


def test_ours_are_those_of_the_newest_containerd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, absent = newest_contract(tmp_path)
    if not theirs:
        pytest.skip(
            "nothing in the Go module cache: go mod download github.com/containerd/containerd/api@latest"
        )
    report(capsys, "newest containerd", theirs, absent)
    assert differences(contract(*our_files()), theirs, NOT_IN_NEWEST) == []


WIRE = {
    "bytes": (9, 11, 12),
    "varint": (3, 4, 5, 8, 13, 14),
}  # a Go tag's wire type: the descriptor types it may mean


def test_ttrpcs_envelope_is_that_of_debians_go_structs() -> None:
    """ttrpc 1.1 has no .proto file; its structs carry the same facts in their tags."""
    source = DEBIAN / "github.com/containerd/ttrpc/types.go"
    if not source.exists():
        pytest.skip("golang-github-containerd-ttrpc-dev is not installed")
    ours = contract(*our_files())
    seen = 0
    for struct, body in re.findall(r"(?ms)^type (\w+) struct \{\n(.*?)^\}", source.read_text()):
        tags = re.findall(r'protobuf:"(\w+),(\d+),(\w+),name=(\w+)', body)
        if f"ttrpc.{struct}" in UNWANTED or not tags:
            continue
        assert {tag[3] for tag in tags} == ours[f"ttrpc.{struct}"].keys()
        for wire, number, label, name in tags:
            facts = ours[f"ttrpc.{struct}"][name]
            assert (
                facts[0] == int(number) and facts[1] in WIRE[wire] and facts[2] == {"opt": 1, "rep": 3}[label]
            )
            seen += 1
    assert seen == 9


def test_v3_is_v2_under_another_name() -> None:
    ours = contract(*our_files())
    v2 = {n: m for n, m in ours.items() if n.startswith("containerd.task.v2.")}
    v3 = {n: m for n, m in ours.items() if n.startswith("containerd.task.v3.")}
    assert repr(v2).replace("containerd.task.v2.", "containerd.task.v3.") == repr(v3)


def spoil(how: str) -> FileDescriptorProto:
    file = FileDescriptorProto()
    importlib.import_module("shimcore.protos.task_pb2").DESCRIPTOR.CopyToProto(file)
    kill = next(message for message in file.message_type if message.name == "KillRequest")
    if how == "number":
        kill.field[3].number = 5
    elif how == "name":
        kill.field[3].name = "each"
    elif how == "type":
        kill.field[2].type = kill.field[2].TYPE_INT32
    elif how == "label":
        kill.field[2].label = kill.field[2].LABEL_REPEATED
    elif how == "field gone":
        del kill.field[3]
    elif how == "field too many":
        kill.field.add(name="force", number=9, type=8, label=1)
    elif how == "message gone":
        file.message_type.remove(kill)
    elif how == "method's response":
        file.service[0].method[0].output_type = ".google.protobuf.Empty"
    elif how == "method streams":
        file.service[0].method[0].server_streaming = True
    elif how == "method gone":
        del file.service[0].method[0]
    return file


@pytest.mark.parametrize(
    "how",
    [
        "number",
        "name",
        "type",
        "label",
        "field gone",
        "field too many",
        "message gone",
        "method's response",
        "method streams",
        "method gone",
    ],
)
def test_the_comparison_sees(how: str) -> None:
    whole = contract(spoil("nothing"))
    assert differences(whole, whole, {}) == []
    assert differences(contract(spoil(how)), whole, {})
