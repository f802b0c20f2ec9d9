"""stdio by containerd's streaming API: the rig plays containerd's CRI plugin, which calls the shim for each stream.

The messages are protobuf's own here, written by hand in the shim.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shimcore.cli.nodes import NoAnswer
from shimcore.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted
from shimcore.oci.shim import STREAMING
from shimcore.oci.stdio import check
from shimcore.protos import anys, streaming_pb2, task_pb2, transfer_pb2
from shimcore.rig import Rig, Session, bundle
from shimcore.ttrpc import Client
from tests.faults import until
from tests.upgrades import upgrade

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 65536


class Peer:
    """One stream as containerd has it: a connection, a call, the id, the answer."""

    def __init__(self, address: str, id: str) -> None:
        self.client = Client(address)
        both = {"client_streams": True, "server_streams": True}
        self.stream = self.client.stream(STREAMING, "Stream", None, AnyMessage, timeout=20.0, **both)
        self.send(streaming_pb2.StreamInit(id=id))
        assert self.stream.receive() is not None
        self.window = 0  # bytes of stdin that we may send
        self.taken = b""  # all that has been read

    def send(self, message: Any) -> None:
        self.stream.send(anys.pack(AnyMessage(), message))

    def grant(self, size: int) -> None:
        self.send(transfer_pb2.WindowUpdate(update=size))

    def receive(self) -> Any:
        packed = self.stream.receive()
        if packed is None:
            return None
        kind = {"Data": transfer_pb2.Data, "WindowUpdate": transfer_pb2.WindowUpdate}[packed.type_url.rpartition(".")[2]]
        return kind.FromString(packed.value)

    def read(self, size: int) -> bytes:
        """So many bytes and no more, which have been granted."""
        data = b""
        while len(data) < size:
            message = self.receive()
            assert message is not None, data[-100:]
            data += message.data
        assert len(data) == size
        self.taken += data
        return data

    def read_all(self) -> bytes:
        """As containerd's reader does it: a window of 64 KiB is added whenever less is left."""
        window = 0
        while True:
            while window < WINDOW:
                try:
                    self.grant(WINDOW)
                except FailedPrecondition:  # it is over: what came is still to be received
                    pass
                window += WINDOW
            message = self.receive()
            if message is None:
                return self.taken
            window -= len(message.data)
            self.taken += message.data

    def write(self, data: bytes) -> None:
        while data:
            while not self.window:
                self.window += self.receive().update
            piece = data[: min(self.window, 32768)]
            self.send(transfer_pb2.Data(data=piece))
            self.window -= len(piece)
            data = data[len(piece) :]

    def close(self, half: bool = True) -> None:
        """As containerd's: the end of what is sent, and of the connection. half: False as its death does it."""
        if half:
            self.stream.close_send()
        self.client.close()


class Streamed:
    """A container whose stdio are streams."""

    def __init__(self, rig: Rig, *command: str, stdin: bool = False, terminal: bool = False, **more: Any) -> None:
        self.session: Session = rig.container(["sh", "-c", *command], terminal=terminal, **more)
        self.address = self.session.started.address
        self.terminal = terminal
        self.stdin = stdin

    def uri(self, name: str, id: str = "") -> str:
        return f"ttrpc+{self.address}?streaming_id={id or self.session.id}-{name}"

    def peer(self, name: str, id: str = "") -> Peer:
        return Peer(self.address, f"{id or self.session.id}-{name}")

    def uris(self, id: str = "", *, stdin: bool = False) -> dict[str, str]:
        names = ["stdin"] * stdin + ["stdout"] + ["stderr"] * (not self.terminal)
        return {name: self.uri(name, id) for name in names}

    def create(self) -> None:
        session = self.session
        uris = self.uris(stdin=self.stdin)
        session.task.create(str(session.bundle.path), terminal=self.terminal, options=session.rig.options, **uris)

    def exec(self, id: str, *command: str, stdin: bool = False) -> None:
        self.session.task.exec(id, bundle.process(["sh", "-c", *command]), **self.uris(id, stdin=stdin))


@pytest.fixture
def rig(shim_dir: Path, rootfs: Path) -> Iterator[Rig]:
    with Rig(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs, generation="2.3") as rig:
        yield rig


def test_output_and_its_end(rig: Rig) -> None:
    box = Streamed(rig, "echo out; echo err >&2; exit 3")
    out, err = box.peer("stdout"), box.peer("stderr")
    box.create()
    box.session.start()
    assert (out.read_all(), err.read_all()) == (b"out\n", b"err\n")
    assert box.session.wait() == 3
    out.close()
    err.close()
    box.session.delete()


# red: the pipe closed, or its bytes dropped, when the process ends
def test_a_client_that_comes_late_finds_what_was_written(rig: Rig) -> None:
    box = Streamed(rig, "echo out; echo err >&2; exit 3")
    box.create()
    box.session.start()
    assert box.session.wait() == 3
    out = box.peer("stdout")
    assert out.read_all() == b"out\n"
    assert box.peer("stderr").read_all() == b"err\n"
    again = box.peer("stdout")  # as a containerd that was restarted
    assert again.read_all() == b""
    box.session.delete()


# red: what a client says before there is a process is heard by nobody
def test_a_window_from_before_the_process(rig: Rig) -> None:
    box = Streamed(rig, "echo out; read a; echo err >&2", stdin=True)
    stdin, out, err = box.peer("stdin"), box.peer("stdout"), box.peer("stderr")
    for one in (out, err):
        one.grant(40000)
        one.grant(WINDOW)
    stdin.stream.close_send()
    box.create()
    box.session.start()
    assert (out.read(4), err.read(4)) == (b"out\n", b"err\n")
    assert out.receive() is None and err.receive() is None
    while stdin.receive() is not None:
        pass
    box.session.wait()
    box.session.delete()


def test_much_output_arrives_whole(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 300000")
    out = box.peer("stdout")
    box.create()
    box.session.start()
    assert out.read_all() == b"".join(b"%d\n" % number for number in range(1, 300001))
    assert box.session.wait() == 0
    box.session.delete()


# red: the window not kept to
def test_no_more_is_sent_than_the_client_takes(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 100000")
    out = box.peer("stdout")
    box.create()
    box.session.start()
    wanted = b"".join(b"%d\n" % number for number in range(1, 100001))
    for size in (100, 1, 40000, 7):
        out.grant(size)
        out.read(size)
    assert out.taken == wanted[:40108]
    assert out.read_all() == wanted
    assert box.session.wait() == 0
    box.session.delete()


def test_stdin_to_its_end(rig: Rig) -> None:
    box = Streamed(rig, "wc -c", stdin=True)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.start()
    stdin.write(b"x" * 300000)
    stdin.close()  # on its heels, while much is still held for the process
    box.session.task.close_io()
    assert out.read_all().strip() == b"300000"
    assert box.session.wait() == 0
    box.session.delete()


# red: CloseIO ends stdin at once: it comes on another connection than what was written before it
def test_close_io_waits_for_what_was_written(rig: Rig) -> None:
    box = Streamed(rig, "wc -c", stdin=True)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.start()
    box.session.task.close_io()  # has overtaken it
    stdin.write(b"x" * 5000)
    stdin.close()
    assert out.read_all().strip() == b"5000"
    box.session.wait()
    box.session.delete()


@pytest.mark.parametrize("connected", [True, False])
def test_close_io_ends_stdin_by_itself(rig: Rig, connected: bool) -> None:
    box = Streamed(rig, "wc -c", stdin=True)
    if connected:
        stdin = box.peer("stdin")  # and it is left open
    out = box.peer("stdout")
    box.create()
    box.session.start()
    box.session.task.close_io()
    assert out.read_all().strip() == b"0"
    box.session.wait()
    if connected:
        with pytest.raises(FailedPrecondition):
            while stdin.receive() is not None:
                pass
            stdin.send(transfer_pb2.Data(data=b"x"))
    box.session.delete()


# red: the loss of a connection taken for the end of stdin, or what follows given to nobody
def test_the_client_goes_and_comes_back(rig: Rig) -> None:
    box = Streamed(rig, "read a; seq 1 50000; read b; echo $a$b", stdin=True)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.start()
    stdin.write(b"one\n")
    out.grant(1000)
    first = out.read(1000)
    stdin.close(half=False)
    out.close(half=False)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    stdin.write(b"two\n")
    assert first + out.read_all() == b"".join(b"%d\n" % number for number in range(1, 50001)) + b"onetwo\n"
    assert box.session.wait() == 0
    box.session.delete()


def test_a_younger_call_takes_the_place_of_an_older(rig: Rig) -> None:
    box = Streamed(rig, "read a; echo $a", stdin=True)
    old_in, old_out = box.peer("stdin"), box.peer("stdout")
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.start()
    assert old_in.receive() is None and old_out.receive() is None
    stdin.write(b"word\n")
    assert out.read_all() == b"word\n"
    box.session.wait()
    box.session.delete()


def test_the_exit_is_told_though_nobody_reads(rig: Rig) -> None:
    box = Streamed(rig, "head -c 60000 /dev/zero; exit 4")
    out = box.peer("stdout")
    box.create()
    box.session.start()
    assert box.session.wait() == 4
    assert rig.events.wait("/tasks/exit", container=box.session.id).message.exit_status == 4
    assert len(out.read_all()) == 60000
    box.session.delete()


def test_a_process_that_nobody_reads_waits_and_can_be_killed(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 1000000")
    out = box.peer("stdout")
    box.create()
    box.session.start()
    out.grant(WINDOW)
    out.read(WINDOW)
    assert box.session.task.state().status == 2
    box.session.task.kill(signal.SIGKILL)
    assert box.session.wait() == 137
    out.close(half=False)
    box.session.delete()  # waits for nobody


def test_output_that_nobody_reads_is_dropped_if_so_asked(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 300000; exit 6", annotations={"io.shimcore.stdio": "drop,after=0.2"})
    box.create()
    box.session.start()
    assert box.session.wait() == 6
    out = box.peer("stdout")
    newest = out.read_all()
    assert newest and newest.endswith(b"299999\n300000\n") and len(newest) <= WINDOW
    box.session.delete()


# red: a client that reads slowly taken for one that has gone
def test_a_slow_client_loses_nothing(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 60000", annotations={"io.shimcore.stdio": "drop,after=0.5"})
    out = box.peer("stdout")
    box.create()
    box.session.start()
    step = threading.Event()
    for _ in range(6):
        out.grant(1000)
        out.read(1000)
        step.wait(0.25)  # together three times as long as `after`
    assert out.read_all() == b"".join(b"%d\n" % number for number in range(1, 60001))
    box.session.wait()
    box.session.delete()


def test_a_terminal(rig: Rig) -> None:
    box = Streamed(rig, "read a; stty size; echo got $a", stdin=True, terminal=True)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.task.resize_pty(77, 33)
    box.session.start()
    stdin.write(b"word\r")
    said = out.read_all().replace(b"\r\n", b"\n").splitlines()
    assert said[-2:] == [b"33 77", b"got word"]
    assert box.session.wait() == 0
    stdin.close()
    out.close()
    box.session.delete()


def test_an_exec(rig: Rig) -> None:
    box = Streamed(rig, "sleep 1000")
    box.create()
    box.session.start()
    for number in range(3):
        id = f"e{number}"
        stdin, out, err = (box.peer(name, id) for name in ("stdin", "stdout", "stderr"))
        box.exec(id, "cat; echo err >&2; exit 5", stdin=True)
        box.session.task.start(id)
        stdin.write(b"in\n")
        stdin.close()
        box.session.task.close_io(id)
        assert (out.read_all(), err.read_all()) == (b"in\n", b"err\n")
        assert box.session.task.wait(id).exit_status == 5
        assert box.session.task.delete(id).exit_status == 5
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


# red: Delete waits for the end of a pipe that others hold, or does not end the stream
def test_delete_ends_a_stream_that_is_held_by_others(rig: Rig) -> None:
    box = Streamed(rig, "sleep 1000")
    box.create()
    box.session.start()
    out = box.peer("stdout", "e")
    box.exec("e", "sleep 1000 & echo hello")
    box.session.task.start("e")
    assert box.session.task.wait("e").exit_status == 0
    out.grant(WINDOW)
    out.read(6)
    assert box.session.task.delete("e", timeout=8.0).exit_status == 0
    assert out.receive() is None and out.taken == b"hello\n"
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


# red: Delete closes the pipe at once
def test_delete_waits_for_a_client_that_is_behind(rig: Rig) -> None:
    box = Streamed(rig, "seq 1 10000")
    out = box.peer("stdout")
    box.create()
    box.session.start()
    box.session.wait()
    request = task_pb2.DeleteRequest(id=box.session.id)
    service = "containerd.task.v3.Task"
    deleted = box.session.client.start(service, "Delete", request, task_pb2.DeleteResponse, timeout=20.0)
    until(lambda: not (rig.root / "runc" / rig.namespace / box.session.id).exists())
    for _ in range(50):  # the runtime has done its part; what follows takes no longer than these
        box.session.task.state()
    assert not deleted.done()
    assert out.read_all() == b"".join(b"%d\n" % number for number in range(1, 10001))
    assert deleted.result().exit_status == 0
    box.session.end()


def test_a_process_that_does_not_read_bounds_stdin(rig: Rig) -> None:
    box = Streamed(rig, "sleep 1000", stdin=True)
    stdin = box.peer("stdin")
    box.create()
    box.session.start()
    stdin.window += stdin.receive().update
    assert stdin.window == WINDOW
    stdin.send(transfer_pb2.Data(data=b"x" * (stdin.window + 1)))
    with pytest.raises(ResourceExhausted, match="may be sent"):
        stdin.receive()
    again = box.peer("stdin")
    again.window += again.receive().update
    assert again.window == WINDOW
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


def test_stdin_that_the_process_has_closed_ends_the_stream(rig: Rig) -> None:
    box = Streamed(rig, "exec <&-; echo closed; sleep 1000", stdin=True)
    stdin, out = box.peer("stdin"), box.peer("stdout")
    box.create()
    box.session.start()
    out.grant(WINDOW)
    out.read(7)
    stdin.write(b"x")
    while stdin.receive() is not None:
        pass
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


def first(message: AnyMessage) -> Any:
    def call(address: str) -> None:
        with Client(address) as client:
            both = {"client_streams": True, "server_streams": True}
            stream = client.stream(STREAMING, "Stream", None, AnyMessage, timeout=10.0, **both)
            stream.send(message)
            stream.receive()

    return call


@pytest.mark.parametrize(
    "message",
    [
        AnyMessage(),
        AnyMessage(type_url="containerd.services.streaming.v1.StreamInit", value=b"\xff"),
        AnyMessage(type_url="containerd.services.streaming.v1.StreamInit"),
        anys.pack(AnyMessage(), transfer_pb2.Data(data=b"x")),
    ],
)
def test_a_stream_begins_with_its_id(rig: Rig, message: AnyMessage) -> None:
    box = Streamed(rig, "true")
    with pytest.raises(InvalidArgument):
        first(message)(box.address)
    box.create()
    box.session.start()
    assert box.session.wait() == 0
    box.session.delete()


@pytest.mark.parametrize("update", [-1, -(2**31)])
def test_a_window_does_not_shrink(rig: Rig, update: int) -> None:
    box = Streamed(rig, "echo out")
    out = box.peer("stdout")
    box.create()
    out.grant(update)
    with pytest.raises(InvalidArgument, match="window"):
        out.receive()
    box.session.start()
    assert box.peer("stdout").read_all() == b"out\n"
    box.session.wait()
    box.session.delete()


def test_what_a_uri_must_say(rig: Rig) -> None:
    box = Streamed(rig, "true")
    create = box.session.task.create
    path = str(box.session.bundle.path)
    for uri, said in (
        ("ttrpc+unix:///run/nobody.sock?streaming_id=1", f"/run/nobody.sock, and this shim serves on {box.address[7:]}"),
        (f"ttrpc+{box.address}", "no streaming_id"),
        (f"ttrpc+{box.address}?streaming_id=", "no streaming_id"),
        (f"ttrpc+{box.address}?stream_id=1", "no streaming_id"),
        (f"grpc+{box.address}?streaming_id=1", "unknown scheme"),
    ):
        for name in ("stdin", "stdout", "stderr"):
            with pytest.raises(InvalidArgument, match=re.escape(said)):
                create(path, options=rig.options, **{name: uri})
    with pytest.raises(InvalidArgument, match="serves no streams"):
        check("", "ttrpc+unix:///s?streaming_id=1", "")
    with pytest.raises(AlreadyExists, match="another process's"):
        create(path, stdout=box.uri("stdout"), stderr=box.uri("stdout"), options=rig.options)
    # What was refused has left nothing behind that would be in the way.
    box.create()
    box.session.start()
    assert box.session.wait() == 0
    box.session.delete()


def test_a_name_with_an_escaped_id(rig: Rig) -> None:
    box = Streamed(rig, "echo out")
    uri = f"ttrpc+{box.address}?other=1&streaming_id=a%26b+c&streaming_id=not-this"
    box.session.task.create(str(box.session.bundle.path), stdout=uri, options=rig.options)
    box.session.start()
    assert Peer(box.address, "a&b c").read_all() == b"out\n"
    box.session.wait()
    box.session.delete()


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# red: a pipe, a call or a connection kept
def test_nothing_is_left_of_streams(rig: Rig) -> None:
    box = Streamed(rig, "sleep 1000")
    box.create()
    box.session.start()
    before = fds(box.session.shim_pid)
    for number in range(12):
        id = f"e{number}"
        peers = [box.peer(name, id) for name in ("stdin", "stdout", "stderr")]
        box.exec(id, "cat; echo x >&2", stdin=True)
        if number % 3 != 2:  # else it is never started
            box.session.task.start(id)
        if number % 3 == 1:
            for peer in peers:
                peer.close(half=False)
            box.session.task.close_io(id)
        elif number % 3 == 0:
            peers[0].close()
            assert (peers[1].read_all(), peers[2].read_all()) == (b"", b"x\n")
        if number % 3 != 2:
            box.session.task.wait(id)
        box.session.task.delete(id)
        for peer in peers:
            peer.close(half=False)
    until(lambda: fds(box.session.shim_pid) <= before, what="fds are left")
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


# red: an exec that is there already knows no streams after an upgrade
def test_an_upgrade_waits_for_the_end_of_streams(rig: Rig) -> None:
    box = Streamed(rig, "sleep 1000")
    box.session.task.create(str(box.session.bundle.path), options=rig.options)
    box.session.start()
    box.exec("e1", "echo one")
    box.exec("e2", "echo two")
    box.session.task.start("e1")
    with pytest.raises(NoAnswer, match="streams"):
        upgrade(box.session)
    assert box.peer("stdout", "e1").read_all() == b"one\n"
    box.session.task.wait("e1")
    box.session.task.delete("e1")
    upgrade(box.session)
    out = box.peer("stdout", "e2")
    box.session.task.start("e2")
    assert out.read_all() == b"two\n"
    box.session.task.wait("e2")
    box.session.task.delete("e2")
    box.session.task.kill(signal.SIGKILL)
    box.session.wait()
    box.session.delete()


def test_a_shim_without_streams_imports_nothing_of_them() -> None:
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from shimcore import _ttrpc, _reaper
from shimcore.bootstrap import Config, parse_flags
from shimcore.oci.shim import RuncShim
from shimcore.publisher import RemotePublisher
from shimcore.task import register
core = _reaper.Core("n", "")
shim = RuncShim("x", parse_flags(["-namespace", "n", "-id", "i"]), Config())
publisher = RemotePublisher(core, "n")
server = _ttrpc.Server(core)
register(server, shim.create_task_service(publisher))
shim.register_services(server, publisher)
from shimcore.oci.stdio import check, open_stdio
check("/a", "file:///b", "")
open_stdio("", "", "").close()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "shimcore.oci.service" in loaded
    names = ("streaming", "relay", "copying", "binlog")
    assert not loaded & {*(f"shimcore.oci.{name}" for name in names), "shimcore.streams"}

