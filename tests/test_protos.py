"""The generated modules: bytes as containerd's own Go code writes them, what they load, whom they clash with.

test_protos_contract.py holds names, numbers and types against containerd's .proto files.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import google.protobuf
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from shimcore.protos import (
    anys,
    bootstrap_pb2,
    envelope_pb2,
    events_pb2,
    forward_pb2,
    metrics_v1_pb2,
    runc_options_pb2,
    status_pb2,
    task_pb2,
    types_pb2,
)

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ROOT / "tools" / "gen_protos.py"
MODULES = sorted(path.stem for path in (ROOT / "shimcore/protos").glob("*_pb2.py"))

METHODS = (
    "State Create Start Delete Pids Pause Resume Checkpoint Kill Exec ResizePty CloseIO Update Wait Stats"
    " Connect Shutdown"
).split()


def exit_event() -> events_pb2.TaskExit:
    return events_pb2.TaskExit(container_id="c1", id="e1", pid=300, exit_status=137, exited_at=AT)


AT = Timestamp(seconds=1_700_000_000, nanos=123_456_789)


def create_request() -> task_pb2.CreateTaskRequest:
    options = runc_options_pb2.Options(
        no_pivot_root=True, io_uid=1000, binary_name="crun", systemd_cgroup=True
    )
    return task_pb2.CreateTaskRequest(
        id="c1",
        bundle="/b",
        rootfs=[types_pb2.Mount(type="bind", source="/s", options=["rbind", "ro"])],
        terminal=True,
        stdin="/i",
        stdout="/o",
        options=anys.pack(Any(), options),
    )


# Written by containerd 1.6's, cgroups 1.0's and typeurl's Go code from the same values; the last four follow
# from the encoding's rules.
GOLDEN = {
    "TaskExit": (exit_event(), "0a0263311202653118ac022089012a0b0880e2cfaa0610959aef3a"),
    "TaskDelete": (
        events_pb2.TaskDelete(container_id="c1", pid=300, exit_status=137, exited_at=AT, id="e1"),
        "0a02633110ac02188901220b0880e2cfaa0610959aef3a2a026531",
    ),
    "Forward": (
        forward_pb2.ForwardRequest(
            envelope=forward_pb2.Envelope(
                timestamp=AT, namespace="ns", topic="/tasks/exit", event=anys.pack(Any(), exit_event())
            )
        ),
        "0a590a0b0880e2cfaa0610959aef3a12026e731a0b2f7461736b732f6578697422390a1a636f6e7461696e6572642e6576656e74"
        "732e5461736b45786974121b0a0263311202653118ac022089012a0b0880e2cfaa0610959aef3a",
    ),
    "Create": (
        create_request(),
        "0a02633112022f621a150a0462696e6412022f7322057262696e642202726f20012a022f6932022f6f522b0a1a636f6e7461696e"
        "6572642e72756e632e76312e4f7074696f6e73120d080120e80732046372756e4801",
    ),
    "State": (
        task_pb2.StateResponse(
            id="c1", bundle="/b", pid=300, status=status_pb2.STOPPED, exit_status=255, exited_at=AT
        ),
        "0a02633112022f6218ac02200348ff01520b0880e2cfaa0610959aef3a",
    ),
    "Delete": (
        task_pb2.DeleteResponse(pid=300, exit_status=137, exited_at=AT),
        "08ac021089011a0b0880e2cfaa0610959aef3a",
    ),
    "Metrics": (
        metrics_v1_pb2.Metrics(
            pids=metrics_v1_pb2.PidsStat(current=3, limit=1 << 40),
            cpu=metrics_v1_pb2.CPUStat(usage=metrics_v1_pb2.CPUUsage(total=12345, per_cpu=[1, 300])),
        ),
        "12090803108080808080201a0a0a0808b960220301ac02",
    ),
    "ttrpc request": (
        envelope_pb2.Request(
            service="s",
            method="m",
            payload=b"\x08\x01",
            timeout_nano=-1,
            metadata=[envelope_pb2.KeyValue(key="k", value="v")],
        ),
        "0a017312016d1a02080120ffffffffffffffffff012a060a016b120176",
    ),
    "ttrpc response": (
        envelope_pb2.Response(status=envelope_pb2.Status(code=5, message="no")),
        "0a06080512026e6f",
    ),
    "bootstrap": (
        # A negative enum value takes ten bytes; an optional field is written when it is set, though empty.
        bootstrap_pb2.BootstrapParams(
            instance_id="i", log_level=bootstrap_pb2.LOG_LEVEL_DEBUG, socket_dir=""
        ),
        "0a016918fcffffffffffffffff014a00",
    ),
    "nothing": (task_pb2.StateResponse(), ""),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_both_ways(name: str) -> None:
    message, hexed = GOLDEN[name]
    assert message.SerializeToString(deterministic=True).hex() == hexed
    assert type(message).FromString(bytes.fromhex(hexed)) == message


@pytest.mark.parametrize("name", ["TaskExit", "Create", "State", "ttrpc request"])
def test_a_flipped_byte_does_not_go_unseen(name: str) -> None:
    message, hexed = GOLDEN[name]
    for at in range(len(hexed) // 2):
        raw = bytearray.fromhex(hexed)
        raw[at] ^= 1
        try:
            other = type(message).FromString(bytes(raw))
        except DecodeError:
            continue
        assert other.SerializeToString(deterministic=True).hex() != hexed, at


@pytest.mark.parametrize("module", ["task_pb2", "task_v3_pb2"])
def test_task_has_the_seventeen_methods(module: str) -> None:
    service = importlib.import_module(f"shimcore.protos.{module}").DESCRIPTOR.services_by_name["Task"]
    version = "v3" if "v3" in module else "v2"
    assert service.full_name == f"containerd.task.{version}.Task"
    assert sorted(method.name for method in service.methods) == sorted(METHODS) and len(METHODS) == 17
    assert not any(method.client_streaming or method.server_streaming for method in service.methods)


def test_create_comes_back_whole() -> None:
    sent = create_request()
    got = task_pb2.CreateTaskRequest.FromString(sent.SerializeToString())
    assert got == sent and got is not sent
    assert [(m.type, m.source, m.target, list(m.options)) for m in got.rootfs] == [
        ("bind", "/s", "", ["rbind", "ro"])
    ]
    options = anys.unpack(got.options, runc_options_pb2.Options)
    assert options is not None and options.binary_name == "crun" and options.io_gid == 0
    # v3's message is the same on the wire, so one class may serve both versions.
    v3 = importlib.import_module("shimcore.protos.task_v3_pb2").CreateTaskRequest
    assert v3.FromString(sent.SerializeToString()).SerializeToString() == sent.SerializeToString()


def test_what_a_later_containerd_adds_is_kept() -> None:
    raw = task_pb2.StateRequest(id="c").SerializeToString() + b"\xfa\x01\x03new"
    assert task_pb2.StateRequest.FromString(raw).SerializeToString() == raw


def test_any_has_the_bare_name() -> None:
    packed = anys.pack(Any(), exit_event())
    assert packed.type_url == "containerd.events.TaskExit"
    assert anys.unpack(packed, events_pb2.TaskExit) == exit_event()
    assert anys.unpack(packed, events_pb2.TaskDelete) is None
    # The reason for anys: protobuf's own pair neither writes nor takes a bare name.
    theirs = Any()
    theirs.Pack(exit_event())
    assert theirs.type_url == "type.googleapis.com/containerd.events.TaskExit"
    assert not packed.Unpack(events_pb2.TaskExit())
    # A peer that packs by protobuf's own rules is understood all the same.
    assert anys.unpack(theirs, events_pb2.TaskExit) == exit_event()
    assert anys.name(Any()) == "" and anys.unpack(Any(), events_pb2.TaskExit) is None


def test_any_that_does_not_parse_raises() -> None:
    with pytest.raises(DecodeError):
        anys.unpack(Any(type_url="containerd.events.TaskExit", value=b"\x0a\xff"), events_pb2.TaskExit)


def test_fields_take_protobufs_own_types() -> None:
    reply = task_pb2.WaitResponse(exited_at=AT)
    reply.exited_at.FromNanoseconds(5)
    assert type(reply.exited_at) is Timestamp and AT.seconds == 1_700_000_000


def isolated(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` as a shim would: no site, no environment. Warnings are errors."""
    site = str(Path(google.protobuf.__file__).parents[2])
    head = f"import sys; sys.path[0:0] = [{str(ROOT)!r}, {site!r}]\n"
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_loads_alone_and_with_what_it_needs_only(module: str) -> None:
    done = isolated(
        f"import shimcore.protos.{module}\n"
        "print(*(name for name in sys.modules if name.startswith('shimcore.protos.')))"
    )
    assert (done.returncode, done.stderr) == (0, "")
    need = {
        "task_pb2": {"status_pb2", "types_pb2"},
        "task_v3_pb2": {"status_pb2", "types_pb2"},
        "events_pb2": {"types_pb2"},
        "sandbox_pb2": {"sandbox_types_pb2", "types_pb2"},
    }
    loaded = {name.removeprefix("shimcore.protos.") for name in done.stdout.split()}
    assert loaded == need.get(module, set()) | {module}


def declare(package: str, message: str) -> str:
    """Code that does as another package's module does at import: registers a message of that name."""
    return (
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        f"file = descriptor_pb2.FileDescriptorProto(name='other/{message}.proto', package='{package}')\n"
        f"file.message_type.add(name='{message}')\n"
        "descriptor_pool.Default().AddSerializedFile(file.SerializeToString())\n"
    )


def test_googleapis_status_may_be_loaded_too() -> None:
    done = isolated(declare("google.rpc", "Status") + "import shimcore.protos.envelope_pb2")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_copy_of_a_message_is_a_plain_error() -> None:
    done = isolated(declare("containerd.types", "Mount") + "import shimcore.protos.task_pb2")
    assert done.returncode == 1 and "TypeError" in done.stderr
    assert "containerd.types.Mount" in done.stderr or "types.proto" in done.stderr


def generator(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools/gen_protos.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the generator reads and writes, to be spoiled."""
    shutil.copytree(ROOT / "shimcore/protos", tmp_path / "shimcore/protos")
    (tmp_path / "tools").mkdir()
    shutil.copy(GENERATOR, tmp_path / "tools")
    return tmp_path


def test_generated_files_are_fresh() -> None:
    pytest.importorskip("grpc_tools")
    done = generator("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_drift_is_seen_and_mended(copy: Path) -> None:
    pytest.importorskip("grpc_tools")
    folder = copy / "shimcore/protos"
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    source = folder / "task.proto"
    source.write_text(source.read_text().replace("bool all = 4", "bool all = 5"))
    (folder / "gone_pb2.py").write_text("")
    (folder / "forward_pb2.pyi").unlink()
    done = generator("--check", root=copy)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "missing: forward_pb2.pyi",
        "left over: gone_pb2.py",
        "differs: task_pb2.py",
        "differs: task_v3.proto",
        "differs: task_v3_pb2.py",
    ]
    source.write_bytes(whole["task.proto"])
    assert generator(root=copy).returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == whole


@pytest.mark.parametrize("module", MODULES)
def test_every_message_comes_back_from_nothing(module: str) -> None:
    loaded = vars(importlib.import_module(f"shimcore.protos.{module}")).values()
    kinds = [kind for kind in loaded if isinstance(kind, type) and issubclass(kind, Message)]
    assert kinds
    assert all(kind().SerializeToString() == b"" and kind.FromString(b"") == kind() for kind in kinds)
