"""What containerd starts a shim with, and what it is answered: argv + environment + stdin -> Invocation,
result -> bytes.

Pure: nothing here reads a file, a descriptor or os.environ, or knows what time it is.

Three generations of containerd start a shim in three ways, and each is told by what it does, since no
variable names it (MAX_SHIM_VERSION is 2 even where 3 is taken):

    2.3+      stdin holds BootstrapParams whose instance_id and namespace are those of -id and -namespace
    1.7-2.2   GRPC_ADDRESS is set; stdin holds an Any with the options, or nothing
    1.6       it is not; stdin likewise

An Any has a string and bytes as fields 1 and 2, BootstrapParams two strings: each parses as the other in
silence. Hence the comparison with the flags, and hence no field besides those two is accepted in an Any.
"""

from __future__ import annotations

from . import wire
from .errors import InvalidArgument
from .flags import FALSE, USAGE, Flags, check, parse_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Any_ = tuple[str, bytes]

__all__ = [
    "DELETE", "FEATURES_TYPE", "GEN_16", "GEN_17", "GEN_23", "HELP", "INFO", "SERVE", "START", "USAGE",
    "VERSION", "BootstrapParams", "Config", "DeleteResult", "Flags", "Invocation", "StartOpts", "check",
    "encode_address", "encode_delete", "encode_info", "parse_any", "parse_flags", "parse_invocation",
    "parse_params", "reads_stdin", "type_name",
]  # fmt: skip

GEN_16 = "1.6"
GEN_17 = "1.7-2.2"
GEN_23 = "2.3+"

START, DELETE, SERVE, INFO, VERSION, HELP = "start", "delete", "serve", "info", "version", "help"


class Config:
    """What a shim may change about its process.

    no_setup_logger: leave the log alone; default_log_level: "off" to "trace"; log_format: "logfmt" or "json";
    no_reaper: leave SIGCHLD alone; no_sub_reaper: do not become the parent of orphans.
    """

    __slots__ = ("default_log_level", "log_format", "no_reaper", "no_setup_logger", "no_sub_reaper")

    def __init__(
        self,
        no_setup_logger: bool = False,
        default_log_level: str = "info",
        no_reaper: bool = False,
        no_sub_reaper: bool = False,
        log_format: str = "logfmt",
    ) -> None:
        self.no_setup_logger = no_setup_logger
        self.default_log_level = default_log_level
        self.log_format = log_format
        self.no_reaper = no_reaper
        self.no_sub_reaper = no_sub_reaper


# --- stdin


def type_name(type_url: str) -> str:
    """An Any's message name: containerd writes it bare, Go's anypb and 2.3's extensions with
    type.googleapis.com/ before.
    """
    return type_url.removeprefix("type.googleapis.com/")


class BootstrapParams:
    """containerd.runtime.bootstrap.v1.BootstrapParams, stdin of `start` from containerd 2.3 on.

    log_level: slog's numbers (-8 trace, -4 debug, 0 info, 4 warn, 8 error); socket_dir: None unless given;
    extensions: (type_url, value) each.
    """

    __slots__ = (
        "containerd_binary", "containerd_grpc_address", "containerd_ttrpc_address", "containerd_version",
        "extensions", "instance_id", "log_level", "namespace", "socket_dir",
    )  # fmt: skip

    def __init__(self) -> None:
        self.instance_id = ""
        self.namespace = ""
        self.log_level = 0
        self.containerd_version = ""
        self.containerd_ttrpc_address = ""
        self.containerd_grpc_address = ""
        self.containerd_binary = ""
        self.extensions: list[Any_] = []
        self.socket_dir: str | None = None


_PARAM_STRINGS = {
    1: "instance_id",
    2: "namespace",
    4: "containerd_version",
    5: "containerd_ttrpc_address",
    6: "containerd_grpc_address",
    7: "containerd_binary",
    9: "socket_dir",
}


def parse_any(data: bytes) -> Any_:
    """(type_url, value) of a google.protobuf.Any that has these fields and no other. Raises ValueError."""
    type_url, value = "", b""
    for number, item in wire.fields(data):
        if not isinstance(item, bytes) or number not in (1, 2):
            raise ValueError(f"field {number} is none of an Any's")
        if number == 1:
            type_url = item.decode("utf-8")
        else:
            value = item
    if not type_url and value:
        raise ValueError("a value without a type")
    if not type_url.isprintable() or " " in type_url:
        raise ValueError("the type is no name")
    return type_url, value


def parse_params(data: bytes) -> BootstrapParams:
    """BootstrapParams from its bytes; fields that are not known yet are passed over. Raises ValueError."""
    params = BootstrapParams()
    for number, item in wire.fields(data):
        if number in _PARAM_STRINGS:
            if not isinstance(item, bytes):
                raise ValueError(f"field {number} is no string")
            setattr(params, _PARAM_STRINGS[number], item.decode("utf-8"))
        elif number == 3:
            if not isinstance(item, int):
                raise ValueError("log_level is no number")
            params.log_level = wire.signed(item)
        elif number == 8:
            if not isinstance(item, bytes):
                raise ValueError("extensions hold no messages")
            for inner, value in wire.fields(item):
                if inner == 1 and isinstance(value, bytes):
                    params.extensions.append(parse_any(value))
    return params


class Invocation:
    """One run of a shim's binary, as parse_invocation reads it.

    action: START, DELETE, SERVE (any other action, as in the seed), INFO, VERSION or HELP. generation:
    GEN_16, GEN_17 or GEN_23; only `start` can tell 2.3 from those before. options: (type name, bytes) of the
    runtime's options, or None. extensions: all that 2.3 sent, options included. socket_dir: where 2.3 wants
    the socket, else None. sched_core: SCHED_CORE was asked for.
    """

    __slots__ = (
        "action", "containerd_version", "debug", "extensions", "flags", "generation", "grpc_address",
        "options", "params", "publish_binary", "sched_core", "socket_dir", "ttrpc_address",
    )  # fmt: skip

    def __init__(self, flags: Flags, action: str, generation: str = GEN_16) -> None:
        self.flags = flags
        self.action = action
        self.generation = generation
        self.debug = flags.debug
        self.grpc_address = flags.address
        self.ttrpc_address = ""
        self.publish_binary = flags.publish_binary
        self.containerd_version = ""
        self.options: Any_ | None = None
        self.extensions: list[Any_] = []
        self.params: BootstrapParams | None = None
        self.socket_dir: str | None = None
        self.sched_core = False

    def version(self, offered: int) -> int:
        """The version of the task API to answer `start` with, of at most the one offered.

        3 is for who has sent BootstrapParams: 1.7 refuses it and can't be told from 2.0 to 2.2. With 3 containerd hands the
        containers of a pod to the shim of its sandbox, with no `start` for them. Source: ShimManager.Start of containerd 2."""
        return offered if self.generation == GEN_23 else min(offered, 2)

    def start_opts(self) -> StartOpts:
        """What Shim.start_shim is given."""
        flags = self.flags
        return StartOpts(
            flags.id, self.publish_binary, flags.address, self.ttrpc_address, flags.namespace, self.debug,
            socket_dir=self.socket_dir, options=self.options,
        )  # fmt: skip


class StartOpts:
    """Options of `start`: the seed's six; socket_dir (2.3+, else None) and options ((type name, bytes) or
    None) besides.
    """

    __slots__ = (
        "address", "debug", "id", "namespace", "options", "publish_binary", "socket_dir", "ttrpc_address",
    )  # fmt: skip

    def __init__(
        self,
        id: str = "",
        publish_binary: str = "",
        address: str = "",
        ttrpc_address: str = "",
        namespace: str = "",
        debug: bool = False,
        *,
        socket_dir: str | None = None,
        options: Any_ | None = None,
    ) -> None:
        self.id = id
        self.publish_binary = publish_binary
        self.address = address
        self.ttrpc_address = ttrpc_address
        self.namespace = namespace
        self.debug = debug
        self.socket_dir = socket_dir
        self.options = options


def _action(flags: Flags) -> str:
    if flags.help:
        return HELP
    if flags.version:
        return VERSION
    if flags.info:
        return INFO
    return flags.action if flags.action in (START, DELETE) else SERVE


def reads_stdin(flags: Flags) -> bool:
    """Whether this run's stdin is to be read to its end: `start` and -info. Elsewhere it may be anything, and
    stay open.
    """
    return _action(flags) in (START, INFO)


def _options_of(extensions: list[Any_]) -> Any_ | None:
    """The runtime's options among 2.3's extensions: the first that is some message called Options or
    CreateOptions.
    """
    for type_url, value in extensions:
        if type_name(type_url).rpartition(".")[2] in ("Options", "CreateOptions"):
            return type_name(type_url), value
    return None


def _take_params(run: Invocation, params: BootstrapParams) -> None:
    run.generation = GEN_23
    run.params = params
    run.extensions = params.extensions
    run.options = _options_of(params.extensions)
    run.containerd_version = params.containerd_version
    run.socket_dir = params.socket_dir or None
    run.debug = run.debug or params.log_level <= -4
    run.ttrpc_address = params.containerd_ttrpc_address or run.ttrpc_address
    run.grpc_address = params.containerd_grpc_address or run.grpc_address
    run.publish_binary = params.containerd_binary or run.publish_binary


def parse_invocation(argv: Sequence[str], env: Mapping[str, str], stdin: bytes = b"") -> Invocation:
    """One run of a shim from argv (without the program's name), environment and the whole of stdin.

    stdin counts for `start` and -info only. Raises InvalidArgument: bad flags; no namespace; no TTRPC_ADDRESS
    where one is needed (start and serving, not `delete`, which has to work when containerd is away); a stdin
    that is none of what containerd sends, or BootstrapParams meant for another shim. Nothing is started with
    options that were not understood.
    """
    flags = parse_flags(argv)
    action = _action(flags)
    run = Invocation(flags, action, GEN_17 if env.get("GRPC_ADDRESS") else GEN_16)
    if action in (HELP, VERSION):
        return run
    if action != INFO:
        check(flags)
    run.ttrpc_address = env.get("TTRPC_ADDRESS", "")
    run.grpc_address = flags.address or env.get("GRPC_ADDRESS", "")
    run.sched_core = env.get("SCHED_CORE", "") not in ("", *FALSE)
    if stdin and action in (START, INFO):
        _read_stdin(run, stdin)
    if action in (START, SERVE) and not run.ttrpc_address:
        raise InvalidArgument("TTRPC_ADDRESS is not set")
    return run


def _read_stdin(run: Invocation, stdin: bytes) -> None:
    flags = run.flags
    params: BootstrapParams | None
    try:
        params = parse_params(stdin)
    except ValueError:
        params = None
    if params is not None and run.action == START and flags.id:
        if (params.instance_id, params.namespace) == (flags.id, flags.namespace):
            _take_params(run, params)
            return
    try:
        type_url, value = parse_any(stdin)
    except ValueError as error:
        what = f"stdin of {run.action} ({len(stdin)} bytes) is not a google.protobuf.Any: {error}"
        if params is not None and params.instance_id and params.namespace:
            what += f"; as BootstrapParams it is for {params.namespace!r}/{params.instance_id!r}"
        raise InvalidArgument(what) from None
    if type_url:
        run.options = type_name(type_url), value


# --- stdout


def encode_address(
    address: str,
    generation: str = GEN_16,
    *,
    version: int = 2,
    protocol: str = "ttrpc",
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """stdout of `start`: where the shim serves which version of the task API over which protocol.

    The plain address, which every containerd reads as version 2 over ttrpc, unless more has to be said:
    BootstrapResult from 2.3 on, JSON below. Raises InvalidArgument when it can't be said to this generation:
    version 3 below 2.3 (1.7 refuses it, and nothing tells 1.7 from 2.0), anything but the plain address to
    1.6; or when an address is empty, or it or the protocol has white space at an end: an early 2.3 trims the
    output before it decodes it.
    """
    for text in (address, protocol):
        if not text or text != text.strip():
            raise InvalidArgument(f"cannot answer start with {text!r}")
    if version not in (2, 3):
        raise InvalidArgument(f"there is no task API version {version}")
    if (version, protocol) == (2, "ttrpc") and not metadata:
        return address.encode()
    if generation == GEN_23:
        out = wire.integer(1, version)
        for key, value in (metadata or {}).items():
            out += wire.message(5, wire.string(1, key) + wire.string(2, value))
        # Fields may stand in any order; the last byte is a letter of the protocol's name, never white space.
        return out + wire.string(2, address) + wire.string(3, protocol)
    if generation != GEN_17 or version != 2 or metadata:
        raise InvalidArgument(f"containerd {generation} cannot be told of version {version} over {protocol}")
    from .util import json_dumps

    return json_dumps({"version": version, "address": address, "protocol": protocol}).encode()


def _timestamp(number: int, ns: int) -> bytes:
    seconds, nanos = divmod(ns, 1_000_000_000)
    return wire.message(number, wire.integer(1, seconds) + wire.integer(2, nanos))


class DeleteResult:
    """What `delete` prints. pid: init's, 0 unknown; exit_status: 0-255; exited_at_ns: ns since the epoch,
    None unknown.
    """

    __slots__ = ("exit_status", "exited_at_ns", "pid")

    def __init__(self, pid: int = 0, exit_status: int = 255, exited_at_ns: int | None = None) -> None:
        self.pid = pid
        self.exit_status = exit_status
        self.exited_at_ns = exited_at_ns

    def encode(self) -> bytes:
        """containerd.task.v2.DeleteResponse, without protobuf."""
        out = wire.integer(1, self.pid) + wire.integer(2, self.exit_status)
        return out if self.exited_at_ns is None else out + _timestamp(3, self.exited_at_ns)


def encode_delete(result: object) -> bytes:
    """stdout of `delete`, from a DeleteResult, a protobuf message, or bytes. Raises InvalidArgument on
    anything else.
    """
    if isinstance(result, bytes):
        return result
    for name in ("encode", "SerializeToString"):
        method = None if isinstance(result, str) else getattr(result, name, None)
        if method is not None:
            return bytes(method())
    kind = type(result).__name__
    raise InvalidArgument(f"delete_shim must return a DeleteResult or a DeleteResponse, not {kind}")


FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"


def encode_info(
    name: str,
    version: str,
    revision: str = "",
    *,
    options: Any_ | None = None,
    features: bytes | None = None,
    annotations: Mapping[str, str] | None = None,
) -> bytes:
    """stdout of -info: containerd.types.RuntimeInfo, without protobuf.

    options: (type_url, bytes) as they came in; features: the JSON of `runc features`, None when it has none.
    """
    out = wire.string(1, name) + wire.message(2, wire.string(1, version) + wire.string(2, revision))
    if options is not None:
        out += wire.message(3, wire.any(*options))
    if features is not None:
        out += wire.message(4, wire.any(FEATURES_TYPE, features))
    for key, value in (annotations or {}).items():
        out += wire.message(5, wire.string(1, key) + wire.string(2, value))
    return out
