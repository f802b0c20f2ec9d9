"""Checkpoint and restore: what the runtime is asked, the order of events, and criu itself where it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shimcore import _reaper
from shimcore.errors import Canceled, FailedPrecondition, InvalidArgument, NotFound, Unknown
from shimcore.oci.checkpoint import LINUX_CHECKPOINT, RUNC_CHECKPOINT, criu_error, options_of
from shimcore.oci.options import RUNC_OPTIONS
from shimcore.protos import events_pb2, linux_runc_pb2, runc_options_pb2, task_pb2
from shimcore.publisher import RemotePublisher
from shimcore.rig import Rig as RealRig
from shimcore.rig.bundle import busybox_rootfs, spec
from shimcore.rig.stdio import Reader
from tests.faults import until
from tests.test_oci_binlog import said, script
from tests.test_oci_readers import VARIABLE, full
from tests.test_oci_service import Context, Rig, rig, wait_for

__all__ = ["rig"]

# Notes the whole of each call, and knows two commands more.
MORE = """
echo "$*" >> {here}/argv
while [ "$1" = --criu ]; do shift 2; done
"""
RESTORE = """case $command in
restore) mkdir -p "$root/$id"; leave sleep 1000 ;;
"""


class Noted(RemotePublisher):
    def __init__(self, core: _reaper.Core, namespace: str, events: list[tuple[str, Any]]) -> None:
        super().__init__(core, namespace)
        self.noted = events

    def publish(self, topic: str, event: Any, *key: str, **more: str) -> None:
        self.noted.append((topic, event))
        super().publish(topic, event, *key, **more)


class Told:
    """What the service publishes itself, and the fake runtime's calls."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig = rig
        self.root = root
        self.events: list[tuple[str, Any]] = []
        rig.task.publisher = Noted(rig.core, "ns", self.events)
        text = rig.runtime.read_text()
        text = text.replace("#!/bin/sh\n", "#!/bin/sh\n" + MORE.format(here=root)).replace("case $command in\n", RESTORE)
        rig.runtime.write_text(text)

    def argv(self, command: str) -> list[str]:
        """The last call of a command, without what all calls have."""
        words = [line.split() for line in (self.root / "argv").read_text().splitlines() if f" {command} " in line][-1]
        return words[: words.index("--root")] + words[words.index(command) :]

    def options(self, **more: Any) -> AnyMessage:
        options = runc_options_pb2.Options(binary_name=str(self.rig.runtime), root=str(self.root / "state"), **more)
        return AnyMessage(type_url=RUNC_OPTIONS, value=options.SerializeToString())

    def running(self, **options: Any) -> None:
        self.rig.create(options=self.options(**options))
        self.rig.start()

    def checkpoint(self, path: str = "/image", options: Any = None) -> None:
        request = task_pb2.CheckpointTaskRequest(id="c1", path=path)
        if options is not None:
            request.options.type_url, request.options.value = options.DESCRIPTOR.full_name, options.SerializeToString()
        self.rig.call(self.rig.task.checkpoint(request, Context()))

    def end(self) -> int:
        self.rig.kill()
        self.rig.told()
        return int(self.rig.delete().exit_status)


@pytest.fixture
def told(rig: Rig, tmp_path: Path) -> Told:
    return Told(rig, tmp_path)


# --- Checkpoint


def test_checkpoint_leaves_the_container_running(told: Told) -> None:
    told.running()
    told.checkpoint()
    work = told.rig.bundle("c1") / "criu-work"
    assert told.argv("checkpoint") == [
        "checkpoint", "--image-path", "/image", "--work-path", str(work), "--leave-running", "c1",
    ]  # fmt: skip
    topic, event = told.events[-1]
    assert (topic, event) == ("/tasks/checkpointed", events_pb2.TaskCheckpointed(container_id="c1", checkpoint="/image"))
    assert told.end() == 137


def test_every_checkpoint_option_reaches_the_runtime(told: Told) -> None:
    told.running(criu_path="/opt/criu", criu_work_path="/elsewhere")
    options = runc_options_pb2.CheckpointOptions(
        exit=True, open_tcp=True, external_unix_sockets=True, terminal=True, file_locks=True, empty_namespaces=["network", "ipc"],
        cgroups_mode="full", image_path="/ignored", work_path="/w", parent_path="../parent",
    )  # fmt: skip
    told.checkpoint(options=options)
    assert told.argv("checkpoint") == [
        "--criu", "/opt/criu", "checkpoint", "--image-path", "/image", "--work-path", "/w", "--parent-path", "../parent",
        "--tcp-established", "--ext-unix-sk", "--shell-job", "--file-locks", "--empty-ns", "network", "--empty-ns", "ipc",
        "--manage-cgroups-mode", "full", "c1",
    ]  # fmt: skip
    told.checkpoint(path="", options=linux_runc_pb2.CheckpointOptions(image_path="/old", work_path="/v", exit=True))
    assert told.argv("checkpoint")[2:] == ["checkpoint", "--image-path", "/old", "--work-path", "/v", "c1"]
    told.checkpoint()
    assert told.argv("checkpoint")[4:7] == ["/image", "--work-path", "/elsewhere"]


def test_a_checkpoint_that_fails_says_what_criu_says(told: Told) -> None:
    told.running()
    work = told.rig.bundle("c1") / "criu-work"
    log = "(00.1) Error (criu/net.c:1): net: no iptables\\n(00.2) Error (criu/cr-dump.c:1): Dumping FAILED.\\n"
    told.rig.do("checkpoint", f"mkdir {work}; printf '{log}' > {work}/dump.log; fail 'criu failed: type NOTIFY errno 0'\n")
    with pytest.raises(Unknown) as error:
        told.checkpoint()
    kept = told.rig.bundle("c1") / "criu-dump.log"
    assert str(error.value) == (
        "OCI runtime checkpoint failed: criu failed: type NOTIFY errno 0; criu: (criu/net.c:1): net: no iptables"
        f" (its log: {kept})"
    )
    assert "Dumping FAILED" in kept.read_text()
    assert not work.exists()
    assert not [topic for topic, _ in told.events if topic == "/tasks/checkpointed"]


def test_without_criu_the_answer_says_what_to_do(told: Told) -> None:
    told.running()
    told.rig.do("checkpoint", "fail 'CRIU version check failed: exec: criu: executable file not found in $PATH'\n")
    with pytest.raises(FailedPrecondition, match="need criu on containerd's PATH; install it"):
        told.checkpoint()


@pytest.mark.parametrize("path", ["", "image"])
def test_a_checkpoint_needs_a_path(told: Told, path: str) -> None:
    told.running()
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        told.checkpoint(path)


def test_what_does_not_run_is_not_checkpointed(told: Told) -> None:
    with pytest.raises(NotFound):
        told.checkpoint()
    told.rig.create(options=told.options())
    with pytest.raises(FailedPrecondition):
        told.checkpoint()


@pytest.mark.parametrize(
    ("type_url", "value"),
    [
        ("some.Unknown", b"\x08\x01"),
        (RUNC_CHECKPOINT, b"\x42\xff"),
        (RUNC_CHECKPOINT, b"\x42\x01\xff"),
        (RUNC_CHECKPOINT, b"\x0a\x01x"),
        (LINUX_CHECKPOINT, b"\x40\x01"),
    ],
)
def test_options_that_cannot_be_read_are_refused(type_url: str, value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        options_of(type_url, value)


def test_the_error_that_counts_in_criu_s_log() -> None:
    assert criu_error(b"(1) Warn (x): y\n") == ""
    log = b"Error (a.c:1): one\n(2) Error (b.c:2): Restoring FAILED.\nError (c.c:3): exited, status=1\n"
    assert criu_error(log) == "(a.c:1): one"


# --- restore


def test_a_restored_container_begins_with_start(told: Told) -> None:
    folder = told.root / "image"
    created = told.rig.create(checkpoint=str(folder), options=told.options(no_pivot_root=True, criu_work_path="/w"))
    assert created.pid == 0
    slot = told.rig.core.find("c1")
    assert slot is not None and (slot.phase, slot.pid, slot.status) == (_reaper.RESERVED, 0, _reaper.CREATED)
    assert told.events[-1][0] == "/tasks/create" and told.events[-1][1].checkpoint == str(folder)
    assert told.rig.calls() == []
    pid = told.rig.start()
    bundle = told.rig.bundle("c1")
    assert told.argv("restore") == [
        "restore", "--image-path", str(folder), "--work-path", "/w", "--detach", "--no-subreaper", "--bundle", str(bundle),
        "--pid-file", str(bundle / "init.pid"), "--no-pivot", "c1",
    ]  # fmt: skip
    assert pid == slot.pid > 0 and slot.status == _reaper.RUNNING
    with pytest.raises(FailedPrecondition):
        told.rig.start()
    assert told.end() == 137
    assert told.rig.task.containers == {}


def test_a_container_that_was_never_restored_can_be_deleted(told: Told) -> None:
    told.rig.create(checkpoint="/image", options=told.options())
    with pytest.raises(FailedPrecondition):
        told.rig.kill()
    assert told.rig.delete().pid == 0
    assert told.rig.task.containers == {}


def test_a_restore_that_fails_leaves_a_stopped_container(told: Told) -> None:
    told.rig.create(checkpoint="/image", options=told.options())
    told.rig.do("restore", "fail 'criu failed: type RESTORE errno 0'\n")
    with pytest.raises(Unknown, match="OCI runtime restore failed: criu failed"):
        told.rig.start()
    slot = told.rig.core.find("c1")
    assert slot is not None and slot.phase == _reaper.DROPPED
    assert "delete c1" in told.rig.calls()[-1]
    with pytest.raises(FailedPrecondition):
        told.rig.start()
    assert told.rig.delete().exit_status == 255


def test_a_restore_under_copy_that_fails_can_be_deleted(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "copy")
    path = fifo(told.root, "out")
    told.rig.create(checkpoint="/image", options=told.options(), stdout=path)
    told.rig.do("restore", "fail 'criu failed: type RESTORE errno 0'\n")
    with pytest.raises(Unknown, match="OCI runtime restore failed: criu failed"):
        told.rig.start()
    assert told.rig.delete().exit_status == 255
    with pytest.raises(OSError, match="No such device or address"):  # nobody has it open
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_a_restored_process_that_dies_at_once_is_told_after_its_start(told: Told) -> None:
    told.rig.create(checkpoint="/image", options=told.options())
    told.rig.do("restore", 'mkdir -p "$root/$id"; leave sh -c "while [ -d /proc/$$ ]; do :; done; exit 7"; exit 0\n')
    before = told.rig.core.stats()["events"]
    told.rig.start()
    assert told.rig.told().exit_status == 7
    wait_for(lambda: told.rig.core.stats()["events"] == before + 2)  # start, exit
    assert told.rig.delete().exit_status == 7


def test_create_with_a_checkpoint_whose_caller_has_gone_leaves_nothing(told: Told) -> None:
    with pytest.raises(Canceled):
        told.rig.create(checkpoint="/image", options=told.options(), context=Context(cancelled=True))
    assert told.rig.task.containers == {} and told.rig.core.slots() == []


# --- with real components


def usable_criu() -> str:
    """Why criu can't be used here; "" when it can."""
    try:
        done = subprocess.run(["criu", "check"], capture_output=True, text=True, timeout=60)
    except OSError:
        return "criu is not installed"
    return "" if done.returncode == 0 else f"criu check: {(done.stderr.strip().splitlines() or ['?'])[-1]}"


@pytest.fixture
def real(shim_dir: Path, tmp_path: Path) -> Iterator[RealRig]:
    with RealRig(shim_dir / "containerd-shim-runc-v2-py", rootfs=busybox_rootfs(tmp_path / "rootfs"), timeout=60) as real:
        yield real


def test_a_process_with_a_clients_fifo_cannot_be_saved(real: RealRig, tmp_path: Path) -> None:
    if reason := usable_criu():
        pytest.skip(reason)
    box = real.container(["sleep", "1000"], namespaces=("pid", "ipc", "uts", "mount"))
    box.create()
    box.start()
    with pytest.raises(Unknown, match=r"give it no stdio, or a logging binary, or the annotation io\.shimcore\.stdio=copy"):
        box.task.checkpoint(str(tmp_path / "image"))
    box.task.kill(9)
    assert box.wait() == 137
    box.delete()


def test_the_real_runc_without_criu(shim_dir: Path, tmp_path: Path) -> None:
    """Its words are what the hint is given for."""
    (tmp_path / "bin").mkdir()
    for name in ("runc",):
        found = next(Path(folder, name) for folder in os.environ["PATH"].split(":") if Path(folder, name).exists())
        (tmp_path / "bin" / name).symlink_to(found)
    env = {"PATH": str(tmp_path / "bin")}
    shim = shim_dir / "containerd-shim-runc-v2-py"
    with RealRig(shim, rootfs=busybox_rootfs(tmp_path / "rootfs"), env=env) as real:
        box = real.container(["sleep", "1000"])
        box.create()
        box.start()
        with pytest.raises(FailedPrecondition, match="need criu on containerd's PATH; install it"):
            box.task.checkpoint(str(tmp_path / "image"))
        box.task.kill(9)
        box.wait()
        box.delete()


KINDS = ("pid", "ipc", "uts", "mount")  # to stop a network criu needs iptables


def make(
    real: RealRig, command: str, checkpoint: str = "", uri: str = "", annotations: dict[str, str] | None = None, *,
    stdin: bool = False,
) -> Any:  # fmt: skip
    """A container whose stdout and stderr are `uri`; stdin: whose FIFOs are the rig's."""
    id = "first"
    config = spec(
        ["sh", "-c", command], root=str(real.rootfs), cgroups_path=f"/{real.namespace}/{id}", namespaces=KINDS,
        annotations=annotations or {},
    )  # fmt: skip
    box = real.container(spec=config, id=id, stdin=stdin)
    request = task_pb2.CreateTaskRequest(id=id, bundle=str(box.bundle.path), checkpoint=checkpoint, stdout=uri, stderr=uri)
    if stdin:
        request.stdin, request.stdout, request.stderr = box.stdio.stdin, box.stdio.stdout, box.stdio.stderr
    request.options.type_url, request.options.value = RUNC_OPTIONS, real.options.SerializeToString()
    box.task.call("Create", request, task_pb2.CreateTaskResponse)
    return box


def fifo(folder: Path, name: str) -> str:
    os.mkfifo(folder / name, 0o600)
    return str(folder / name)


@pytest.mark.parametrize("stdio", ["none", "logger", "fifo under copy"])
def test_a_real_process_goes_on_where_it_was(real: RealRig, tmp_path: Path, stdio: str) -> None:
    if reason := usable_criu():
        pytest.skip(reason)
    count = real.rootfs / "count"
    loop = "i=0; while :; do i=$((i+1)); echo $i > /count; echo $i; sleep 0.05; done"
    uri = script(tmp_path) if stdio == "logger" else ""
    annotations = {"io.shimcore.stdio": "copy"} if stdio == "fifo under copy" else None
    readers: list[Reader] = []

    def number() -> int:
        text = count.read_text().strip() if count.exists() else ""
        return int(text or 0)

    def begin(checkpoint: str = "") -> Any:
        nonlocal uri
        if annotations:
            uri = fifo(tmp_path, f"fifo{len(readers)}")
            readers.append(Reader(Path(uri)))
        return make(real, loop, checkpoint, uri, annotations)

    first = begin()
    first.start()
    until(lambda: number() > 5)
    first.task.checkpoint(str(tmp_path / "image"), runc_options_pb2.CheckpointOptions(exit=True))
    assert first.wait() == 137
    reached = number()
    first.task.delete()
    first.end()
    count.write_text("")
    second = begin(str(tmp_path / "image"))
    pid = second.start()
    until(lambda: number() > 0)
    assert number() >= reached > 5
    assert second.task.state().pid == pid
    if stdio == "logger":  # a new one, which is given what comes from now on
        until(lambda: b"\n" in said(tmp_path, "stdout"))
        assert int(said(tmp_path, "stdout").split()[0]) >= reached
    if readers:
        until(lambda: b"\n" in readers[1].data)
    second.task.kill(9)
    assert second.wait() == 137
    second.task.delete()
    if readers:  # no line is lost, and none comes twice
        assert all(reader.wait(10) for reader in readers)
        lines = [int(line) for reader in readers for line in reader.data.split()]
        assert lines == list(range(1, len(lines) + 1)) and len(lines) > reached
        for reader in readers:
            reader.close()
    want = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    until(lambda: [event.topic for event in real.events.of("first")][-4:] == want)
    second.end()


def test_a_real_process_that_waits_for_its_reader_loses_nothing(real: RealRig, tmp_path: Path) -> None:
    """FIFO, shim and pipe are full when it is saved."""
    if reason := usable_criu():
        pytest.skip(reason)
    annotations = {"io.shimcore.stdio": "copy"}
    command = "seq 1 60000; exec sleep 1000"
    want = b"".join(b"%d\n" % number for number in range(1, 60001))
    path = fifo(tmp_path, "one")
    first = make(real, command, uri=path, annotations=annotations)
    pid = first.start()
    until(lambda: full(path) and full(f"/proc/{pid}/fd/1"))
    first.task.checkpoint(str(tmp_path / "image"), runc_options_pb2.CheckpointOptions(exit=True))
    assert first.wait() == 137
    one = Reader(Path(path))
    first.task.delete()
    first.end()
    assert one.wait(10)
    path = fifo(tmp_path, "two")
    two = Reader(Path(path))
    second = make(real, command, str(tmp_path / "image"), path, annotations)
    second.start()
    until(lambda: two.data.endswith(b"\n60000\n"))
    second.task.kill(9)
    assert second.wait() == 137
    second.task.delete()
    assert 0 < len(one.data) < len(want) and one.data + two.data == want
    one.close()
    two.close()
    second.end()


def test_a_real_process_is_written_to_before_and_after(real: RealRig, tmp_path: Path) -> None:
    if reason := usable_criu():
        pytest.skip(reason)
    annotations = {"io.shimcore.stdio": "copy"}
    image = ""
    for word in (b"before\n", b"after\n"):
        box = make(real, "cat", image, annotations=annotations, stdin=True)
        box.start()
        box.stdio.write(word)
        until(lambda box=box, word=word: box.stdio.output() == word)
        image = str(tmp_path / "image")
        if word == b"before\n":
            box.task.checkpoint(image, runc_options_pb2.CheckpointOptions(exit=True))
            assert box.wait() == 137
        else:
            box.close_stdin()
            assert box.wait() == 0
        assert box.stdio.drain()
        box.delete()
