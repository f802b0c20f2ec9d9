"""The rig's two ends of the protocol without a shim: the start protocol's strictness, and the Events
endpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any

from shimcore.errors import Closed, DeadlineExceeded, ShimError, Unimplemented
from shimcore.protos import anys, bootstrap_pb2, events_pb2, forward_pb2, task_pb2
from shimcore.protos.runc_options_pb2 import Options
from shimcore.rig import DOWN, FROZEN, MUTE, SLOW, UP, ActivationError, Activator, EventError, Events
from shimcore.rig.activate import GENERATIONS, parse_result
from shimcore.rig.events import SERVICE
from shimcore.ttrpc import Client

# ---- activation, against shims that misbehave --------------------------------------------------------------


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_start_is_given(tmp_path: Path, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRPC_ADDRESS", "NAMESPACE", "MAX_SHIM_VERSION"):
        monkeypatch.setenv(name, "stray")
    body = 'pwd -P >cwd; printf "%s\\n" "$@" >args; env >env; cat >stdin; ps -o pgid= -p $$ >pgid; printf unix:///x'
    shim = _script(tmp_path / "shim", body)
    activator = Activator(shim, namespace="ns", events="/e.ttrpc", generation=generation, containerd="/cd", debug=True)
    options = Options(binary_name="crun")
    started = activator.start("one", tmp_path, options)
    assert (started.address, started.version, started.form) == ("unix:///x", 2, "plain")
    args = (tmp_path / "args").read_text().split("\n")[:-1]
    assert args == "-namespace ns -address /e -publish-binary /cd -id one -debug start".split()
    assert (tmp_path / "cwd").read_text().strip() == str(tmp_path.resolve())
    env = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert (env["GOMAXPROCS"], env["TTRPC_ADDRESS"]) == ("2", "/e.ttrpc")
    found = [env.get(name) for name in ("GRPC_ADDRESS", "NAMESPACE", "MAX_SHIM_VERSION")]
    assert found == ([None] * 3 if generation == "1.6" else ["/e", "ns", "2"])
    stdin = (tmp_path / "stdin").read_bytes()
    if generation == "2.3":
        params = bootstrap_pb2.BootstrapParams.FromString(stdin)
        assert (params.instance_id, params.namespace, params.containerd_ttrpc_address) == ("one", "ns", "/e.ttrpc")
        assert params.log_level == bootstrap_pb2.LOG_LEVEL_DEBUG
        packed = params.extensions[0].value
    else:
        packed = Any.FromString(stdin)
    assert packed.type_url == "containerd.runc.v1.Options"
    assert anys.unpack(packed, Options) == options
    assert int((tmp_path / "pgid").read_text()) != os.getpgid(0)


def test_start_that_fails_or_hangs(tmp_path: Path) -> None:
    def start(body: str, timeout: float = 10) -> None:
        Activator(_script(tmp_path / "shim", body), namespace="n", events="/e").start("i", tmp_path, timeout=timeout)

    with pytest.raises(ActivationError, match="exited with 3: on stderr") as caught:
        start("echo on stderr >&2; exit 3")
    assert caught.value.status == 3
    with pytest.raises(ActivationError, match="nothing"):
        start("exit 0")
    with pytest.raises(ActivationError, match="can't run"):
        Activator(tmp_path / "none", namespace="n", events="/e").start("i", tmp_path)
    # Contract: a daemon that keeps stdout open hangs containerd, whatever the action itself does.
    began = time.monotonic()
    with pytest.raises(ActivationError, match=r"output did not end within 0\.3 s: unix:///x"):
        start("echo unix:///x; sleep 2 </dev/null &", timeout=0.3)
    with pytest.raises(ActivationError, match="start did not end"):
        start("exec sleep 100", timeout=0.3)
    assert time.monotonic() - began < 2


RESULT = bootstrap_pb2.BootstrapResult(version=3, address="unix:///x", protocol="ttrpc").SerializeToString()


@pytest.mark.parametrize(
    ("output", "generation", "wanted"),
    [
        (b"unix:///x\n", "1.6", ("unix:///x", 2, "ttrpc", "plain")),
        (b"/containerd-shim/a.sock", "1.6", ("@/containerd-shim/a.sock", 2, "ttrpc", "plain")),
        (b'{"version":2,"address":"unix:///x","protocol":"ttrpc"}', "1.7", ("unix:///x", 2, "ttrpc", "json")),
        (b'{"version":3,"address":"unix:///x","protocol":"ttrpc"}', "2.3", ("unix:///x", 3, "ttrpc", "json")),
        (RESULT, "2.3", ("unix:///x", 3, "ttrpc", "protobuf")),
        (b'{"version":2,"address":"unix:///x","protocol":"ttrpc"}', "1.6", None),
        (b'{"version":3,"address":"unix:///x","protocol":"ttrpc"}', "1.7", None),
        (RESULT, "1.7", None),
        (b"warning: x\nunix:///x", "1.6", None),
        (b"warning: x\nunix:///x", "2.3", None),
        (b'{"version":2', "2.3", None),
        (b"vsock://3:4", "2.3", None),
        (b"unix://", "2.3", None),
        (b"", "2.3", None),
    ],
)
def test_what_start_may_print(output: bytes, generation: str, wanted: tuple[str, int, str, str] | None) -> None:
    if wanted is None:
        with pytest.raises(ActivationError):
            parse_result(output, generation)
    else:
        assert parse_result(output, generation) == wanted


def test_delete_and_info(tmp_path: Path) -> None:
    answer = task_pb2.DeleteResponse(pid=5, exit_status=137)
    answer.exited_at.FromNanoseconds(1_700_000_000_000_000_001)
    (tmp_path / "answer").write_bytes(answer.SerializeToString())
    shim = _script(tmp_path / "shim", 'printf "%s\\n" "$@" >args; echo careful >&2; cat answer')
    activator = Activator(shim, namespace="n", events="/e.ttrpc")
    deleted = activator.delete("i", tmp_path)
    assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (5, 137, 1_700_000_000_000_000_001)
    assert deleted.warnings == "careful\n"
    assert (tmp_path / "args").read_text().split()[-5:] == ["-id", "i", "-bundle", str(tmp_path), "delete"]
    _script(shim, "exec sleep 100")
    with pytest.raises(ActivationError, match="did not end"):
        activator.delete("i", tmp_path, timeout=0.2)
    _script(shim, "echo no >&2; exit 1")
    with pytest.raises(ActivationError, match="exited with 1: no"):
        activator.info()


# ---- events ------------------------------------------------------------------------------------------------


def _forward(client: Client, container: str, timeout: float = 5) -> None:
    envelope = forward_pb2.Envelope(namespace="n", topic="/tasks/oom")
    anys.pack(envelope.event, events_pb2.TaskOOM(container_id=container))
    client.call(SERVICE, "Forward", forward_pb2.ForwardRequest(envelope=envelope), timeout=timeout)


def test_events_modes(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Events(tmp_path_factory.mktemp("e") / "s") as events:
        with Client(events.address) as client:
            began = time.monotonic_ns()
            _forward(client, "a")
            event = events.wait("/tasks/oom", container="a", timeout=0)
            assert began < event.at < time.monotonic_ns()
            assert isinstance(event.message, events_pb2.TaskOOM) and event.answered

            events.set_mode(SLOW, delay=0.2)
            _forward(client, "b")
            assert time.monotonic_ns() - events.wait(container="b").at >= 190_000_000

            events.set_mode(MUTE)
            with pytest.raises(DeadlineExceeded):
                _forward(client, "c", 0.1)
            assert not events.wait(container="c").answered

            events.set_mode(FROZEN)
            with pytest.raises(DeadlineExceeded):
                _forward(client, "d", 0.1)
            assert not events.of("d")
            events.set_mode(UP)
            events.wait(container="d")

            with pytest.raises(Unimplemented):
                client.call(SERVICE, "Backward", timeout=5)
            with pytest.raises(ShimError):
                client.call(SERVICE, "Forward", b"\xff", timeout=5)
            assert len(events.malformed) == 1

            events.set_mode(DOWN)
            with pytest.raises(Closed):
                _forward(client, "e")
        with pytest.raises(Closed):
            Client(events.address)
        events.restart()
        with Client(events.address) as client:
            _forward(client, "f")
        assert events.wait(container="f").connection == 2
        assert events.topics() == ["/tasks/oom"] * 5
        with pytest.raises(EventError, match="/tasks/oom f"):
            events.wait("/tasks/exit", timeout=0.05)
