"""`shimcore new`: the project that it makes works as it is, in an environment of its own. And what completes its words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from shimcore.cli.project import Project
from tests.test_cli import cli

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")


def ran(*command: str | Path, cwd: Path, path: Path, status: int = 0) -> str:
    """What it printed; `path` comes first on PATH, and nothing else of the tests' environment names this checkout."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a project called hello-world, the commands of a virtual environment that it is installed in)."""
    home = tmp_path_factory.mktemp("author")
    cli("new", "hello-world", "--dir", str(home / "hello-world"))
    ran(sys.executable, "-m", "venv", "--without-pip", "v", cwd=home, path=home)
    python = home / "v" / "bin" / "python"
    site = ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home, path=home).strip()
    # This checkout stands in for an installed shimcore, and its environment for what pip would fetch.
    (Path(site) / "there.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation"]
    ran(*pip, "--disable-pip-version-check", "-e", home / "hello-world", cwd=home, path=home)
    return home / "hello-world", home / "v" / "bin"


def test_the_projects_own_tests_pass(project: tuple[Path, Path], rootfs: Path) -> None:
    """red: `edit` is not called"""
    folder, commands = project
    said = ran(commands / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder, path=commands)
    assert "2 passed" in said and "skipped" not in said


def test_it_runs_as_pip_installs_it(project: tuple[Path, Path], rootfs: Path) -> None:
    folder, commands = project
    run = [str(commands / "python"), "-m", "shimcore.cli", "run", "--json", "--rootfs", str(rootfs)]
    run += ["--shim", "containerd-shim-hello-world-v1", "--", "sh", "-c", "echo hello from $SHIM; exit 4"]
    report = json.loads(ran(*run, cwd=folder, path=commands, status=4))
    assert report["stdout"] == "hello from hello-world\n" and report["left"] == []
    assert report["shim"] == str(commands / "containerd-shim-hello-world-v1")


def test_it_is_installed_for_containerd(project: tuple[Path, Path], rootfs: Path, tmp_path: Path) -> None:
    folder, commands = project
    python = str(commands / "python")
    words = ["--dest", str(tmp_path), "--runtime-id", "io.containerd.hello-world.v1", "hello_world_shim:HelloWorldShim"]
    put = json.loads(ran(python, "-m", "shimcore.cli", "install", "--json", *words, cwd=folder, path=commands))
    assert put["path"] == str(tmp_path / "containerd-shim-hello-world-v1")
    assert put["runtime"] == "io.containerd.hello-world.v1"
    run = ["run", "--rootfs", str(rootfs), "--shim", put["path"], "sh", "-c", "echo hello from $SHIM"]
    said = ran(python, "-m", "shimcore.cli", *run, cwd=folder, path=commands)
    assert "hello from hello-world" in said and "nothing left behind" in said


def test_a_project_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    made = json.loads(cli("new", "it", "--dir", str(tmp_path / "it"), "--json"))
    assert made["runtime"] == "io.containerd.it.v1" and made["module"] == "it_shim"
    assert sorted(made["files"]) == sorted(str(path) for path in (tmp_path / "it").rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()}
    assert "is there already" in cli("new", "it", "--dir", str(tmp_path / "it"), status=1)
    assert before == {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["Hello", "a.b", "../x", "a--b", "-a", "1a", "", "a" * 41, "a_b"])
def test_a_name_that_no_shim_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="can't be a shim's name"):
        Project(name)


def test_a_new_readme_is_short() -> None:
    assert len(Project("hello").files()["README.md"].splitlines()) <= 14
    for path, text in Project("a-name-as-long-as-a-shims-may-well-be").files().items():
        assert "$name" not in text and "${" not in text, path


# --- completion


def completed(tmp_path: Path, *words: str, path: str = "") -> list[str]:
    """What bash offers for the last word."""
    command = tmp_path / "shimcore"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m shimcore.cli "$@"\n')
    command.chmod(0o755)
    program = f"""
        eval "$(shimcore completion bash)"
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        $(complete -p shimcore | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p') shimcore
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = {**os.environ, "PATH": ":".join(filter(None, [str(tmp_path), path, os.environ["PATH"]]))}
    done = subprocess.run([BASH or "bash", "-c", program], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and not done.stderr, done
    return done.stdout.split()


@pytest.mark.skipif(not BASH, reason="bash is not installed")
def test_bash_completes(tmp_path: Path) -> None:
    assert completed(tmp_path, "shimcore", "co") == ["completion", "conform"]
    assert completed(tmp_path, "shimcore", "completion", "''") == ["bash", "zsh", "fish"]
    assert "--shim" in completed(tmp_path, "shimcore", "run", "--s")
    shims = tmp_path / "bin"
    shims.mkdir()
    for name in ("containerd-shim-tab-v1", "containerd-shim-tab-v1.py", "other"):
        (shims / name).write_text("")
    assert completed(tmp_path, "shimcore", "conform", "containerd-shim-t", path=str(shims)) == ["containerd-shim-tab-v1"]


@pytest.mark.parametrize(("shell", "word"), [("zsh", "#compdef shimcore"), ("fish", "complete --no-files --command shimcore")])
def test_other_shells_get_their_own(shell: str, word: str) -> None:
    assert word in cli("completion", shell)
    assert "tcsh" in cli("completion", "tcsh", status=2)
