"""What the shim's process may import, and which of its rooms may look into which."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shimcore"

# Each costs a start milliseconds, or drags in one that does.
BANNED = {
    "typing", "dataclasses", "enum", "logging", "argparse", "subprocess", "threading", "asyncio", "json", "pathlib",
    "re", "socket", "tempfile", "shutil", "contextlib", "inspect", "hashlib", "ctypes", "signal", "functools",
    "collections", "google", "google.protobuf",
}  # fmt: skip

# Top to bottom; what stands on one line may not import one another at the top of a module.
LAW = [
    {"shim", "daemon", "serve", "template", "forked", "upgrade"},
    {"bootstrap"},
    {"flags", "windows"},
    {"debug"},
    {"dump"},
    {"follow"},
    {"address"},
    {"task"},
    {"state"},
    {"monitor"},
    {"streams"},
    {"publisher", "util", "jobs", "ledger"},
    {"logger"},
    {"trace"},
    {"mount"},
    {"cgroup"},
    {"mountinfo"},
    {"errors", "wire"},
    {"protos"},
    {"_reaper", "_ttrpc"},
]
RANK = {name: rank for rank, names in enumerate(LAW) for name in names}
# Not part of a shim's process.
OUTSIDE = {"install", "rig", "cli", "ttrpc", "testing"}

MODULES = [
    "address", "bootstrap", "cgroup", "errors", "flags", "logger", "monitor", "mount", "mountinfo", "state", "trace", "util",
    "windows", "wire",
]  # fmt: skip


def loaded(code: str) -> set[str]:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_banned(module: str) -> None:
    assert not loaded(f"import shimcore.{module}") & BANNED


USED = """
from shimcore import address, bootstrap, logger, monitor, util
run = bootstrap.parse_invocation(["-namespace", "n", "-id", "i", "-address", "/a", "start"], {"TTRPC_ADDRESS": "/t"})
name = address.socket_address("/a", "n", "i", socket_dir=sys.argv[1] if len(sys.argv) > 1 else "/tmp")
address.wait_socket_working(name + "-missing")
bootstrap.encode_address(name)
bootstrap.DeleteResult(1, 0, 1).encode()
util.json_loads(util.json_dumps({"a": 1}))
logger.init(True, "n", "i").info("x")
with monitor.monitor_subscribe(monitor.Topic.ALL):
    monitor.monitor_notify_by_pid(1, 0)
"""


def test_using_them_imports_nothing_banned_either() -> None:
    assert not loaded(USED) & BANNED


def test_the_check_can_fail() -> None:
    assert loaded("import json") & BANNED == {"json", "re", "enum", "functools", "collections"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(sibling's name, whether at the top of the module) of every import of our own package in a file."""
    tree = ast.parse(path.read_text())
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child, top)
            return
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("shimcore")):
            module = (node.module or "").removeprefix("shimcore").lstrip(".")
            names = [module.split(".")[0]] if module else [alias.name for alias in node.names]
            found.extend((name, top) for name in names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("shimcore."):
                    found.append((alias.name.split(".")[1], top))
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, True)
    return found


@pytest.mark.parametrize("module", sorted(set(RANK) - {"protos", "_reaper", "_ttrpc"}))
def test_imports_go_from_top_to_bottom(module: str) -> None:
    path = PACKAGE / f"{module}.py"
    if not path.exists():
        pytest.skip("not written yet")
    for name, _ in imports(path):
        if name == "__version__":
            continue
        assert name not in OUTSIDE, f"{module} is in a shim's process, {name} must not be"
        assert name in RANK, f"where does {name} stand?"
        assert RANK[name] >= RANK[module], f"{module} must not import {name}, which is above it"


def test_every_module_has_its_place() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert names <= set(RANK) | OUTSIDE


def test_processes_are_made_in_one_place() -> None:
    """subprocess, os.fork and os.wait* stand only where processes are made, which is none of these."""
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert not node.attr.startswith(("fork", "wait", "posix_spawn", "exec", "spawn", "system", "popen"))


def test_the_whole_package_parses_without_the_banned_at_its_top() -> None:
    """Faster feedback than a subprocess: no banned import statement at the top of any module of ours."""
    for module in MODULES:
        spec = importlib.util.spec_from_file_location(module, PACKAGE / f"{module}.py")
        assert spec is not None and spec.origin is not None
        for node in ast.parse(Path(spec.origin).read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {name for name in names if name != "__future__"} & BANNED
