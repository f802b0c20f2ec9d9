"""bootstrap.py: what containerd's generations send and are answered (trials D1, D2, C11)."""

from __future__ import annotations

import json
import random

import pytest
from google.protobuf import any_pb2, timestamp_pb2

from shimcore import bootstrap as b
from shimcore.errors import InvalidArgument
from shimcore.protos import bootstrap_pb2, runc_options_pb2, task_pb2, types_pb2

ADDRESS = "unix:///run/containerd/s/abc"
ENV_16 = {"TTRPC_ADDRESS": "/run/c.ttrpc"}
ENV_17 = {**ENV_16, "GRPC_ADDRESS": "/run/c.sock", "NAMESPACE": "ns", "MAX_SHIM_VERSION": "2"}
START = ["-namespace", "ns", "-address", "/run/c.sock", "-publish-binary", "/bin/c", "-id", "c1", "start"]
OPTIONS = runc_options_pb2.Options(binary_name="crun", systemd_cgroup=True)
OPTIONS_TYPE = "containerd.runc.v1.Options"


def any_of(type_url: str = OPTIONS_TYPE) -> any_pb2.Any:
    return any_pb2.Any(type_url=type_url, value=OPTIONS.SerializeToString())


def params(**changed: object) -> bootstrap_pb2.BootstrapParams:
    values: dict[str, object] = {
        "instance_id": "c1",
        "namespace": "ns",
        "log_level": bootstrap_pb2.LOG_LEVEL_DEBUG,
        "containerd_version": "2.3.0",
        "containerd_ttrpc_address": "/new/c.ttrpc",
        "containerd_grpc_address": "/new/c.sock",
        "containerd_binary": "/new/c",
        "extensions": [bootstrap_pb2.Extension(value=any_of("type.googleapis.com/" + OPTIONS_TYPE))],
        "socket_dir": "/new/s",
    }
    return bootstrap_pb2.BootstrapParams(**(values | changed))  # type: ignore[arg-type]


# --- generations


def test_16() -> None:
    run = b.parse_invocation(START, ENV_16, any_of().SerializeToString())
    assert (run.action, run.generation, run.ttrpc_address) == (b.START, "1.6", "/run/c.ttrpc")
    assert run.options == (OPTIONS_TYPE, OPTIONS.SerializeToString())
    assert (run.debug, run.socket_dir, run.params) == (False, None, None)


def test_17() -> None:
    run = b.parse_invocation(START, ENV_17)
    assert (run.generation, run.options, run.grpc_address) == ("1.7-2.2", None, "/run/c.sock")


def test_23() -> None:
    run = b.parse_invocation(START, ENV_17, params().SerializeToString())
    assert run.generation == "2.3+"
    assert run.debug, "log level debug counts as -debug"
    assert (run.ttrpc_address, run.grpc_address, run.publish_binary) == ("/new/c.ttrpc", "/new/c.sock", "/new/c")
    assert (run.socket_dir, run.containerd_version) == ("/new/s", "2.3.0")
    assert run.options == (OPTIONS_TYPE, OPTIONS.SerializeToString())
    assert run.params is not None and run.params.log_level == -4
    opts = run.start_opts()
    assert (opts.id, opts.namespace, opts.address, opts.ttrpc_address, opts.publish_binary, opts.debug) == (
        "c1", "ns", "/run/c.sock", "/new/c.ttrpc", "/new/c", True,
    )  # fmt: skip
    assert (opts.socket_dir, opts.options) == ("/new/s", run.options)


def test_23_with_the_least_it_may_say() -> None:
    """Two strings: the very shape of an Any."""
    stdin = bootstrap_pb2.BootstrapParams(instance_id="c1", namespace="ns").SerializeToString()
    run = b.parse_invocation(START, ENV_17, stdin)
    assert (run.generation, run.options, run.debug) == ("2.3+", None, False)
    assert (run.ttrpc_address, run.grpc_address, run.socket_dir) == ("/run/c.ttrpc", "/run/c.sock", None)


@pytest.mark.parametrize(("level", "debug"), [(-8, True), (-4, True), (0, False), (4, False), (12, False)])
def test_23_log_levels(level: int, debug: bool) -> None:
    run = b.parse_invocation(START, ENV_17, params(log_level=level).SerializeToString())
    assert run.debug is debug and run.params is not None and run.params.log_level == level


def test_23_options_are_found_among_other_extensions() -> None:
    others = [any_pb2.Any(type_url="x.y.Thing", value=b"1"), any_of("runtimeoptions.v1.Options")]
    extensions = [bootstrap_pb2.Extension(value=other) for other in others]
    run = b.parse_invocation(START, ENV_17, params(extensions=extensions).SerializeToString())
    assert run.options == ("runtimeoptions.v1.Options", OPTIONS.SerializeToString())
    assert [type_url for type_url, _ in run.extensions] == ["x.y.Thing", "runtimeoptions.v1.Options"]


def test_23_fields_of_the_future_are_passed_over() -> None:
    stdin = params().SerializeToString() + b"\xa2\x06\x03abc" + b"\xa8\x06\x07"
    assert b.parse_invocation(START, ENV_17, stdin).socket_dir == "/new/s"


# --- D2: never misread


# Without a log level all of its fields but the extensions are strings, as an Any's are.
@pytest.mark.parametrize("changed", [{"instance_id": "c2"}, {"namespace": "other"}, {"namespace": "o", "log_level": 0}])
def test_params_for_another_shim(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="as BootstrapParams it is for"):
        b.parse_invocation(START, ENV_17, params(**changed).SerializeToString())


@pytest.mark.parametrize(
    "stdin",
    [
        b"\x00",
        b"garbage",
        b"{}\n",
        b"unix:///run/x",
        b"\xff" * 40,
        b"\x0a\x03a b",  # a type with a space
        b"\x0a\x02\xff\xfe",  # not UTF-8
        b"\x12\x01x",  # a value of no type
        b"\x08\x01",  # field 1 a number
        any_of().SerializeToString()[:-1],
        any_of().SerializeToString() + b"\x18\x01",
        any_of().SerializeToString() + b"\x1a\x01x",
        params().SerializeToString()[:-1],
    ],
)
def test_garbage_fails_the_start(stdin: bytes) -> None:
    with pytest.raises(InvalidArgument, match="stdin of start"):
        b.parse_invocation(START, ENV_17, stdin)


def test_random_bytes_never_pass_for_params_and_never_crash() -> None:
    rng = random.Random(5)
    whole = params().SerializeToString()
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            run = b.parse_invocation(START, ENV_17, bytes(data[: rng.randrange(len(data) + 1)]))
        except InvalidArgument:
            continue
        if run.params is not None:
            assert (run.params.instance_id, run.params.namespace) == ("c1", "ns")


@pytest.mark.parametrize("action", ["delete", "", "serve"])
def test_stdin_counts_only_where_containerd_writes_it(action: str) -> None:
    argv = [*START[:-1], action] if action else START[:-1]
    run = b.parse_invocation(argv, ENV_17, b"garbage")
    assert run.options is None and run.params is None
    assert not b.reads_stdin(run.flags)
    assert b.reads_stdin(b.parse_flags(START)) and b.reads_stdin(b.parse_flags(["-info"]))


def test_info_reads_options() -> None:
    run = b.parse_invocation(["-info"], {}, any_of().SerializeToString())
    assert (run.action, run.options) == (b.INFO, (OPTIONS_TYPE, OPTIONS.SerializeToString()))
    assert b.parse_invocation(["-info"], {}).options is None
    with pytest.raises(InvalidArgument, match="stdin of info"):
        b.parse_invocation(["-info"], {}, b"garbage")


# --- what is demanded


@pytest.mark.parametrize("action", ["start", "delete", ""])
def test_no_namespace(action: str) -> None:
    with pytest.raises(InvalidArgument, match="Shim namespace cannot be empty"):
        b.parse_invocation(["-id", "x", action], ENV_17)
    with pytest.raises(InvalidArgument, match="Shim namespace cannot be empty"):
        b.check(b.parse_flags(["-id", "x"]))


@pytest.mark.parametrize(("argv", "action"), [(["-v"], "version"), (["-help"], "help"), (["-info"], "info")])
def test_no_namespace_needed(argv: list[str], action: str) -> None:
    assert b.parse_invocation(argv, {}).action == action


def test_ttrpc_address() -> None:
    for argv in (START, START[:-1]):
        with pytest.raises(InvalidArgument, match="TTRPC_ADDRESS"):
            b.parse_invocation(argv, {})
    assert b.parse_invocation([*START[:-1], "delete"], {}).action == b.DELETE  # C11
    run = b.parse_invocation(START, {}, params().SerializeToString())
    assert run.ttrpc_address == "/new/c.ttrpc"


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("", False), ("0", False), ("false", False), ("1", True)])
def test_sched_core(value: str | None, asked: bool) -> None:
    env = ENV_17 if value is None else {**ENV_17, "SCHED_CORE": value}
    assert b.parse_invocation(START, env).sched_core is asked


def test_config_defaults() -> None:
    config = b.Config()
    assert (config.no_setup_logger, config.default_log_level) == (False, "info")
    assert (config.no_reaper, config.no_sub_reaper) == (False, False)


# --- stdout of start


@pytest.mark.parametrize("generation", [b.GEN_16, b.GEN_17, b.GEN_23])
def test_the_plain_address_works_everywhere(generation: str) -> None:
    assert b.encode_address(ADDRESS, generation) == ADDRESS.encode()


@pytest.mark.parametrize(
    ("env", "stdin", "version"),
    [
        (ENV_16, b"", 2),
        (ENV_16, any_of().SerializeToString(), 2),
        (ENV_17, b"", 2),
        (ENV_17, any_of().SerializeToString(), 2),
        ({**ENV_17, "MAX_SHIM_VERSION": "3"}, any_of().SerializeToString(), 2),  # nobody sets it to what it takes
        (ENV_17, params().SerializeToString(), 3),
    ],
)
def test_version_3_is_for_who_sends_bootstrap_params(env: dict[str, str], stdin: bytes, version: int) -> None:
    run = b.parse_invocation(START, env, stdin)
    assert (run.version(3), run.version(2)) == (version, 2)
    said = b.encode_address(ADDRESS, run.generation, version=run.version(3))
    if version == 2:
        assert said == ADDRESS.encode()
    else:
        assert bootstrap_pb2.BootstrapResult.FromString(said).version == 3


def test_bootstrap_result() -> None:
    data = b.encode_address(ADDRESS, b.GEN_23, version=3, metadata={"k": "v ", " ": ""})
    result = bootstrap_pb2.BootstrapResult.FromString(data)
    assert (result.version, result.address, result.protocol) == (3, ADDRESS, "ttrpc")
    assert dict(result.metadata) == {"k": "v ", " ": ""}
    # an early 2.3 trims before it decodes
    assert data.strip() == data and data.decode("latin-1").strip() == data.decode("latin-1")


def test_json() -> None:
    data = b.encode_address(ADDRESS, b.GEN_17, protocol="grpc")
    assert json.loads(data) == {"version": 2, "address": ADDRESS, "protocol": "grpc"}
    assert data.endswith(b"}")


@pytest.mark.parametrize(
    ("generation", "more"),
    [
        (b.GEN_16, {"version": 3}),
        (b.GEN_16, {"protocol": "grpc"}),
        (b.GEN_17, {"version": 3}),  # 1.7 refuses it and can't be told from 2.0
        (b.GEN_17, {"metadata": {"a": "b"}}),
        (b.GEN_23, {"version": 4}),
        (b.GEN_23, {"protocol": "grpc "}),
        (b.GEN_23, {"protocol": "", "version": 3}),
    ],
)
def test_what_cannot_be_said(generation: str, more: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        b.encode_address(ADDRESS, generation, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["", ADDRESS + "\n", " " + ADDRESS])
def test_an_address_of_white_space(address: str) -> None:
    with pytest.raises(InvalidArgument):
        b.encode_address(address)


# --- stdout of delete and -info


@pytest.mark.parametrize("pid", [0, 1, 4194304])
@pytest.mark.parametrize("status", [0, 10, 137, 255])
@pytest.mark.parametrize("ns", [None, 0, 1, 1_714_557_600_123_456_789, -1])
def test_delete_response(pid: int, status: int, ns: int | None) -> None:
    response = task_pb2.DeleteResponse(pid=pid, exit_status=status)
    if ns is not None:
        seconds, nanos = divmod(ns, 10**9)
        response.exited_at.CopyFrom(timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos))
    result = b.DeleteResult(pid, status, ns)
    assert result.encode() == response.SerializeToString()
    assert b.encode_delete(result) == b.encode_delete(response) == response.SerializeToString()


def test_delete_defaults_and_refusals() -> None:
    unknown = task_pb2.DeleteResponse.FromString(b.DeleteResult().encode())
    assert (unknown.pid, unknown.exit_status, unknown.HasField("exited_at")) == (0, 255, False)
    assert b.encode_delete(b"raw") == b"raw"
    for wrong in (None, "text", 3, object()):
        with pytest.raises(InvalidArgument, match="DeleteResponse"):
            b.encode_delete(wrong)


def test_runtime_info() -> None:
    data = b.encode_info(
        "io.containerd.runc.v2-py",
        "0.1.0",
        "abc",
        options=(OPTIONS_TYPE, b"\x01"),
        features=b'{"ociVersionMin":"1.0.0"}',
        annotations={"containerd.io/runtime-allow-mounts": "erofs"},
    )
    info = types_pb2.RuntimeInfo.FromString(data)
    assert (info.name, info.version.version, info.version.revision) == ("io.containerd.runc.v2-py", "0.1.0", "abc")
    assert (info.options.type_url, info.options.value) == (OPTIONS_TYPE, b"\x01")
    assert info.features.type_url.endswith("/runtime-spec/1/features/Features")
    assert json.loads(info.features.value) == {"ociVersionMin": "1.0.0"}
    assert dict(info.annotations) == {"containerd.io/runtime-allow-mounts": "erofs"}
    bare = types_pb2.RuntimeInfo.FromString(b.encode_info("n", ""))
    assert bare.HasField("version") and not bare.HasField("options") and not bare.HasField("features")
