"""What a shim tells of itself: the dump by signal and by socket, its metrics, and what a crash leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shimcore import _reaper
from shimcore import dump as dump_module
from shimcore.address import DEBUG_SUFFIX
from shimcore.errors import Unknown
from tests.faults import Lab, scale, until


def debug_path(lab: Lab) -> Path:
    return Path(lab.session.started.address.removeprefix("unix://") + DEBUG_SUFFIX)


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("shim", timeout=20)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


def ask(lab: Lab, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = Connection(debug_path(lab))
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers["Content-Type"], body


def dump(lab: Lab) -> dict[str, Any]:
    status, kind, body = ask(lab, "/dump")
    assert (status, kind) == (200, "application/json")
    found: dict[str, Any] = json.loads(body)
    return found


def test_the_dump_tells_what_there_is(lab: Lab) -> None:
    box = lab.box("told", ["@sleep"])
    box.exec("gone", ["@exit", "7"])
    assert box.status("gone") == 7
    box.told("gone")
    lab.settled()
    until(lambda: not dump(lab)["core"]["queued"])  # the answer to its event has come
    found = dump(lab)
    assert found["pid"] == lab.pid and found["namespace"] == lab.rig.namespace and found["id"] == "lab"
    processes = {(one["container"], one["exec"]): one for one in found["processes"]}
    assert processes["told", ""]["phase"] == "bound" and processes["told", ""]["status"] == "running"
    assert processes["told", ""]["pid"] == box.pid
    assert processes["told", "gone"]["phase"] == "told" and processes["told", "gone"]["exit_status"] == 7
    last = [one for one in found["exits"] if one["container"] == "told"]
    assert len(last) == 1 and last[0]["exec"] == "gone"
    assert 0 <= last[0]["recorded_us"] <= last[0]["sent_us"] <= last[0]["acknowledged_us"]
    assert found["core"]["queued"] == 0 and found["rpc"]["calls"] > 0 and found["memory"]["private"] > 0
    tids = {thread["tid"] for thread in found["threads"]}
    assert lab.pid in tids and len(found["stacks"]) >= 2
    assert found["task"]["containers"]["told"]["bundle"] == str(box.bundle)


def test_no_environment_and_no_arguments_are_in_it(lab: Lab) -> None:
    box = lab.box("secret", ["@sleep", "an-argument"])
    box.task.exec("e", {"args": ["@sleep", "an-argument"], "env": ["TOKEN=a-secret"], "cwd": "/"})
    body = ask(lab, "/dump")[2]
    assert b"secret" in body and b"a-secret" not in body and b"an-argument" not in body


def test_the_socket_is_for_its_owner_alone(lab: Lab) -> None:
    mode = debug_path(lab).lstat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_somebody_else_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who got past the mode, by an fd that was handed on for one."""
    about = SimpleNamespace(core=_reaper.Core("n", ""))
    asked: list[object] = []
    monkeypatch.setattr(dump_module, "respond", lambda *args: asked.append(args) or b"answer")
    for uid in (65534, 0):
        name = "\0sct-" + os.urandom(8).hex()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            listener.setblocking(False)
            program = (
                f"import os, socket, sys; os.setuid({uid}); s = socket.socket(socket.AF_UNIX); s.connect({name!r});"
                " s.sendall(b'GET /dump HTTP/1.0\\r\\n\\r\\n'); s.shutdown(1); print(s.recv(100))"
            )
            child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            until(lambda: child.poll() is not None or select.select([listener], [], [], 0)[0])  # noqa: B023
            dump_module.answer(about, listener)  # type: ignore[arg-type]
            out, err = child.communicate(timeout=30)
        if uid:
            assert not asked and (out == "b''\n" or "ConnectionResetError" in err), (out, err)
        else:
            assert asked and out == "b'answer'\n", (out, err)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /nothing HTTP/1.1", 404), ("POST /dump HTTP/1.0", 405), ("hello", 400), ("", 400), ("GET /dump HTTP/9", 400)],
)
def test_a_wrong_question_gets_a_clear_answer(lab: Lab, request_line: str, status: int) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(debug_path(lab)))
        client.sendall(request_line.encode() + b"\r\n\r\n")
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.0 %d " % status)
    assert b"/dump" in answer


def test_head_has_the_length_alone(lab: Lab) -> None:
    status, _, body = ask(lab, "/metrics", "HEAD")
    assert (status, body) == (200, b"")


def test_one_who_asks_nothing_delays_nobody_for_long(lab: Lab) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(debug_path(lab)))
        box = lab.box("meanwhile", ["@exit", "3"])
        assert box.status() == 3
        assert dump(lab)["pid"] == lab.pid  # behind the silent one, whose time is limited


def test_metrics_are_openmetrics(lab: Lab) -> None:
    box = lab.box("counted", ["@exit", "1"])
    box.told()
    lab.settled()
    status, kind, body = ask(lab, "/metrics")
    assert status == 200 and kind.startswith("application/openmetrics-text; version=1.0.0")
    lines = body.decode().splitlines()
    assert lines[-1] == "# EOF" and len(lines) == len(set(lines))
    values = {}
    family = ""
    for line in lines[:-1]:
        if line.startswith("# TYPE "):
            family = line.split()[2]
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.startswith(family), f"{name} stands below {family}"
            values[name] = float(value)
    labels = f'namespace="{lab.rig.namespace}",id="lab",runtime="io.containerd.lab.v1"'
    assert values[f"shimcore_exits_total{{{labels}}}"] >= 1
    assert values[f"shimcore_events_queued{{{labels}}}"] == 0
    assert values[f'shimcore_memory_bytes{{{labels},kind="private"}}'] > 0
    assert values[f'shimcore_exit_latency_seconds{{{labels},until="sent",quantile="0.5"}}'] > 0


def test_sigusr1_writes_it_into_the_bundle(lab: Lab) -> None:
    path = lab.session.bundle.path / "shim.dump.json"
    path.unlink(missing_ok=True)
    os.kill(lab.pid, signal.SIGUSR1)
    until(path.exists)
    assert json.loads(path.read_text())["pid"] == lab.pid
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_name_is_taken_from_a_dead_shim_and_given_back(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    path = debug_path(lab)
    assert path.exists()
    lab.close()
    assert not path.exists()


def test_many_may_ask(lab: Lab) -> None:
    before = lab.process()["fds"]
    for _ in range(scale(100, 1000)):
        assert ask(lab, "/metrics")[0] == 200
    until(lambda: lab.process()["fds"] == before)  # the last one's is closed after it was answered


# --- crashes


def test_an_error_in_a_handler_leaves_its_traceback(lab: Lab) -> None:
    crash = lab.session.bundle.path / "shim.crash"
    with pytest.raises(Unknown, match="ZeroDivisionError"):
        lab.call("divide")
    until(lambda: "ZeroDivisionError" in crash.read_text())
    text = crash.read_text()
    assert "labshim.py" in text and "a handler" in text


def test_an_error_of_the_client_is_no_crash(lab: Lab) -> None:
    crash = lab.session.bundle.path / "shim.crash"
    before = crash.stat().st_size
    with pytest.raises(Exception, match="not found"):
        lab.box("absent", create=False).task.state()
    assert crash.stat().st_size == before


def test_a_segfault_leaves_a_traceback(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    crash = lab.session.bundle.path / "shim.crash"
    assert crash.read_text() == ""
    os.kill(lab.pid, signal.SIGSEGV)
    until(lambda: "Segmentation fault" in crash.read_text())


def test_a_shim_that_ends_well_leaves_no_file(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    bundle = lab.session.bundle.path
    assert (bundle / "shim.crash").exists()
    lab.session.task.shutdown()
    until(lambda: not (bundle / "shim.crash").exists())
