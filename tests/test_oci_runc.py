"""The runtime's command line, and the errors that are made of what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimcore.errors import DeadlineExceeded, Unknown
from shimcore.oci import runc
from shimcore.oci.options import Options


class Result:
    def __init__(self, status: int = 1, output: bytes = b"", timed_out: bool = False, signaled: bool = False) -> None:
        self.pid = 1
        self.status = status
        self.output = output
        self.signaled = signaled
        self.truncated = False
        self.timed_out = timed_out


def runtime(**options: object) -> runc.Runtime:
    return runc.Runtime(Options().update(options), "ns", "/b")


HEAD = ["runc", "--root", "/run/containerd/runc/ns", "--log", "/b/log.json", "--log-format", "json"]


def test_create() -> None:
    assert runtime().create("c1", "/b", "/b/init.pid") == [
        *HEAD, "create", "--bundle", "/b", "--pid-file", "/b/init.pid", "c1",
    ]  # fmt: skip
    argv = runtime(systemd_cgroup=True, binary_name="/usr/bin/crun", root="/r").create(
        "c1", "/b", "/b/init.pid", no_pivot=True, no_new_keyring=True
    )
    assert argv == [
        "/usr/bin/crun", "--root", "/r/ns", "--log", "/b/log.json", "--log-format", "json", "--systemd-cgroup",
        "create", "--bundle", "/b", "--pid-file", "/b/init.pid", "--no-pivot", "--no-new-keyring", "c1",
    ]  # fmt: skip


def test_others() -> None:
    call = runtime()
    assert call.start("c1") == [*HEAD, "start", "c1"]
    assert call.delete("c1") == [*HEAD, "delete", "c1"]
    assert call.delete("c1", force=True) == [*HEAD, "delete", "--force", "c1"]
    assert call.pause("c1") == [*HEAD, "pause", "c1"]
    assert call.resume("c1") == [*HEAD, "resume", "c1"]
    assert call.update("c1") == [*HEAD, "update", "--resources=-", "c1"]
    assert call.exec("c1", "/b/e.json", "/b/e.pid", "/b/e.log") == [
        "runc", "--root", "/run/containerd/runc/ns", "--log", "/b/e.log", "--log-format", "json",
        "exec", "--process", "/b/e.json", "--detach", "--pid-file", "/b/e.pid", "c1",
    ]  # fmt: skip
    assert call.state_dir("c1") == "/run/containerd/runc/ns/c1"


def test_last_error() -> None:
    log = (
        b'{"level":"error","msg":"first","time":"2024-01-01T00:00:00Z"}\n'
        b'{"level":"warning","msg":"an error of no account"}\n'
        b'{"level":"error","msg":" exec: \\"nope\\": not found \\n"}\n'
        b"not json, error\n"
        b'["error"]\n'
        b'{"level":"error","msg":1}\n'
        b'{"level":"error","msg":"cut of'
    )
    assert runc.last_error(log) == 'exec: "nope": not found'
    assert runc.last_error(b"") == ""
    assert runc.last_error(b'{"level":"info","msg":"error"}\n') == ""


def test_failure_says_what_the_runtime_said() -> None:
    log = b'{"level":"error","msg":"no such file"}\n'
    error = runc.failure("OCI runtime create failed", Result(output=b"usage"), log)
    assert type(error) is Unknown
    assert str(error) == "OCI runtime create failed: no such file"
    assert str(runc.failure("x", Result(output=b" on stderr \n"), b"")) == "x: on stderr"
    assert str(runc.failure("x", Result(3), b"")) == "x: the runtime exited with status 3"
    assert str(runc.failure("x", Result(139, signaled=True), b"")) == "x: the runtime was killed by signal 11"
    assert type(runc.failure("x", Result(137, timed_out=True, signaled=True), log)) is DeadlineExceeded


def test_a_long_message_is_cut_and_keeps_its_end() -> None:
    text = "start " + "x" * 1_000_000 + " reason"
    error = str(runc.failure("x", Result(output=text.encode()), b""))
    assert len(error) < runc.MESSAGE_MAX + 200
    assert error.startswith("x: start ") and error.endswith(" reason")
    assert runc.cut("short") == "short"


def test_read_log(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    assert runc.read_log(str(path)) == (b"", 0)
    path.write_bytes(b"one\n")
    assert runc.read_log(str(path)) == (b"one\n", 4)
    with path.open("ab") as file:
        file.write(b"two\n")
    # An error of an earlier call is not told again.
    assert runc.read_log(str(path), 4) == (b"two\n", 8)
    assert runc.read_log(str(path), 8) == (b"", 8)
    path.write_bytes(b"a" * 10 + b"b" * runc.LOG_TAIL)
    assert runc.read_log(str(path)) == (b"b" * runc.LOG_TAIL, runc.LOG_TAIL + 10)


@pytest.mark.parametrize(
    "text",
    [
        "container c1 does not exist",
        "failed to delete task: container does not exist",
        'container "c" does not exist',
    ],
)
def test_is_missing(text: str) -> None:
    assert runc.is_missing(text)
    assert not runc.is_missing("container is not stopped")
