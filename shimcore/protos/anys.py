"""google.protobuf.Any the way containerd's typeurl writes it: the type URL is the bare full name.

Any.Pack puts a prefix and a slash before the name, and Any.Unpack and Any.Is say False to a URL without
a slash: towards containerd neither can be used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import Message

    M = TypeVar("M", bound=Message)


def pack(into: Any, message: Message) -> Any:
    """Fills `into` (a field of another message, or an Any) with `message` and returns it."""
    into.type_url = message.DESCRIPTOR.full_name
    into.value = message.SerializeToString()
    return into


def name(packed: Any) -> str:
    """The full name of the packed message; "" when nothing is packed.

    What comes before the last slash is a prefix (type.googleapis.com/). The JSON types of the runtime spec,
    whose URLs are paths (types.containerd.io/opencontainers/runtime-spec/1/Process), give their last part.
    """
    url: str = packed.type_url
    return url.rpartition("/")[2]


def unpack(packed: Any, kind: type[M]) -> M | None:
    """The packed message as a `kind`, whether or not its type URL has a prefix; None if it is another type.

    Raises google.protobuf.message.DecodeError when the value does not parse.
    """
    if name(packed) != kind.DESCRIPTOR.full_name:
        return None
    return kind.FromString(packed.value)
