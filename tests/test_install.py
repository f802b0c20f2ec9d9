"""install.py: the executable that it writes, run with the real interpreter."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import install as i
from shimcore.errors import InvalidArgument, NotFound

FAKE_SHIM = """
import sys
def run(runtime_id, shim):
    print(runtime_id, shim, sys.flags.isolated, sys.flags.no_site, sys.argv[1:], 'site' in sys.modules)
"""


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An author's module, importable here."""
    folder = tmp_path / "author"
    folder.mkdir()
    (folder / "authors_shim.py").write_text("raise SystemExit('imported')\n")
    (folder / "authors_package").mkdir()
    (folder / "authors_package" / "__init__.py").write_text("")
    (folder / "authors_package" / "deep.py").write_text("class S: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A directory with a shimcore whose run() tells how it was called."""
    folder = tmp_path / "fake"
    (folder / "shimcore").mkdir(parents=True)
    (folder / "shimcore" / "shim.py").write_text(FAKE_SHIM)
    return folder


def run(path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(path), *args], capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("runtime", "binary"),
    [
        ("io.containerd.runc.v2", "containerd-shim-runc-v2"),
        ("io.containerd.runc.v2-py", "containerd-shim-runc-v2-py"),
        ("a.b", "containerd-shim-a-b"),
    ],
)
def test_binary_name(runtime: str, binary: str) -> None:
    assert i.binary_name(runtime) == binary


@pytest.mark.parametrize("runtime", ["", "runc", "io..v2", "io.containerd.", "/usr/bin/x.y"])
def test_no_runtimes_name(runtime: str) -> None:
    with pytest.raises(InvalidArgument):
        i.binary_name(runtime)


def test_ours_by_default(tmp_path: Path) -> None:
    dest = tmp_path / "a" / "b"
    done = subprocess.run(
        [sys.executable, "-m", "shimcore.install", "--dest", str(dest)], capture_output=True, text=True
    )
    path = dest / "containerd-shim-runc-v2-py"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    script = path.with_name(path.name + ".py")
    assert sorted(os.listdir(dest)) == [path.name, script.name]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(script.stat().st_mode) == 0o755
    assert path.read_bytes().endswith(f"{sys.executable}\0{script}\x001\0".encode() + path.read_bytes()[-12:])
    text = script.read_text()
    assert text.startswith(f"#!{sys.executable} -IS\n")
    assert text.endswith("run('io.containerd.runc.v2-py', 'shimcore.oci.shim:RuncShim')\n")
    compile(text, str(path), "exec")


def test_the_paths_suffice_without_site(author: Path) -> None:
    paths = i.needed_paths("authors_package.deep")
    assert paths[-1] == str(author) and len(paths) == len(set(paths)) == 3
    code = "import shimcore.errors, google.protobuf.message, authors_package.deep"
    bare = [sys.executable, "-ISc", f"import sys; sys.path[0:0] = {paths!r}; {code}"]
    assert subprocess.run(bare, env={}).returncode == 0


@pytest.mark.parametrize("space", [False, True])
def test_the_script_runs(fake: Path, tmp_path: Path, space: bool) -> None:
    interpreter = sys.executable
    if space:  # as a path that is too long, one with a space needs the trampoline
        link = tmp_path / "with 'a' $HOME \"space\""
        link.symlink_to(os.path.dirname(sys.executable))
        interpreter = str(link / os.path.basename(sys.executable))
    text = i.script("io.x.foo.v1", "m.n:C", [str(fake)], interpreter)
    assert text.startswith("#!/bin/sh\n" if space else f"#!{interpreter} -IS\n")
    path = tmp_path / "containerd-shim-foo-v1"
    path.write_text(text)
    path.chmod(0o755)
    done = run(path, "-id", "a b", "start", PYTHONPATH="/nowhere", PYTHONHOME="/nowhere")
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "io.x.foo.v1 m.n:C 1 1 ['-id', 'a b', 'start'] False\n"


def test_a_long_interpreter_gets_a_trampoline() -> None:
    fits = "/" + "x" * (i.MAX_SHEBANG - len("#!/ -IS"))
    assert i.script("a.b", "m:C", [], fits).startswith("#!/x")
    text = i.script("a.b", "m:C", [], fits + "x")
    assert text.startswith("#!/bin/sh\n") and shlex.quote(fits + "x") in text
    compile(text, "script", "exec")


@pytest.mark.parametrize("shim", ["", "m", "m:", ":C", "m:C.D", "m n:C", "m:C:D", "m.:C", "m:1"])
def test_what_is_no_class(shim: str) -> None:
    with pytest.raises(InvalidArgument, match="module:Class"):
        i.script("a.b", shim, [], "/usr/bin/python3")


@pytest.mark.parametrize("interpreter", ["python3", "/a\nb", "/a\\b", ""])
def test_what_is_no_interpreter(interpreter: str) -> None:
    with pytest.raises(InvalidArgument, match="interpreter"):
        i.script("a.b", "m:C", [], interpreter)


def test_an_authors_shim(author: Path, tmp_path: Path) -> None:
    dest = tmp_path / "bin"
    path = Path(i.install(str(dest), runtime_id="io.containerd.foo.v1", shim="authors_shim:Foo"))
    assert path == dest / "containerd-shim-foo-v1"
    script = path.with_name(path.name + ".py")
    assert b"\x000\0" in path.read_bytes()[-20:], "no template for a module that we do not know"
    text = script.read_text()
    assert repr(str(author)) in text and "'authors_shim:Foo'" in text
    assert list((author / "__pycache__").glob("authors_shim.*.pyc")), "compiled, and not run: it would have exited"
    i.install(str(dest), runtime_id="io.containerd.foo.v1", shim="authors_package.deep:S")
    assert "authors_package.deep:S" in script.read_text() and len(os.listdir(dest)) == 2
    assert list((author / "authors_package" / "__pycache__").glob("deep.*.pyc"))


def test_our_own_bytecode_is_there(tmp_path: Path) -> None:
    i.install(str(tmp_path))
    cached = Path(i.__file__).parent / "__pycache__"
    assert list(cached.glob("bootstrap.*.pyc")) and list(cached.glob("errors.*.pyc"))


def test_a_running_script_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = Path(i.install(str(tmp_path)))
    inode = path.stat().st_ino
    i.install(str(tmp_path))
    assert path.stat().st_ino != inode


def test_failures_leave_nothing(author: Path, tmp_path: Path) -> None:
    dest = tmp_path / "bin"
    for arguments, error in (
        ({"shim": "no_such_module_here:C", "runtime_id": "a.b"}, NotFound),
        ({"shim": "sys:C", "runtime_id": "a.b"}, NotFound),
        ({"shim": "m", "runtime_id": "a.b"}, InvalidArgument),
        ({"name": "a/b"}, InvalidArgument),
        ({"runtime_id": "x"}, InvalidArgument),
    ):
        with pytest.raises(error):
            i.install(str(dest), **arguments)  # type: ignore[arg-type]
    assert not dest.exists()


def test_command(author: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = str(tmp_path / "bin")
    assert i.main(["--dest", dest, "--runtime-id", "io.x.foo.v1", "--name", "mine", "authors_shim:Foo"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{dest}/mine\n" and "containerd looks for containerd-shim-foo-v1" in err
    assert i.main(["--dest", dest, "--runtime-id", "io.x.foo.v1", "nothing_there:Foo"]) == 1
    assert "there is no module nothing_there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        i.main(["--dest", dest, "authors_shim:Foo"])


def test_a_lock_that_is_forced_off_is_refused() -> None:
    program = """import sys
class Flags:
    gil = 0
    def __getattr__(self, name, flags=sys.flags):
        return getattr(flags, name)
sys.flags = Flags()
import shimcore"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith(
        "ImportError: shimcore needs the interpreter's lock (GIL): unset PYTHON_GIL=0, or leave -X gil=0 away\n"
    )


def test_a_free_threaded_interpreter_is_told_to_keep_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "abiflags", "t")
    assert i.script("io.containerd.x.v1", "x:X", [], "/usr/bin/python3.14t").startswith("#!/usr/bin/python3.14t -ISXgil=1\n")
    monkeypatch.setattr(sys, "abiflags", "")
    assert i.script("io.containerd.x.v1", "x:X", [], "/usr/bin/python3.14").startswith("#!/usr/bin/python3.14 -IS\n")
