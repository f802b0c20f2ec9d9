"""The message modules, imported when something of them is first used: `from shimcore.protos.lazy import task_pb2`.

A daemon that was not forked from a template serves before it has imported protobuf, which takes longer than all else that it
imports."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        import sys

        if attribute.startswith("__"):
            raise AttributeError(attribute)
        name = f"{__package__}.{self._name}"
        __import__(name)
        value = getattr(sys.modules[name], attribute)
        self.__dict__[attribute] = value  # asked once
        return value


def __getattr__(name: str) -> ModuleType:
    if not name.endswith("_pb2"):
        raise AttributeError(name)
    return _Lazy(name)  # type: ignore[return-value]


class Message:
    """In the place of a message's class, for Server.add_service: its module is imported with the first request."""

    __slots__ = ("_kind", "_module")

    def __init__(self, module: ModuleType, kind: str) -> None:
        self._module = module
        self._kind = kind

    def __call__(self) -> Any:
        return getattr(self._module, self._kind)()

    def FromString(self, data: bytes) -> Any:
        return getattr(self._module, self._kind).FromString(data)
