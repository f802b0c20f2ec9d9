"""The text of NAME_ttrpc.py and NAME_ttrpc.pyi for a .proto file with services; see gen.py.

The .py has the calls and no types, so that it imports nothing that a client does not need; the .pyi has the types, and the
comments of the .proto as docstrings.
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from shimcore.ttrpc.names import python_name

# Field numbers of FileDescriptorProto.service and ServiceDescriptorProto.method, of which the paths of comments are made.
_SERVICE, _METHOD = 6, 2

_HEAD = "# Made from {} by shimcore.ttrpc.gen: change that, not this.\n"
_UNTYPED = "# Its types are in the .pyi.\n# mypy: ignore-errors\n"
_INDENT = "    "


class GenError(Exception):
    """A .proto that no module can be made for; the text says why."""


@dataclass(frozen=True)
class _Rpc:
    name: str
    python: str
    request: str
    response: str
    client_streams: bool
    server_streams: bool
    comment: str


@dataclass(frozen=True)
class _Service:
    name: str
    full_name: str
    rpcs: list[_Rpc]
    comment: str


def module_of(proto: str, suffix: str) -> str:
    """Full name of the Python module for a .proto file, as protoc's own plugin names it; suffix: `_pb2` or `_ttrpc`.

    Raises GenError when an import statement can't have that name."""
    name = proto.removesuffix(".proto").replace("-", "_").replace("/", ".") + suffix
    for part in name.split("."):
        if keyword.iskeyword(part) or not part.isidentifier():
            raise GenError(f"{proto}: its module would be {name}, and `{part}` can't be a name in Python")
    return name


def _messages(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """(full name, name within the module) of each message of a file."""

    def nested(outer: str, messages: Iterable[DescriptorProto]) -> Iterator[str]:
        for message in messages:
            yield outer + message.name
            yield from nested(f"{outer}{message.name}.", message.nested_type)

    for name in nested("", file.message_type):
        yield f".{file.package}.{name}" if file.package else f".{name}", name


class _Module:
    def __init__(self, file: FileDescriptorProto, types: Mapping[str, tuple[str, str]]) -> None:
        self.file = file
        self.types = types
        self.aliases: dict[str, str] = {}
        own = module_of(file.name, "_pb2")
        rpcs = [rpc for service in file.service for rpc in service.method]
        for proto in sorted({file.name} | {types[name][0] for rpc in rpcs for name in (rpc.input_type, rpc.output_type)}):
            module = module_of(proto, "_pb2")
            alias = "_" + module.rpartition(".")[2]
            while alias in self.aliases.values():
                alias += "_"
            self.aliases[module] = alias
        self.descriptor = f"{self.aliases[own]}.DESCRIPTOR"
        self.comments = {tuple(at.path): at.leading_comments or at.trailing_comments for at in file.source_code_info.location}
        self.services = [self._service(index) for index in range(len(file.service))]
        for name, count in Counter(prefix + service.name for service in file.service for prefix in ("", "Async")).items():
            if count > 1:
                raise GenError(f"{file.name}: {count} classes would be named `{name}Client` in Python")

    def _check(self, service: str, rpcs: Sequence[_Rpc]) -> None:
        for name, count in Counter(rpc.python for rpc in rpcs).items():
            if name.startswith("_"):
                raise GenError(f"{self.file.name}: {service}: a method named `{name}` would be private in Python")
            if count > 1:
                raise GenError(f"{self.file.name}: {service}: {count} methods would be named `{name}` in Python")

    def _service(self, index: int) -> _Service:
        service = self.file.service[index]
        full = f"{self.file.package}.{service.name}" if self.file.package else service.name
        rpcs = []
        for number, rpc in enumerate(service.method):
            rpcs.append(
                _Rpc(
                    name=rpc.name,
                    python=python_name(rpc.name),
                    request=self._type(rpc.input_type),
                    response=self._type(rpc.output_type),
                    client_streams=rpc.client_streaming,
                    server_streams=rpc.server_streaming,
                    comment=self.comments.get((_SERVICE, index, _METHOD, number), ""),
                )
            )
        self._check(full, rpcs)
        return _Service(service.name, full, rpcs, self.comments.get((_SERVICE, index), ""))

    def _type(self, full_name: str) -> str:
        proto, name = self.types[full_name]
        for part in name.split("."):
            if keyword.iskeyword(part):
                raise GenError(f"{self.file.name}: message {full_name[1:]}: `{part}` can't be a name in Python")
        return f"{self.aliases[module_of(proto, '_pb2')]}.{name}"

    def imports(self) -> list[str]:
        lines = []
        for module, alias in self.aliases.items():
            package, _, name = module.rpartition(".")
            lines.append(f"from {package} import {name} as {alias}" if package else f"import {name} as {alias}")
        return lines


# ---- the .py ----


def _calls(service: _Service) -> Iterator[str]:
    for rpc in service.rpcs:
        wire = f'"{service.full_name}", "{rpc.name}"'
        request = "" if rpc.client_streams else "request, "
        yield ""
        yield f"    def {rpc.python}(self, {request}*, timeout=None, metadata=()):"
        if not rpc.client_streams and not rpc.server_streams:
            yield f"        return self._client.call({wire}, request, {rpc.response}, timeout, metadata)"
            continue
        yield "        return self._client.stream("
        yield f"            {wire}, {request or 'None, '}{rpc.response},"
        yield f"            client_streams={rpc.client_streams}, server_streams={rpc.server_streams},"
        yield "            timeout=timeout, metadata=metadata,"
        yield "        )"


def _code(module: _Module) -> Iterator[str]:
    yield from [*module.imports(), "", "from shimcore.errors import Unimplemented as _Unimplemented"]
    for service in module.services:
        name = service.name
        yield from ["", "", f"class {name}Client:", "    def __init__(self, client):", "        self._client = client"]
        yield from _calls(service)
        yield from ["", "", f"class {name}Base:", f'    DESCRIPTOR = {module.descriptor}.services_by_name["{name}"]']
        for rpc in service.rpcs:
            yield from ["", f"    def {rpc.python}(self, request{'s' * rpc.client_streams}, context):"]
            yield f'        raise _Unimplemented("{service.full_name}/{rpc.name} is not implemented")'
        # What a client of asyncio returns is awaitable, so the calls are the same; only their types differ.
        for kind in "Client", "Base":
            yield from ["", "", f"class Async{name}{kind}({name}{kind}):", "    pass"]


# ---- the .pyi ----

_TYPES = """\
from collections.abc import Coroutine as _Coroutine
from typing import Any as _Any
from typing import ClassVar as _ClassVar

{imports}
from google.protobuf.descriptor import ServiceDescriptor as _ServiceDescriptor

from shimcore import Context as _Context
from shimcore import ttrpc as _ttrpc
from shimcore.ttrpc import aio as _aio
from shimcore.ttrpc import stubs as _stubs
from shimcore.ttrpc.client import MetadataLike as _MetadataLike"""


def _docstring(comment: str, indent: str) -> list[str]:
    # Nothing of a comment may end the string or be taken for an escape, and what can't be seen is not code.
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in comment.splitlines()]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    text = "\n".join(line[margin:] for line in lines).strip("\n").replace("\\", "\\\\").replace('"', '\\"')
    if not text:
        return []
    return [f"{indent}{line}" if line else "" for line in f'"""{text}"""'.splitlines()]


def _signature(rpc: _Rpc, asynchronous: bool) -> str:
    request = "" if rpc.client_streams else f"request: {rpc.request}, "
    options = "*, timeout: float | None = None, metadata: _MetadataLike = ()"
    kind = "Async" * asynchronous
    if rpc.client_streams:
        answer = f"_stubs.{kind}ClientStream[{rpc.request}, {rpc.response}]"
    elif rpc.server_streams:
        answer = f"_stubs.{kind}ServerStream[{rpc.response}]"
    else:
        answer = f"_Coroutine[_Any, _Any, {rpc.response}]" if asynchronous else rpc.response
    return f"def {rpc.python}(self, {request}{options}) -> {answer}:"


def _handler(rpc: _Rpc, asynchronous: bool) -> str:
    context = "_aio.Context" if asynchronous else "_Context"
    request = f"requests: _stubs.Requests[{rpc.request}]" if rpc.client_streams else f"request: {rpc.request}"
    answer = "Messages" if rpc.server_streams else "Answer"
    return f"def {rpc.python}(self, {request}, context: {context}) -> _stubs.{answer}[{rpc.response}]:"


def _class(head: str, service: _Service, first: str, signatures: Sequence[str]) -> Iterator[str]:
    doc = _docstring(service.comment, _INDENT)
    yield from ["", f"class {head}:", *doc, *[""][: len(doc)], _INDENT + first]
    for rpc, signature in zip(service.rpcs, signatures, strict=True):
        doc = _docstring(rpc.comment, _INDENT * 2)
        yield from [_INDENT + signature, *doc] if doc else [f"{_INDENT}{signature} ..."]


def _stub(module: _Module) -> Iterator[str]:
    yield _TYPES.format(imports="\n".join(module.imports()))
    for service in module.services:
        for asynchronous, prefix, client in ((False, "", "_ttrpc.Client"), (True, "Async", "_aio.Client")):
            name = prefix + service.name
            calls = [_signature(rpc, asynchronous) for rpc in service.rpcs]
            yield from _class(f"{name}Client", service, f"def __init__(self, client: {client}) -> None: ...", calls)
            handlers = [_handler(rpc, asynchronous) for rpc in service.rpcs]
            yield from _class(f"{name}Base", service, "DESCRIPTOR: _ClassVar[_ServiceDescriptor]", handlers)


def texts(files: Iterable[FileDescriptorProto], wanted: Iterable[str]) -> dict[str, str]:
    """What is made for the wanted .proto files, by the paths of the files to write: nothing for one that has no service.

    files: the wanted ones and all that they import, with their comments (protoc --include_imports --include_source_info).
    Raises GenError.
    """
    by_name = {file.name: file for file in files}
    types = {full: (file.name, name) for file in by_name.values() for full, name in _messages(file)}
    made = {}
    for proto in sorted(wanted):
        if not by_name[proto].service:
            continue
        module = _Module(by_name[proto], types)
        path = PurePosixPath(*module_of(proto, "_ttrpc").split("."))
        head = _HEAD.format(proto)
        made[f"{path}.py"] = "\n".join([head + _UNTYPED, *_code(module), ""])
        made[f"{path}.pyi"] = "\n".join([head, *_stub(module), ""])
    return made
