"""The shimcore command, as a person runs it, on shims that live: ours and the stock one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.cli import checks, nodes
from shimcore.rig import Rig
from tests.faults import Lab, until

STOCK = Path("/usr/bin/containerd-shim-runc-v2")


def cli(*args: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "shimcore.cli", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done
    return done.stdout if not status else done.stderr or done.stdout


def test_G8_every_shim_is_found_and_asked_without_containerd(lab: Lab, rootfs: Path) -> None:
    """red: `listeners` looked for in SOCKET_DIR alone: a shim with a socket_dir of its own can't be asked"""
    box = lab.box("found", ["@sleep"])
    box.exec("gone", ["@exit", "7"])
    box.told("gone")
    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    with Rig(STOCK, rootfs=rootfs) as rig:
        theirs = rig.container(["sleep", "100"])
        theirs.create()
        theirs.start()
        rows = {row["pid"]: row for row in json.loads(cli("ps", "--json"))}
        ours, stock = rows[lab.pid], rows[theirs.shim_pid]
        assert (ours["namespace"], ours["id"], ours["name"]) == (lab.rig.namespace, "lab", "containerd-shim-lab-v1")
        assert ours["containers"] == 1 and ours["processes"] == 1 and ours["private"] > 0
        assert (stock["namespace"], stock["id"], stock["containers"]) == (rig.namespace, theirs.id, None)
        assert cli("dump", theirs.id, status=1) == (
            f"Error: containerd-shim-runc-v2 (pid {theirs.shim_pid}) has no debug socket\n"
        )
        text = cli("ps")
        assert text.splitlines()[0].split() == "PID SHIM NAMESPACE ID CONTAINERS SANDBOX PROCESSES UNSENT MEMORY AGE".split()
        assert len(text.splitlines()) >= 3
        theirs.task.kill(9)
        theirs.wait()
        theirs.delete()
    # By the shim's pid, its id, and a container that it serves beside.
    for name in (str(lab.pid), f"{lab.rig.namespace}/lab", "found"):
        assert json.loads(cli("dump", name))["pid"] == lab.pid
    text = cli("metrics", "found")
    assert text.endswith("# EOF\n")
    told = {one["name"]: one for one in json.loads(cli("metrics", "found", "--json"))}
    assert told["shimcore_exits_total"]["value"] >= 1 and told["shimcore_exits_total"]["labels"]["id"] == "lab"
    assert set(told) == {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert json.loads(cli("dump", "found", "--json"))["pid"] == lab.pid
    text = cli("inspect", "found")
    assert f"pid {lab.pid}" in text
    rows_of = [line.split() for line in text.splitlines()]
    assert ["found", str(box.pid), "bound", "running"] in rows_of
    assert any(row[:2] == ["found", "gone"] and row[-1] == "7" for row in rows_of)
    assert {one["exec"] for one in json.loads(cli("inspect", "found", "--json"))["processes"]} == {"", "gone"}


def test_one_that_is_not_there(lab: Lab) -> None:
    for command in ("dump", "inspect", "metrics"):
        assert "no shim of a container nothing" in cli(command, "nothing", status=1)


def test_one_that_does_not_answer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "TIMEOUT", 0.2)
    name = f"/tmp/sct-{os.urandom(6).hex()}.debug"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(name)
        mute.listen()
        try:
            shim = nodes.Shim(os.getpid(), "containerd-shim-x-v1", "n", "i", "/", name)
            with pytest.raises(nodes.NoAnswer, match="does not answer"):
                nodes.ask(shim, "/dump")
            assert nodes.look(shim).told == {}
        finally:
            os.unlink(name)


def test_an_id_that_fits_several() -> None:
    among = [nodes.Shim(pid, "containerd-shim-x-v1", "n", f"abc{pid}", "/") for pid in (11, 12)]
    assert nodes.choose("abc11", among) is among[0] and nodes.choose("12", among) is among[1]
    with pytest.raises(nodes.NoAnswer, match=r"abc fits several: n/abc11 \(pid 11\), n/abc12 \(pid 12\)"):
        nodes.choose("abc", among)


# --- doctor


def test_doctor_says_what_to_do(tmp_path: Path) -> None:
    directory, templates = tmp_path / "s", tmp_path / "t"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    templates.mkdir(mode=0o700)
    (templates / "abc.no").write_text("FailedPrecondition: the shim's module makes threads when it is imported: 1\n")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    shims = [
        nodes.Shim(5, "containerd-shim-x-v1", "n", "i", "/run/b (deleted)"),
        nodes.Shim(6, "containerd-shim-x-v1", "n", "j", "/run/c", told={"core": {"dropped": 3, "queued": 2}}),
    ]
    found = list(checks.examine(shims, str(directory), templates))
    by_level = {level: [one for one in found if one.level == level] for level in (checks.OK, checks.WARNING, checks.PROBLEM)}
    problems = "\n".join(f"{one.what} -> {one.advice}" for one in by_level[checks.PROBLEM])
    assert f"chmod 711 {directory}" in problems and "whose bundle is gone" in problems
    warnings = "\n".join(f"{one.what} -> {one.advice}" for one in by_level[checks.WARNING])
    assert f"rm {directory}/dead" in warnings and "makes threads" in warnings
    assert "has dropped 3 events" in warnings and "has 2 events for containerd" in warnings
    assert all(one.advice for one in found if one.level != checks.OK)
    templates.chmod(0o755)
    assert any("no template is used" in one.what for one in checks.examine([], str(directory), templates))


def test_doctor_on_this_machine(lab: Lab) -> None:
    done = subprocess.run([sys.executable, "-m", "shimcore.cli", "doctor", "--json"], capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    assert done.returncode == any(one["level"] == "problem" for one in found)
    assert any(one["what"].startswith("Linux ") and one["level"] == "ok" for one in found)
    plain = subprocess.run([sys.executable, "-m", "shimcore.cli", "doctor"], capture_output=True, text=True, timeout=60)
    assert "\x1b" not in plain.stdout, "colours are for terminals"


# --- install, run


def test_install_and_uninstall(tmp_path: Path) -> None:
    text = cli("install", "--dest", str(tmp_path))
    assert (tmp_path / "containerd-shim-runc-v2-py").exists()
    assert "containerd.runtimes.runc-v2-py]" in text and 'runtime_type = "io.containerd.runc.v2-py"' in text
    assert "io.containerd.cri.v1.runtime" in text
    cli("uninstall", "--dest", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert "there is no containerd-shim-runc-v2-py" in cli("uninstall", "--dest", str(tmp_path), status=1)
    assert "needs --runtime-id" in cli("install", "--dest", str(tmp_path), "a:B", status=2)
    assert "no module" in cli("install", "--dest", str(tmp_path), "--runtime-id", "io.x.y.v1", "no_such_module:B", status=1)


def test_run(shim_dir: Path) -> None:
    if not shutil.which("runc"):
        pytest.skip("runc is not installed")
    text = cli("run", "--shim", str(shim_dir / "containerd-shim-runc-v2-py"), "--", "echo", "hello from cli")
    assert "hello from cli" in text and "nothing left behind" in text


def test_a_bundle_that_is_gone_is_seen(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    (shim,) = [one for one in nodes.shims() if one.pid == lab.pid]
    assert shim.bundle == str(lab.session.bundle.path)
    moved = lab.session.bundle.path.with_name("moved")
    shutil.copytree(lab.session.bundle.path, moved, ignore=lambda *_: ["log"])
    shutil.rmtree(lab.session.bundle.path)
    until(lambda: next(one for one in nodes.shims() if one.pid == lab.pid).bundle.endswith(" (deleted)"))
    moved.rename(lab.session.bundle.path)
