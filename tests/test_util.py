"""util.py: files of the bundle, JSON without json, time."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from google.protobuf import timestamp_pb2

from shimcore import util
from shimcore.errors import InvalidArgument, NotFound
from shimcore.protos import events_pb2, runc_options_pb2

# --- files


@pytest.mark.parametrize("text", ["", "hello", "héllo\n", os.fsdecode(b"\xff\x00"), "x" * 200_000])
def test_a_string_goes_there_and_back(tmp_path: Path, text: str) -> None:
    path = str(tmp_path / "file")
    util.write_str_to_file(path, "before" * 10)
    util.write_str_to_file(path, text)
    assert util.read_file_to_str(path) == text
    assert os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    util.write_str_to_file(str(tmp_path / "f"), b"\xff\n")
    assert (tmp_path / "f").read_bytes() == b"\xff\n"


def test_replacing_is_one_step(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    wanted = {"a" * 70_000, "b" * 70_000}
    util.write_str_to_file(path, "a" * 70_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in wanted:
                util.write_str_to_file(path, text)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert {util.read_file_to_str(path) for _ in range(2000)} <= wanted
    finally:
        stop.set()
        thread.join()


def test_a_stale_temporary_and_a_failed_write(tmp_path: Path) -> None:
    (tmp_path / ".f").write_text("left by the dead")
    util.write_str_to_file(str(tmp_path / "f"), "x")
    assert (tmp_path / "f").read_text() == "x"
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError):
        util.write_str_to_file(str(tmp_path / "dir"), "x")
    assert sorted(os.listdir(tmp_path)) == ["dir", "f"], "no temporary stays"
    with pytest.raises(InvalidArgument):
        util.write_str_to_file(f"{tmp_path}/", "x")


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    util.write_str_to_file("f", "x")
    assert util.read_file_to_str("f") == "x"


def test_mkdir(tmp_path: Path) -> None:
    path = tmp_path / "d"
    util.mkdir(str(path), 0o700)
    util.mkdir(str(path), 0o711)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (tmp_path / "f").touch()
    with pytest.raises(FileExistsError):
        util.mkdir(str(tmp_path / "f"))


def test_remove_on_exit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    with util.RemoveOnExit(str(path)) as name:
        assert os.path.exists(name)
    assert not path.exists()
    with util.RemoveOnExit(str(path)):
        pass  # gone already
    with util.RemoveOnExit(str(tmp_path)):
        pass  # a directory: logged


# --- JSON

TEXTS = [
    "{}", "[]", ' \n{"a" : [1, -2.5e3, true, false, null, "\\u00e9\\n\\"x"]}\t', "0", '"x"', "-0", "1E400",
    "NaN", "-Infinity", '{"a":1,"a":2}', '"\\ud83d\\ude00"', "12345678901234567890123",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_loads_is_json_loads(text: str) -> None:
    ours, theirs = util.json_loads(text), json.loads(text)
    assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    assert type(ours) is type(theirs)


def test_loads_bytes_and_a_bom() -> None:
    assert util.json_loads("é".join('""').encode()) == "é"
    assert util.json_loads(b'\xef\xbb\xbf{"a":1}') == {"a": 1}


@pytest.mark.parametrize("text", ["", " ", "{", '{"a":}', "[1,]", "{} x", "nul", '"\n"', "\xa0{}", "'a'"])
def test_loads_refuses_what_json_refuses(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(ValueError):
        util.json_loads(text)


def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {chr(rng.randrange(1, 0x3000)): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    text = "".join(chr(rng.choice((9, 34, 92, 65, 233, 0x2028, 0x1F600, 0xDCFF))) for _ in range(rng.randrange(5)))
    return (None, True, False, rng.randrange(-(2**70), 2**70), rng.random() * 1e9, text)[kind]


def test_dumps_and_loads_agree_with_json() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        value = random_value(rng)
        text = util.json_dumps(value)
        assert text == json.dumps(value, separators=(",", ":"))
        assert util.json_loads(text) == value


@pytest.mark.parametrize("value", [object(), b"x", {1: 2}, {"a": {2}}])
def test_dumps_refuses(value: object) -> None:
    with pytest.raises(TypeError):
        util.json_dumps(value)


def test_json_is_not_imported_for_good_input() -> None:
    code = "from shimcore import util; import sys\nutil.json_loads(util.json_dumps({'a': [1, 'x']}))\n"
    code += "sys.exit('json' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the bundle


def test_options(tmp_path: Path) -> None:
    bundle = str(tmp_path)
    options = runc_options_pb2.Options(binary_name="crun", root="/r", systemd_cgroup=True, io_uid=7, criu_path="/c")
    util.write_options(bundle, options)
    assert json.loads((tmp_path / "options.json").read_text())["io_uid"] == 7
    into = runc_options_pb2.Options()
    read = util.read_options(bundle, into)
    assert into == options
    assert set(read) == set(runc_options_pb2.Options.DESCRIPTOR.fields_by_name), "the table is that of the message"
    assert read["binary_name"] == "crun" and read["no_pivot_root"] is False
    util.write_options(bundle, {"root": "/x"})
    assert util.read_options(bundle)["root"] == "/x" and util.read_options(bundle)["binary_name"] == ""


def test_options_of_the_go_shim(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"binary_name":"runc","future":1}')
    read = util.read_options(str(tmp_path), runc_options_pb2.Options())
    assert read["binary_name"] == "runc" and read["future"] == 1


def test_runtime_and_spec(tmp_path: Path) -> None:
    util.write_runtime(str(tmp_path), "/usr/bin/crun")
    assert util.read_runtime(str(tmp_path)) == "/usr/bin/crun"
    with pytest.raises(NotFound):
        util.read_spec(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text('{"ociVersion":"1.1.0"}')
    assert util.read_spec(str(tmp_path)) == {"ociVersion": "1.1.0"}
    for bad in ("[]", "{", "", "[" * 100_000):
        config.write_text(bad)
        with pytest.raises(InvalidArgument, match=r"config\.json"):
            util.read_spec(str(tmp_path))


@pytest.mark.parametrize(("text", "pid"), [("1", 1), ("4194304", 4194304), ("12\n", 12)])
def test_pid_file(tmp_path: Path, text: str, pid: int) -> None:
    (tmp_path / "init.pid").write_text(text)
    assert util.read_pid_from_file(str(tmp_path / "init.pid")) == pid


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1 2", "1.0", "١", "+1"])
def test_no_pid_in_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "init.pid").write_text(text)
    with pytest.raises(InvalidArgument):
        util.read_pid_from_file(str(tmp_path / "init.pid"))


# --- time


def test_timestamps() -> None:
    before = time.time_ns()
    seconds, nanos = util.timestamp()
    assert before <= util.from_timestamp(seconds, nanos) <= util.now_ns() <= time.time_ns()
    for ns in (0, 1, 10**9 - 1, 10**9, -1, 1_714_557_600_123_456_789):
        seconds, nanos = util.timestamp(ns)
        assert 0 <= nanos < 10**9 and util.from_timestamp(seconds, nanos) == ns
        stamp = util.convert_to_timestamp(ns, timestamp_pb2.Timestamp())
        assert stamp.ToNanoseconds() == ns
    assert util.convert_to_timestamp(None, timestamp_pb2.Timestamp()) == timestamp_pb2.Timestamp()
    assert util.rfc3339(1) == "1970-01-01T00:00:00.000000001Z"


def test_any_is_bare() -> None:
    event = events_pb2.TaskExit(container_id="c", pid=3)
    type_url, value = util.convert_to_any(event)
    assert type_url == "containerd.events.TaskExit"
    assert events_pb2.TaskExit.FromString(value) == event


# --- connections


def test_connect(session_root: Path) -> None:
    path = str(session_root / "connect")
    with pytest.raises(FileNotFoundError) as caught:
        util.connect(path)
    assert caught.value.filename == path
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        for address in (path, f"unix://{path}"):
            fd = util.connect(address)
            assert not os.get_inheritable(fd) and os.get_blocking(fd)
            os.close(fd)
    os.unlink(path)
