"""A shim's events and log as they are told on its debug socket: kept, followed, and to the very end."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimcore import _reaper, follow, logger
from shimcore.protos import forward_pb2
from shimcore.ttrpc import codec
from tests.faults import Lab, together, until
from tests.test_debug import ask, debug_path, dump


def ready(lab: Lab) -> Lab:
    """Once it can be asked: a shim binds its debug socket when it serves already."""

    def asked() -> bool:
        try:
            return ask(lab, "/log")[0] == 200
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    until(asked)
    return lab


@pytest.fixture
def new_lab(new_lab: Callable[..., Lab]) -> Callable[..., Lab]:
    return lambda **options: ready(new_lab(**options))


@pytest.fixture
def lab(lab: Lab) -> Lab:
    return ready(lab)


class Following:
    """One connection that reads lines. A context manager."""

    def __init__(self, path: Path, target: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.socket.sendall(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        while self.file.readline() != b"\r\n":
            pass

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.socket.close()

    def topics(self) -> Iterator[tuple[int, str]]:
        for line in self.file:
            yield event(line)


def event(line: bytes) -> tuple[int, str]:
    """(number, topic)"""
    told = json.loads(line)
    request = codec.decode_request(base64.b64decode(told["request"]))
    return told["number"], forward_pb2.ForwardRequest.FromString(request.payload).envelope.topic


def events(lab: Lab, query: str = "") -> list[tuple[int, str]]:
    status, kind, body = ask(lab, f"/events{query}")
    assert (status, kind) == (200, "application/x-ndjson")
    return [event(line) for line in body.splitlines()]


def test_what_was_told_is_kept(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    box = lab.box("kept", ["@exit", "3"])
    box.told()
    box.delete()
    wanted = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert events(lab) == list(enumerate(wanted, 1))
    assert events(lab, "?after=2") == list(enumerate(wanted, 1))[2:]
    assert events(lab, "?after=99") == events(lab, "?after=now") == []
    assert [item.topic for item in lab.events.of("kept")] == wanted, "and it is what containerd got"


def test_followed_to_the_shims_end(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    with Following(debug_path(lab), "/events?follow") as following:
        topics = following.topics()
        box = lab.box("followed", ["@sleep"])
        assert [next(topics), next(topics)] == [(1, "/tasks/create"), (2, "/tasks/start")]
        box.task.kill(9)
        assert next(topics) == (3, "/tasks/exit")
        box.delete()
        lab.session.end()
        assert list(topics) == [(4, "/tasks/delete")]


def test_followed_when_nothing_comes_for_a_while(new_lab: Callable[..., Lab]) -> None:
    """red: a look after the peer that blocks, and takes its own time limit for the peer's leaving"""
    lab = new_lab()
    with Following(debug_path(lab), "/events?follow") as following:
        box = lab.box("long", ["/bin/sleep", str(4 * follow.TICK + follow.SEND_TIMEOUT)])
        assert [topic for _, (_, topic) in zip(range(3), following.topics(), strict=False)][-1] == "/tasks/exit"
        assert box.status() == 0


def test_the_log_is_kept_and_followed(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(debug=True)
    status, kind, body = ask(lab, "/log")
    assert (status, kind) == (200, "text/plain; charset=utf-8")
    before = body.decode().splitlines()
    with Following(debug_path(lab), "/log?follow&after=now") as following:
        lab.call("log", text="said now")
        for line in following.file:
            assert line.decode().rstrip("\n") not in before
            if b"said now" in line:
                break
        else:
            raise AssertionError("it did not come")
    assert any("said now" in line for line in ask(lab, "/log")[2].decode().splitlines())


def test_a_follower_that_leaves_is_forgotten(new_lab: Callable[..., Lab]) -> None:
    """red: without _gone the ninth is refused"""
    lab = new_lab()
    threads = len(dump(lab)["threads"])
    for _ in range(2):
        held = [Following(debug_path(lab), "/events?follow") for _ in range(follow.FOLLOWERS_MAX)]
        assert {one.status for one in held} == {200}
        with Following(debug_path(lab), "/log?follow") as refused:
            assert refused.status == 503
        assert ask(lab, "/events")[0] == 200, "who does not follow is answered"
        for one in held:
            one.__exit__()
        until(lambda: len(dump(lab)["threads"]) <= threads)


def test_a_follower_that_reads_nothing_holds_up_nobody(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab()
    with Following(debug_path(lab), "/events?follow"):
        box = lab.box("busy")
        for number in range(200):
            box.exec(f"e{number}", ["@exit", "0"])
            box.told(f"e{number}")
            box.delete(f"e{number}")
        assert len(events(lab)) == 128
        assert events(lab)[0][0] > 1


@pytest.mark.parametrize("target", ["/events?after=x", "/events?after=-1", "/log?after="])
def test_a_query_that_says_nothing(lab: Lab, target: str) -> None:
    assert ask(lab, target)[0] == 400


def test_methods_and_paths(lab: Lab) -> None:
    assert ask(lab, "/events", "POST")[0] == 405
    assert b"/events" in ask(lab, "/nothing")[2]


# --- the parts


def test_the_logs_lines_are_bounded(tmp_path: Path) -> None:
    log = logger.Logger(str(tmp_path / "log"))
    (tmp_path / "log").touch()
    assert log.lines(0) == (0, [])
    for number in range(1000):
        log.info(f"line {number}")
    count, lines = log.lines(0)
    assert count == 1000 and logger.RECENT_MAX // 2 <= len(lines) <= logger.RECENT_MAX
    assert b"line 999" in lines[-1]
    assert log.lines(997)[1] == lines[-3:] and log.lines(1000) == log.lines(5000) == (1000, [])
    log.close()


def test_events_wait_for_the_next() -> None:
    core = _reaper.Core("ns", "")
    kind = "containerd.events.TaskStart"

    def publish() -> None:
        core.publish("/tasks/start", kind, b"", "c", "")

    assert core.events(0, 0) == []
    found, _ = together(lambda: core.events(0, 60), publish)
    assert [number for number, _ in found] == [1]
    core.end_events()
    assert core.events(1, 60) == []
