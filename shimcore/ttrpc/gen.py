"""Makes typed ttrpc clients and service base classes from .proto files: docs/ttrpc-gen.md.

    python -m shimcore.ttrpc.gen FILE.proto ... [-I DIR] [--out DIR] [--messages] [--check]

For each file with services NAME_ttrpc.py and NAME_ttrpc.pyi, beside the NAME_pb2 of protobuf's own compiler. That reads the files
here too: the package grpcio-tools, or protoc on PATH. `plugin` is the same as a plugin of that compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import Edition, FileDescriptorSet

from shimcore.ttrpc.modules import GenError, texts


def compiler() -> list[str]:
    """The command line of a protobuf compiler, without its arguments. Raises GenError when there is none."""
    if importlib.util.find_spec("grpc_tools") is not None:
        return [sys.executable, "-m", "grpc_tools.protoc"]
    found = shutil.which("protoc")
    if found is None:
        raise GenError("no protobuf compiler: install the package grpcio-tools, or put protoc on PATH")
    return [found]


def typed(stub: str) -> str:
    """The .pyi of a _pb2 module as mypy --strict takes it: protoc leaves Mapping without parameters."""
    return re.sub(r"(?<!as )\b_Mapping(?=[\],])", "_Mapping[str, object]", stub)


def _name_of(file: str, folders: Sequence[str]) -> str:
    """What protoc calls a file: its path from the first of the folders that it is in."""
    path = Path(os.path.abspath(file))
    if not path.is_file():
        raise GenError(f"{file}: no such file")
    for folder in folders:
        if path.is_relative_to(os.path.abspath(folder)):
            return path.relative_to(os.path.abspath(folder)).as_posix()
    raise GenError(f"{file}: in none of the folders given by -I ({', '.join(folders)})")


def generate(files: Sequence[str], folders: Sequence[str], *, messages: bool = False) -> dict[str, str]:
    """Text by relative path of all that is made for .proto files.

    folders: where these and what they import are looked for. messages: also protobuf's own modules (NAME_pb2.py and .pyi).
    Raises GenError, when protoc refuses the files too: it has said why on stderr then.
    """
    names = [_name_of(file, folders) for file in files]
    with tempfile.TemporaryDirectory() as temporary:
        out, descriptors = Path(temporary, "out"), Path(temporary, "descriptors")
        out.mkdir()
        command = [*compiler(), *(f"-I{folder}" for folder in folders), f"--descriptor_set_out={descriptors}"]
        command += ["--include_imports", "--include_source_info"]
        if messages:
            command += [f"--python_out={out}", f"--pyi_out={out}"]
        if subprocess.run([*command, *files]).returncode:
            raise GenError("protoc has failed")
        made = {path.relative_to(out).as_posix(): path.read_text("utf-8") for path in out.rglob("*_pb2.py*")}
        services = texts(FileDescriptorSet.FromString(descriptors.read_bytes()).file, names)
    if not services and not messages:
        raise GenError(f"no service in {', '.join(files)}")
    return services | {name: typed(text) if name.endswith(".pyi") else text for name, text in made.items()}


def plugin() -> int:
    """The program protoc-gen-shimcore-ttrpc: a request of protoc on stdin, the answer on stdout."""
    request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    answer = CodeGeneratorResponse(
        supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL | CodeGeneratorResponse.FEATURE_SUPPORTS_EDITIONS,
        minimum_edition=Edition.EDITION_PROTO2,
        maximum_edition=Edition.EDITION_2023,
    )
    try:
        for name, content in texts(request.proto_file, request.file_to_generate).items():
            answer.file.add(name=name, content=content)
    except GenError as error:
        answer.error = str(error)
    sys.stdout.buffer.write(answer.SerializeToString())
    return 0


def _drift(made: dict[str, str], out: Path) -> list[str]:
    lines = []
    for name, text in made.items():
        path = out / name
        if not path.exists():
            lines.append(f"missing: {path}")
        elif path.read_text("utf-8") != text:
            lines.append(f"differs: {path}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shimcore.ttrpc.gen", description="Make typed ttrpc clients and service base classes from .proto files."
    )
    parser.add_argument("files", nargs="+", metavar="FILE.proto")
    parser.add_argument("-I", dest="folders", action="append", metavar="DIR", help="where imports are looked for (default: .)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the modules are put (default: .)")
    parser.add_argument("--messages", action="store_true", help="make protobuf's own modules, NAME_pb2, too")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name what is missing or differs")
    options = parser.parse_args(arguments)
    try:
        made = generate(options.files, options.folders or ["."], messages=options.messages)
        if options.check:
            lines = _drift(made, options.out)
            for line in lines:
                print(line, file=sys.stderr)
            return 1 if lines else 0
        for name, text in made.items():
            path = options.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    except (GenError, OSError) as error:
        print(f"gen: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
