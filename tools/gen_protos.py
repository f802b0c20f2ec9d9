"""Makes shimcore/protos/*_pb2.py and .pyi from the .proto files beside them.

    python tools/gen_protos.py           write
    python tools/gen_protos.py --check   write nothing; exit 1 and name what differs from a fresh run

The compiler is pinned: gencode of 5.29 runs on every protobuf runtime from 5.29 up to, not including, 8;
newer gencode refuses older runtimes. task_v3.proto is made here from task.proto: v3 differs in its
package only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from shimcore.ttrpc.gen import typed

ROOT = Path(__file__).resolve().parent.parent
PROTOS = Path("shimcore/protos")
COMPILER = "1.71"
V3_HEAD = "// Made from task.proto by tools/gen_protos.py: the same methods and messages under v3's name.\n"


def task_v3(v2: str) -> str:
    """The text of task_v3.proto, given that of task.proto."""
    body = v2[v2.index("syntax =") :]
    body, count = re.subn(r"(?m)^package containerd\.task\.v2;$", "package containerd.task.v3;", body)
    if count != 1:
        raise SystemExit("task.proto: no line `package containerd.task.v2;`")
    return V3_HEAD + body


def generate(root: Path, out: Path) -> None:
    """Compiles root's .proto files; everything made goes under `out`, by the same relative names."""
    for source in sorted((root / PROTOS).glob("*.proto")):
        text = source.read_text()
        (out / PROTOS / source.name).write_text(text)
        if source.name == "task.proto":
            (out / PROTOS / "task_v3.proto").write_text(task_v3(text))
        elif source.name == "task_v3.proto":
            (out / PROTOS / source.name).write_text(task_v3((root / PROTOS / "task.proto").read_text()))
    names = sorted(str(path.relative_to(out)) for path in (out / PROTOS).glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=.", *names]
    subprocess.run(command, cwd=out, check=True)
    for stub in (out / PROTOS).glob("*_pb2.pyi"):
        stub.write_text(typed(stub.read_text()))


def made(folder: Path) -> dict[str, str]:
    """Everything that this script makes, by file name, as found in `folder`."""
    paths = [*folder.glob("*_pb2.py"), *folder.glob("*_pb2.pyi"), *folder.glob("task_v3.proto")]
    return {path.name: path.read_text() for path in paths}


def drift(root: Path = ROOT) -> list[str]:
    """One line for each file in `root` that is missing, left over, or not what a fresh run makes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / PROTOS).mkdir(parents=True)
        generate(root, out)
        fresh, kept = made(out / PROTOS), made(root / PROTOS)
    lines = [f"missing: {name}" for name in sorted(fresh.keys() - kept.keys())]
    lines += [f"left over: {name}" for name in sorted(kept.keys() - fresh.keys())]
    lines += [f"differs: {name}" for name in sorted(fresh.keys() & kept.keys()) if fresh[name] != kept[name]]
    return lines


def write(root: Path = ROOT) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / PROTOS).mkdir(parents=True)
        generate(root, out)
        fresh, kept = made(out / PROTOS), made(root / PROTOS)
    for name, text in fresh.items():
        if kept.get(name) != text:
            (root / PROTOS / name).write_text(text)
    for name in kept.keys() - fresh.keys():
        (root / PROTOS / name).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with a fresh run, change nothing")
    check = parser.parse_args().check
    found = importlib.metadata.version("grpcio-tools")
    if not found.startswith(COMPILER + "."):
        print(f"grpcio-tools is {found}, the generated files are made with {COMPILER}.x", file=sys.stderr)
        return 2
    if not check:
        write()
        return 0
    lines = drift()
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
