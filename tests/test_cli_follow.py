"""`shimcore events` and `shimcore logs`: what shims tell, as it comes."""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore import logger
from shimcore.cli import follow, nodes
from shimcore.rig import Rig
from tests.faults import Lab, until
from tests.test_cli import STOCK, cli

CLI = [sys.executable, "-m", "shimcore.cli"]
LIFE = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


@pytest.fixture
def asked(new_lab: Callable[..., Lab]) -> Lab:
    """A lab whose shim has its debug socket, which it binds once it serves."""
    lab = new_lab()
    until(lambda: any(shim.pid == lab.pid and shim.debug for shim in nodes.shims()))
    return lab


def test_events_of_a_shim_as_they_come(asked: Lab) -> None:
    asked.box("before", ["@exit", "4"]).told()
    command = [*CLI, "events", str(asked.pid), "--json", "--past"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [json.loads(child.stdout.readline()) for _ in range(3)]
        assert [one["topic"] for one in told] == LIFE[:3] and {one["container"] for one in told} == {"before"}
        box = asked.box("after")
        box.exec("one", ["@exit", "7"])
        told = [json.loads(child.stdout.readline()) for _ in range(5)]
        child.send_signal(signal.SIGINT)
    assert child.returncode == 0
    assert [one["topic"] for one in told] == [*LIFE[:2], "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    exited = told[-1]
    assert exited["event"] == {
        "container_id": "after", "id": "one", "pid": exited["event"]["pid"], "exit_status": 7,
        "exited_at": exited["event"]["exited_at"],
    }  # fmt: skip
    assert exited["shim_pid"] == asked.pid and exited["number"] == 8 and exited["namespace"] == asked.rig.namespace
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{9}Z", exited["time"])


def test_what_they_still_have(asked: Lab) -> None:
    asked.box("kept", ["@exit", "4"]).told()
    lines = cli("events", "--once", str(asked.pid)).splitlines()
    assert [line.split()[2:4] for line in lines] == [["kept", topic] for topic in LIFE[:3]]
    assert lines[-1].endswith("exit_status=4") and re.match(r"[\d:]{8}\.\d{6}  ", lines[-1])
    assert len(cli("events", "--past", "--count", "2", f"{asked.rig.namespace}/lab").splitlines()) == 2


def test_every_container_of_the_node_is_seen_however_short(
    make_rig: Callable[..., Rig], lab_shim: Path, shim_dir: Path, session_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """red: found by looking every second alone, such a life is over before it is seen"""
    directory = session_root / "ev"
    monkeypatch.setattr(follow, "SOCKET_DIR", str(directory))
    monkeypatch.setattr(follow, "RESCAN", 0.2)
    monkeypatch.setattr(nodes, "shims", list)  # others of this machine are not ours to follow
    directory.mkdir(mode=0o700)
    rig = make_rig(shim_dir / "containerd-shim-runc-v2-py", generation="2.3")
    rig.activator.socket_dir = str(directory)
    node = follow.Node(past=False)
    node.watch()
    try:
        for status in range(5):
            box = rig.container(["sh", "-c", f"exit {status}"])
            assert box.run() == status
            box.delete()
            told = [node.queue.get(timeout=30) for _ in LIFE]
            assert [(one.topic, one.container) for one in told if isinstance(one, follow.Told)] == [(t, box.id) for t in LIFE]
        with pytest.raises(queue.Empty):
            node.queue.get_nowait()
    finally:
        node.close()
        directory.rmdir()


def test_one_that_tells_nothing(make_rig: Callable[..., Rig]) -> None:
    if not STOCK.exists():
        pytest.skip(f"{STOCK} is not installed")
    rig = make_rig(STOCK)
    pid = str(rig.container(["true"]).shim_pid)
    assert "has no debug socket" in cli("events", pid, status=1)
    assert "journalctl" in cli("logs", pid, status=1)
    assert "no shim of a container nothing" in cli("events", "nothing", status=1)
    assert "no shim of a container nothing" in cli("logs", "nothing", status=1)


# --- logs


def test_the_log_and_what_comes(asked: Lab) -> None:
    asked.call("log", text='a "quoted"\nline')
    last = cli("logs", str(asked.pid)).splitlines()[-1]
    assert last.endswith(r'msg="a \"quoted\"\nline"') and "\x1b" not in last
    told = [json.loads(line) for line in cli("logs", "--json", str(asked.pid)).splitlines()]
    assert told[-1]["msg"] == 'a "quoted"\nline' and told[-1]["level"] == "info" and told[-1]["id"] == "lab"
    command = [*CLI, "logs", "-f", str(asked.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        seen = ""
        while "quoted" not in seen:
            seen = child.stdout.readline()
        asked.call("log", text="and now this")
        assert "and now this" in child.stdout.readline()
        for box in asked.boxes:
            box.end()
        asked.session.end()
        child.stdout.read()
    assert child.returncode == 0, "the shim's end is the log's"


TEXTS = ["plain", "", 'a "b" c', "back\\slash", "tab\tnew\nline", "\x01\x1b[0m", "é→", "msg=x y=z", "\\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_fields_of_a_line(text: str) -> None:
    line = logger.format_line(logger.WARN, text, {"key": text, "n": 5}, 0).decode().rstrip("\n")
    found = follow.fields(line)
    assert (found["level"], found["msg"], found["key"], found["n"]) == ("warn", text, text, "5")


def test_fields_of_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = logger.format_json(logger.WARN, 'a "b"\n', {"id": "c1", "n": 7, "yes": True}, 0).decode().rstrip("\n")
    found = follow.fields(line)
    assert {**found, "time": ""} == {"time": "", "level": "warn", "id": "c1", "n": "7", "yes": "true", "msg": 'a "b"\n'}
    follow._print_log(line, False)
    assert capsys.readouterr().out == line + "\n"


# --- the parts


def test_what_was_missed_is_counted() -> None:
    line = json.dumps({"number": 9, "request": None}).encode()
    assert follow._decode(1, line, 5).missed == 4, "three that are gone, and this"
    assert follow._decode(1, line, -1).missed == 1, "what was before is not asked for"


def test_an_answer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(nodes.NoAnswer, match="nobody answers"):
        nodes.Lines(str(tmp_path / "nothing"), "/log")
