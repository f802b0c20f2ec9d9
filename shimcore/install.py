"""Write a shim's executable: `python -m shimcore.install --dest DIR [--name N --runtime-id R module:Class]`.

containerd makes the name of a shim's binary from the last two dot parts of the runtime's name and looks it up
on PATH. What it finds there is the launcher (launcher/launcher.c), with the script beside it, NAME.py, which
does the same alone and more slowly. The script names its interpreter absolutely and starts it with -I and -S:
no environment variable and no .pth file changes what runs, and no site-packages is searched that the shim did
not ask for. So the few paths it needs are written into it.

This module is never imported by a shim.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import InvalidArgument, NotFound, ShimError

NAME = "containerd-shim-runc-v2-py"
RUNTIME_ID = "io.containerd.runc.v2-py"
SHIM = "shimcore.oci.shim:RuncShim"

# Linux takes 255 bytes of the first line, before 5.1 only 127, and cuts what is longer without a word
# (execve(2)).
MAX_SHEBANG = 120


def binary_name(runtime_id: str) -> str:
    """The name that containerd makes of a runtime's: io.containerd.runc.v2 -> containerd-shim-runc-v2.

    Raises InvalidArgument for a name of fewer than two parts. Source: BinaryName in containerd's shim
    package.
    """
    parts = runtime_id.split(".")
    if len(parts) < 2 or not all(parts) or "/" in runtime_id:
        raise InvalidArgument(f"not the name of a runtime: {runtime_id!r}")
    return f"containerd-shim-{parts[-2]}-{parts[-1]}"


def _folder_of(module: str) -> Path:
    """The directory that has to be on sys.path for `import module`; the module is found, not run."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise NotFound(f"there is no module {top}")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    if not spec.origin or spec.origin in ("built-in", "frozen"):
        raise NotFound(f"module {top} is in no directory")
    return Path(spec.origin).resolve().parent


def needed_paths(module: str) -> list[str]:
    """Directories that a shim of `module` imports from: ours, protobuf's, the author's. Raises NotFound."""
    package = Path(__file__).resolve().parent.parent
    # google is a namespace: only the part that holds protobuf counts.
    try:
        protobuf = importlib.util.find_spec("google.protobuf")
    except ImportError:
        protobuf = None
    if protobuf is None or not protobuf.origin:
        raise NotFound("protobuf is not installed")
    found = [package, Path(protobuf.origin).resolve().parents[2], _folder_of(module)]
    return list(dict.fromkeys(str(path) for path in found))


def free_threaded() -> bool:
    """Whether this interpreter is one that can do without its lock (PEP 703)."""
    return "t" in getattr(sys, "abiflags", "")


def script(runtime_id: str, shim: str, paths: Sequence[str], interpreter: str) -> str:
    """The executable's text. Raises InvalidArgument for a `shim` that isn't module:Class, or a path no script
    can hold.
    """
    module, _, name = shim.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise InvalidArgument(f"a shim is named module:Class, not {shim!r}")
    if not os.path.isabs(interpreter) or any(c in interpreter for c in "\n\r\\"):
        raise InvalidArgument(f"not usable as an interpreter: {interpreter!r}")
    # A free-threaded interpreter that is told to keep its lock does not warn of taking it back.
    flags = "-ISXgil=1" if free_threaded() else "-IS"
    first = f"#!{interpreter} {flags}"
    if len(os.fsencode(first)) > MAX_SHEBANG or any(c.isspace() for c in interpreter):
        # For sh the second line is an exec, for Python the second and third are one string.
        quoted = shlex.quote(interpreter)
        if "'''" in quoted:
            raise InvalidArgument(f"not usable as an interpreter: {interpreter!r}")
        first = f"#!/bin/sh\n'''exec' {quoted} {flags} \"$0\" \"$@\"\n' '''"
    return (
        f"{first}\n"
        "import sys\n\n"
        f"sys.path[0:0] = {list(paths)!r}\n"
        "from shimcore.shim import run\n\n"
        f"run({runtime_id!r}, {shim!r})\n"
    )


LAUNCHER = Path(__file__).resolve().parent / "_bin" / "launcher"
_MAGIC = b"shimcore"


def launcher(interpreter: str, script: str, template: bool) -> bytes:
    """The launcher's program with what it is to know behind it. Raises OSError when it was not built."""
    words = (interpreter, script, "1" if template else "0")
    known = b"".join(os.fsencode(word) + b"\0" for word in words)
    return LAUNCHER.read_bytes() + known + len(known).to_bytes(4, "little") + _MAGIC


def _replace(path: Path, data: bytes) -> None:
    """In one step, so that a start meanwhile runs the old or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _compile(paths: Sequence[str], module: str) -> None:
    """Bytecode for all that a start imports: without it a start takes twice as long, for a user who can't
    write it.
    """
    package = Path(__file__).resolve().parent
    compileall.compile_dir(str(package), quiet=2)
    top = module.partition(".")[0]
    if top == package.name:
        return
    folder = _folder_of(module)
    if (folder / top).is_dir():
        compileall.compile_dir(str(folder / top), quiet=2)
    else:
        compileall.compile_file(str(folder / f"{top}.py"), quiet=2)


def install(
    dest: str,
    *,
    runtime_id: str = RUNTIME_ID,
    shim: str = SHIM,
    name: str | None = None,
    interpreter: str | None = None,
    template: bool | None = None,
) -> str:
    """Write the executable of a shim into `dest`, made if need be, and its script beside it; returns the former's path.

    name: by default what containerd makes of the runtime's name. interpreter: absolute path, ours by default.
    template: whether it uses the warm template; by default our own shim does, and no other, whose modules we do not know. Each
    file is replaced in one step, so that a start meanwhile runs the old or the new. Raises InvalidArgument, NotFound, OSError.
    """
    if name is None:
        name = binary_name(runtime_id)
    if "/" in name or name in ("", ".", ".."):
        raise InvalidArgument(f"not a file name: {name!r}")
    module = shim.partition(":")[0]
    interpreter = interpreter or sys.executable
    # Names first, then what is found by them.
    script(runtime_id, shim, (), interpreter)
    paths = needed_paths(module)
    text = script(runtime_id, shim, paths, interpreter)
    folder = Path(dest)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / name
    beside = path.with_name(name + ".py")
    program = launcher(interpreter, str(beside), shim == SHIM if template is None else template)
    _replace(beside, text.encode("utf-8", "surrogateescape"))
    _replace(path, program)
    _compile(paths, module)
    return str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shimcore.install",
        description="Write a shim's executable; without a shim, that of ours for runc.",
    )
    parser.add_argument("shim", nargs="?", metavar="module:Class", help="the author's class")
    parser.add_argument("--dest", required=True, help="directory of the executable, on containerd's PATH")
    parser.add_argument("--runtime-id", help="the runtime's name, such as io.containerd.foo.v1")
    parser.add_argument("--name", help="the executable's name, if not what containerd makes of the runtime's")
    parser.add_argument("--interpreter", help="absolute path of its Python, by default this one")
    parser.add_argument(
        "--template", action=argparse.BooleanOptionalAction, help="start it from a warm template (by default our own shim alone)"
    )
    args = parser.parse_args(argv)
    if args.shim and not args.runtime_id:
        parser.error("a shim of your own needs --runtime-id")
    try:
        runtime_id = args.runtime_id or RUNTIME_ID
        shim = args.shim or SHIM
        path = install(
            args.dest, runtime_id=runtime_id, shim=shim, name=args.name, interpreter=args.interpreter, template=args.template
        )
    except (ShimError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    expected = binary_name(runtime_id)
    if os.path.basename(path) != expected:
        print(f"note: containerd looks for {expected}, or for an absolute path", file=sys.stderr)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
