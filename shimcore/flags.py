"""The command line that containerd gives a shim, parsed by the rules of Go's package flag.

argparse would take `--debug true` and abbreviations, refuse `-x=v`, and cost eight milliseconds.
"""

from __future__ import annotations

from .errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_BOOLS = {"debug": "debug", "v": "v", "version": "version", "info": "info", "h": "help", "help": "help"}
_STRINGS = {
    "namespace": "namespace",
    "id": "id",
    "socket": "socket",
    "bundle": "bundle",
    "address": "address",
    "publish-binary": "publish_binary",
}
# strconv.ParseBool
TRUE = ("1", "t", "T", "TRUE", "true", "True")
FALSE = ("0", "f", "F", "FALSE", "false", "False")

USAGE = """\
  -address string         grpc address back to main containerd
  -bundle string          path to the bundle if not workdir
  -debug                  enable debug output in logs
  -id string              id of the task
  -info                   read the options from stdin, print the runtime's info to stdout, and exit
  -namespace string       namespace that owns the shim
  -publish-binary string  path to publish binary (used for publishing events)
  -socket string          socket path to serve
  -v, -version            show the shim's version and exit
"""


class Flags:
    """The command line. Strings are "" and bools False unless given; `version` is set by -v too; `args`
    follow the action.
    """

    __slots__ = (
        "action", "address", "args", "bundle", "debug", "help", "id", "info", "namespace", "publish_binary",
        "socket", "v", "version",
    )  # fmt: skip

    def __init__(
        self,
        *,
        debug: bool = False,
        v: bool = False,
        version: bool = False,
        info: bool = False,
        help: bool = False,
        namespace: str = "",
        id: str = "",
        socket: str = "",
        bundle: str = "",
        address: str = "",
        publish_binary: str = "",
        action: str = "",
        args: Sequence[str] = (),
    ) -> None:
        self.debug = debug
        self.v = v
        self.version = version
        self.info = info
        self.help = help
        self.namespace = namespace
        self.id = id
        self.socket = socket
        self.bundle = bundle
        self.address = address
        self.publish_binary = publish_binary
        self.action = action
        self.args = tuple(args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flags) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        given = [f"{n}={getattr(self, n)!r}" for n in self.__slots__ if getattr(self, n)]
        return f"Flags({', '.join(given)})"


def parse_flags(argv: Sequence[str]) -> Flags:
    """Parse argv without the program's name by the rules of Go's package flag.

    -x v, -x=v, --x v; a bool takes a value only by "="; the last of several counts; parsing ends at the first
    argument that is no flag, which is the action, or after "--". Raises InvalidArgument with Go's own texts.
    """
    flags = Flags()
    rest = list(argv)
    while rest:
        arg = rest[0]
        if len(arg) < 2 or arg[0] != "-":
            break
        rest.pop(0)
        if arg == "--":
            break
        name, equals, value = arg[2 if arg[1] == "-" else 1 :].partition("=")
        if not name or name[0] == "-":
            raise InvalidArgument(f"bad flag syntax: {arg}")
        if name in _BOOLS:
            if equals and value not in TRUE + FALSE:
                raise InvalidArgument(f'invalid boolean value "{value}" for -{name}: parse error')
            setattr(flags, _BOOLS[name], value in TRUE if equals else True)
        elif name in _STRINGS:
            if not equals:
                if not rest:
                    raise InvalidArgument(f"flag needs an argument: -{name}")
                value = rest.pop(0)
            setattr(flags, _STRINGS[name], value)
        else:
            raise InvalidArgument(f"flag provided but not defined: -{name}")
    flags.version = flags.version or flags.v
    if rest:
        flags.action = rest.pop(0)
    flags.args = tuple(rest)
    return flags


def check(flags: Flags) -> None:
    """Raise InvalidArgument when there is no namespace. -v, -info and -help do without; see parse_invocation.
    """
    if not flags.namespace:
        raise InvalidArgument("Shim namespace cannot be empty")
