"""examples/wasm.py: modules instead of containers, by the rig and under the real containerd."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from shimcore.errors import NotFound
from shimcore.rig import Rig
from shimcore.testing import Install
from tests.containerd.daemon import Containerd

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "wasm.py"
RUNTIME = "io.containerd.wasm.v1"

HELLO = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 8) "hello from a module\\n")
  (data (i32.const 64) "\\08\\00\\00\\00\\14\\00\\00\\00")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 80)))
    (call $exit (i32.const 7))))"""
MODULES = {
    "hello": HELLO,
    "loops": '(module (memory (export "memory") 1) (func (export "_start") (loop $again (br $again))))',
    "traps": '(module (memory (export "memory") 1) (func (export "_start") unreachable))',
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem with nothing but modules in it."""
    folder = tmp_path_factory.mktemp("modules")
    for name, text in MODULES.items():
        (folder / f"{name}.wasm").write_bytes(wat2wasm(text))
    return folder


@pytest.fixture(scope="module")
def binary(install_shim: Install) -> str:
    return install_shim("wasm:Wasm", RUNTIME, EXAMPLE.parent)


@pytest.fixture
def rig(binary: str, namespace: str, root: Path) -> Iterator[Rig]:
    with Rig(binary, namespace=f"{namespace}-wasm", rootfs=root, timeout=60) as made:
        yield made


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_a_module_from_start_to_delete(rig: Rig) -> None:
    session = rig.container(["/hello.wasm"])
    assert session.run() == 7
    assert (session.output, session.errors) == ("hello from a module\n", "")
    assert session.delete().exit_status == 7
    assert [event.topic for event in rig.events.of(session.id)] == [
        "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete",
    ]  # fmt: skip


def test_a_module_is_killed(rig: Rig) -> None:
    session = rig.container(["/loops.wasm"])
    session.create()
    session.start()
    session.task.kill(signal.SIGKILL)
    assert session.wait() == 137


def test_a_module_traps(rig: Rig) -> None:
    session = rig.container(["/traps.wasm"])
    assert session.run() == 134
    assert "unreachable" in session.errors


def test_there_is_no_such_module(rig: Rig) -> None:
    session = rig.container(["/nothing.wasm"])
    session.create()
    with pytest.raises(NotFound, match=r"no module /nothing\.wasm"):
        session.start()
    session.delete()


def test_under_containerd(containerd: Containerd, binary: str, root: Path) -> None:
    """ctr run, with nothing but the runtime's path to tell this from a container."""
    done = containerd.ctr("run", "--rm", "--runtime", binary, "--rootfs", root, "wasm-hello", "/hello.wasm", check=False)
    assert (done.returncode, done.stdout) == (7, "hello from a module\n"), done.stderr
    assert containerd.tasks() == {}
