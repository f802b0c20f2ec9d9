"""Is an installed shimcore whole? Run by the interpreter that it is installed for: `python tests/smoke.py`.

Needs the package and protobuf alone: no pytest, no compiler, no containerd. Of a wheel it tells what a clone can't: which files
came along, under which modes, and whether they work there. A container under the real runc is run as well where there is one.
Ends with 1 if a check failed. Names of checks as arguments: those alone.
"""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import shimcore
from shimcore.install import RUNTIME_ID, install
from shimcore.rig import FakeRuntime, Rig
from shimcore.rig.bundle import BUSYBOX

NAME = "containerd-shim-runc-v2-py"
MODULES = ("_reaper", "_ttrpc", "_frames")
PACKAGE = Path(shimcore.__file__).resolve().parent
# A process that was started for this run says so in its environment, which all that it starts inherits.
MARK = "SHIMCORE_TEMPLATE_DIR"


class Skip(Exception):
    """Can't be tried here; the text says why."""


def installed() -> bool:
    return PACKAGE.parent in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}


def run(*command: str, **env: str) -> str:
    """What it printed. Raises AssertionError with all of it when it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def public_names(root: Path) -> None:
    missing = [name for name in shimcore.__all__ if not hasattr(shimcore, name)]
    assert not missing, missing


def compiled_modules(root: Path) -> None:
    for name in MODULES:
        origin = Path(importlib.import_module(f"shimcore.{name}").__file__ or "").resolve()
        assert origin.parent == PACKAGE and origin.name == name + sysconfig.get_config_var("EXT_SUFFIX"), origin
    from shimcore import _frames, _reaper

    _reaper.kernel_check()
    assert _frames.__doc__ is not None


def files(root: Path) -> None:
    wanted = ["py.typed", "_reaper.pxd", "core/core.h", "protos/task.proto", "protos/task_pb2.pyi"]
    wanted += [f"{name}.pyi" for name in MODULES]
    assert not [name for name in wanted if not (PACKAGE / name).is_file()]
    for program in ("launcher", "pause", "fake-runtime"):
        assert os.access(PACKAGE / "_bin" / program, os.X_OK), program
    if installed():
        assert not [*PACKAGE.glob("**/*.c"), *PACKAGE.glob("*.pyx"), *PACKAGE.glob("**/*.new")]


def bytecode(root: Path) -> None:
    if not installed():
        raise Skip("not an installed package: pip compiles as it installs")
    sources = list(PACKAGE.rglob("*.py"))
    missing = [str(path) for path in sources if not Path(importlib.util.cache_from_source(str(path))).is_file()]
    assert sources and not missing, missing


def console_script() -> Path:
    """Where pip put the shim: its folder of commands, or that of the interpreter that was asked for."""
    path = Path(sysconfig.get_path("scripts")) / NAME
    if not path.exists():
        raise Skip(f"there is no {path}: not installed by pip")
    return path


def pips_shim(root: Path) -> None:
    assert "io.containerd.runc.v2-py" in run(str(console_script()), "-v")


def shimcore_command(root: Path) -> None:
    path = Path(sysconfig.get_path("scripts")) / "shimcore"
    if not path.exists():
        raise Skip(f"there is no {path}: not installed by pip")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if importlib.util.find_spec("click"):
        assert done.returncode == 0 and shimcore.__version__ in done.stdout, done
    else:  # it is in the extra `cli`
        assert done.returncode == 1 and "pip install" in done.stderr and done.stderr.count("\n") == 1, done


def installed_shim(root: Path) -> Path:
    path = root / "bin" / NAME
    if not path.exists():
        install(str(path.parent), runtime_id=RUNTIME_ID)
    return path


def install_command(root: Path) -> None:
    path = Path(run(sys.executable, "-m", "shimcore.install", "--dest", str(root / "bin")).strip())
    assert path == root.resolve() / "bin" / NAME
    assert sorted(os.listdir(path.parent)) == [NAME, f"{NAME}.py"]
    assert "io.containerd.runc.v2-py" in run(str(path), "-v", SHIMCORE_TEMPLATE="0")


def whole_life(shim: Path, root: Path, **env: str) -> None:
    """Create, Start, Wait, Delete, and what containerd is told of it; leaves nothing."""
    folder = Path(tempfile.mkdtemp(dir=root))
    with FakeRuntime(folder / "r") as runtime:
        with Rig(shim, runtime=str(runtime.binary), rootfs=root, env={**runtime.environment, **env}) as rig:
            container = rig.container(["@exit", "7"])
            assert container.create() > 0
            container.start()
            assert container.wait() == 7
            rig.events.wait("/tasks/exit", container=container.id)
            assert container.delete().exit_status == 7
            rig.events.wait("/tasks/delete", container=container.id)
            topics = [event.topic for event in rig.events.of(container.id)]
        assert topics == [f"/tasks/{name}" for name in ("create", "start", "exit", "delete")], topics
        assert [call.split()[0] for call in runtime.calls][:2] == ["create", "start"], runtime.calls


def life_under_pips_shim(root: Path) -> None:
    whole_life(console_script(), root)


def life_under_the_launcher(root: Path) -> None:
    whole_life(installed_shim(root), root, SHIMCORE_TEMPLATE="0")


def marked(value: str) -> list[int]:
    """Processes that were started with the template's folder in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={value}".encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def life_under_the_template(root: Path) -> None:
    folder, trace = root / "t", root / "trace"
    env = {
        "SHIMCORE_TEMPLATE": "1", MARK: str(folder), "SHIMCORE_TEMPLATE_TRACE": str(trace), "SHIMCORE_TEMPLATE_IDLE": "2",
    }  # fmt: skip
    # The first start finds no template, leaves one behind, and goes the plain way.
    deadline = time.monotonic() + 30
    while "warm" not in (trace.read_text() if trace.exists() else ""):
        assert time.monotonic() < deadline, trace.read_text()
        whole_life(installed_shim(root), root, **env)
    for pid in marked(str(folder)):  # it ends by itself
        try:
            ended = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([ended], [], [], 30)[0], f"the template, process {pid}, has not ended"
        os.close(ended)
    assert not marked(str(folder))


def life_under_runc(root: Path) -> None:
    if shutil.which("runc") is None or not os.path.exists(BUSYBOX):
        raise Skip(f"needs runc and {BUSYBOX}")
    if os.geteuid() != 0:
        raise Skip("needs root")
    with Rig(installed_shim(root), env={"SHIMCORE_TEMPLATE": "0"}) as rig:
        container = rig.container(["sh", "-c", "echo hello; exit 3"])
        assert container.run() == 3
        assert container.output == "hello\n"
        assert container.delete().exit_status == 3


CHECKS: list[Callable[[Path], None]] = [
    public_names, compiled_modules, files, bytecode, pips_shim, shimcore_command, install_command, life_under_pips_shim,
    life_under_the_launcher, life_under_the_template, life_under_runc,
]  # fmt: skip


def main(names: list[str]) -> int:
    chosen = [check for check in CHECKS if not names or check.__name__ in names]
    passed = failed = skipped = 0
    print(f"shimcore {shimcore.__version__} of {PACKAGE}, {sys.implementation.cache_tag}, {sysconfig.get_platform()}")
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        for check in chosen:
            try:
                check(Path(folder).resolve())
            except Skip as why:
                skipped += 1
                print(f"skip {check.__name__}: {why}")
            except Exception:
                failed += 1
                print(f"FAIL {check.__name__}\n{traceback.format_exc()}")
            else:
                passed += 1
                print(f"ok   {check.__name__}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
