"""How what a .proto names is named in Python."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

# A capital begins a word after a small letter, and before one unless that is the s of a plural (`ListIDs`).
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z](?!s(?![a-z]))[a-z])")


def python_name(method: str) -> str:
    """Name of the Python method for an rpc: `CloseIO` is `close_io`, `ResizePty` is `resize_pty`, and `Import`, which would be a
    keyword, is `import_`.
    """
    name = _WORDS.sub("_", method).lower()
    return name + "_" if keyword.iskeyword(name) else name


def handlers(service: ServiceDescriptor, implementation: object) -> Iterator[tuple[MethodDescriptor, Callable[..., Any]]]:
    """Each rpc that the implementation has a method for. Raises ValueError when there is none."""
    found = False
    for method in service.methods:
        handler = getattr(implementation, python_name(method.name), None)
        if handler is not None:
            found = True
            yield method, handler
    if not found:
        names = ", ".join(python_name(method.name) for method in service.methods)
        raise ValueError(f"{type(implementation).__name__} has no method of {service.full_name} (of: {names})")
