"""logger.py: the level matrix, the line's shape, and that nothing blocks or raises (trial E5)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import logger as log
from tests.authors import Make, author
from tests.faults import until

__all__ = ["author"]

LINE = re.compile(
    r'^time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z" level=(\w+)((?: [\w.-]+="(?:[^"\\]|\\.)*")*) '
    r'msg="((?:[^"\\]|\\.)*)"$'
)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    os.mkfifo(path)
    return path


@pytest.fixture
def readers() -> Iterator[list[int]]:
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)


def reader(path: Path, readers: list[int]) -> int:
    readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    return readers[-1]


def drained(fd: int) -> bytes:
    """All that is in the pipe now."""
    data = b""
    while True:
        try:
            data += os.read(fd, 1 << 20)
        except BlockingIOError:
            return data


@pytest.fixture
def file_logger(tmp_path: Path) -> tuple[log.Logger, Path]:
    path = tmp_path / "file"
    path.touch()
    return log.Logger(str(path), log.TRACE), path


# --- levels


@pytest.mark.parametrize(
    ("debug", "default", "env", "level"),
    [
        (False, "info", None, log.INFO),
        (True, "info", None, log.DEBUG),
        (False, "info", "error", log.ERROR),
        (False, "info", "warn", log.WARN),
        (False, "info", "off", log.OFF),
        (False, "info", "trace", log.TRACE),
        (True, "info", "debug", log.DEBUG),
        (True, "info", "trace", log.TRACE),
        (True, "info", "info", log.DEBUG),
        (True, "info", "off", log.DEBUG),
        (False, "error", None, log.ERROR),
        (True, "error", None, log.DEBUG),
        (False, "error", "WARNING", log.WARN),
        (False, "warn", "nonsense", log.WARN),
        (False, "nonsense", "", log.INFO),
    ],
)
def test_level_matrix(debug: bool, default: str, env: str | None, level: int) -> None:
    assert log.choose_level(debug, default, {} if env is None else {"SHIMCORE_LOG": env}) == level


def test_level_from_the_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIMCORE_LOG", "error")
    assert log.choose_level(False) == log.ERROR


@pytest.mark.parametrize("level", range(6))
def test_only_levels_up_to_its_own_are_written(file_logger: tuple[log.Logger, Path], level: int) -> None:
    logger, path = file_logger
    logger.level = level
    for name in ("trace", "debug", "info", "warn", "error"):
        getattr(logger, name)("x")
    names = [LINE.match(line)[1] for line in path.read_text().splitlines()]  # type: ignore[index]
    assert names == ["trace", "debug", "info", "warn", "error"][5 - level :]
    assert (logger.written, logger.dropped) == (level, 0)


# --- lines


def test_fields_stand_before_the_message(file_logger: tuple[log.Logger, Path]) -> None:
    logger, path = file_logger
    logger.info("no keys")
    logger.fields = {"namespace": "k8s.io", "id": "c1"}
    logger.error("structured!", key=1, b=2)
    first, second = path.read_text().splitlines()
    assert first.endswith('Z" level=info msg="no keys"')
    assert second.endswith('Z" level=error namespace="k8s.io" id="c1" key="1" b="2" msg="structured!"')
    assert not path.read_text().endswith("\n\n")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ('say "hi"', r"say \"hi\""),
        ("a\nb\r\n\tc", r"a\nb\r\n\tc"),
        ("back\\slash", r"back\\slash"),
        ("\x00\x1b[31m\x7f\x85", r"\x00\x1b[31m\x7f\x85"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("héllo ✓ 𝄞", "héllo ✓ 𝄞"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("", ""),
    ],
)
def test_escaping_keeps_it_one_line(text: str, escaped: str) -> None:
    data = log.format_line(log.INFO, text, {"k": text}, 0)
    assert data.count(b"\n") == 1 and data.endswith(b"\n")
    assert data.decode() == f'time="1970-01-01T00:00:00.000000000Z" level=info k="{escaped}" msg="{escaped}"\n'
    assert len(data.decode().splitlines()) == 1


def test_keys_that_would_break_the_line_or_shadow() -> None:
    line = log.format_line(log.INFO, "m", {"a b": 1, 'x="': 2, "msg": 3, "time": 4, "": 5}, 0).decode()
    assert ' a_b="1" x__="2" fields.msg="3" fields.time="4" _="5" msg="m"\n' in line


@pytest.mark.parametrize("text", ["x" * 5000, '"' * 3000, "✓" * 2000, "\x00" * 1500, "a\n" * 100_000])
@pytest.mark.parametrize("long_field", [False, True])
def test_long_lines_are_cut_and_say_so(text: str, long_field: bool) -> None:
    data = log.format_line(log.WARN, text, {"field": text * 3, "last": "y"} if long_field else {}, 0)
    assert len(data) <= log.MAX_LINE and data.count(b"\n") == 1
    match = LINE.match(data.decode().rstrip("\n"))
    assert match is not None
    cut = re.search(r"\[\.\.\. (\d+) more\]$", match[3])
    assert cut is not None
    # what is there and what is said to be missing make up the whole
    kept = match[3][: cut.start()]
    whole = log.format_line(log.WARN, text[: len(text) - int(cut[1])], {}, 0).decode()
    assert whole.endswith(f'msg="{kept}"\n') or len(kept) > 3900


@pytest.mark.parametrize("size", range(3980, 4060))
def test_around_the_limit(size: int) -> None:
    data = log.format_line(log.INFO, "x" * size, {}, 0)
    overhead = len(log.format_line(log.INFO, "", {}, 0))
    assert len(data) <= log.MAX_LINE
    assert (b"more]" in data) == (size + overhead > log.MAX_LINE)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (1_709_210_096_000_000_001, "2024-02-29T12:34:56.000000001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
    ],
)
def test_rfc3339(ns: int, text: str) -> None:
    assert log.rfc3339(ns) == text


# --- the FIFO


def test_no_reader_then_one(fifo: Path, readers: list[int]) -> None:
    logger = log.Logger(str(fifo))
    for _ in range(3):
        logger.info("lost")
    assert (logger.written, logger.dropped) == (0, 3)
    fd = reader(fifo, readers)
    logger.info("seen")
    logger.info("seen again")
    first, second = os.read(fd, 8192).decode().splitlines()
    assert 'dropped="3" msg="seen"' in first and "dropped" not in second
    assert (logger.written, logger.dropped) == (2, 3)
    logger.close()


def test_the_reader_goes_and_comes_back(fifo: Path, readers: list[int]) -> None:
    logger = log.Logger(str(fifo))
    fd = reader(fifo, readers)
    logger.info("one")
    assert b"one" in os.read(fd, 8192)
    os.close(readers.pop())
    logger.info("two")
    logger.info("three")
    assert (logger.written, logger.dropped) == (1, 2)
    fd = reader(fifo, readers)
    logger.info("four")
    assert b'dropped="2" msg="four"' in os.read(fd, 8192)
    logger.close()


def test_a_new_fifo_at_the_path(fifo: Path, readers: list[int]) -> None:
    logger = log.Logger(str(fifo))
    fd = reader(fifo, readers)
    logger.info("one")
    os.close(readers.pop())
    fifo.unlink()
    os.mkfifo(fifo)
    fd = reader(fifo, readers)
    fds = len(os.listdir("/proc/self/fd"))
    logger.info("two")
    assert b'msg="two"' in os.read(fd, 8192)
    assert len(os.listdir("/proc/self/fd")) == fds, "the new pipe takes the old one's number"
    logger.close()


def test_a_full_pipe(fifo: Path, readers: list[int]) -> None:
    fd = reader(fifo, readers)
    logger = log.Logger(str(fifo))
    while not logger.dropped:
        logger.info("x" * 1000)
    written = logger.written
    for _ in range(100):
        logger.info("x" * 1000)
    assert (logger.written, logger.dropped) == (written, 101)
    data = drained(fd)
    assert data.count(b"\n") == written
    assert all(LINE.match(line) for line in data.decode().splitlines()), "no line is in it by half"
    logger.info("room again")
    assert b'dropped="101" msg="room again"' in os.read(fd, 65536)
    logger.close()


SIGPIPE_PROBE = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from shimcore import logger
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
log = logger.Logger(sys.argv[1])
log.info("one")
os.close(fd)
log.info("two")
assert not signal.sigpending() and signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(log.written, log.dropped)
"""


def test_sigpipe_does_not_matter(fifo: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SIGPIPE_PROBE, str(fifo)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n", "")


def test_chdir_does_not_lose_the_log(
    fifo: Path, readers: list[int], monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    monkeypatch.chdir(fifo.parent)
    logger = log.init(True, "ns", "c1", env={})
    monkeypatch.chdir("/")
    fd = reader(fifo, readers)
    log.debug("here", n=1)
    assert os.read(fd, 8192).endswith(b'level=debug namespace="ns" id="c1" n="1" msg="here"\n')
    logger.close()


def test_nothing_raises(file_logger: tuple[log.Logger, Path], tmp_path: Path) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    logger, path = file_logger
    logger.info(Hostile())
    logger.info("x", field=Hostile())
    assert logger.dropped == 2 and path.read_text() == ""
    for bad in (str(tmp_path / "missing"), str(tmp_path), "/\0", "x" * 300):
        broken = log.Logger(bad)
        broken.info("x")
        assert (broken.written, broken.dropped) == (0, 1)
        broken.close()
    assert not (tmp_path / "missing").exists(), "containerd makes the FIFO, nobody else"


def test_the_fd_is_not_inherited(fifo: Path, readers: list[int]) -> None:
    reader(fifo, readers)
    logger = log.Logger(str(fifo))
    logger.info("x")
    mine = [int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    on_fifo = [fd for fd in mine if os.readlink(f"/proc/self/fd/{fd}") == str(fifo)]
    assert len(on_fifo) == 2 and not any(os.get_inheritable(fd) for fd in on_fifo if fd not in readers)
    logger.close()


def test_threads_write_whole_lines(fifo: Path, readers: list[int]) -> None:
    fd = reader(fifo, readers)
    logger = log.Logger(str(fifo))
    text = "y" * 3500
    data = b""

    def write() -> None:
        for _ in range(50):
            logger.info(text)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        data += drained(fd)
    data += drained(fd)
    lines = data.decode().splitlines()
    assert lines and all(LINE.match(line) for line in lines)
    on_fifo = [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    assert sum(os.readlink(f"/proc/self/fd/{n}") == str(fifo) for n in on_fifo) == 2
    logger.close()


# --- the current logger


@pytest.fixture
def restored() -> Iterator[None]:
    before = log.get_logger()
    yield
    log.set_logger(before)


def test_the_current_logger_can_be_replaced(file_logger: tuple[log.Logger, Path], restored: None) -> None:
    logger, path = file_logger
    before = log.set_logger(logger)
    assert log.get_logger() is logger
    for name in ("trace", "debug", "info", "warn", "error"):
        getattr(log, name)("x", a=1)
    assert [LINE.match(line)[1] for line in path.read_text().splitlines()] == [  # type: ignore[index]
        "trace", "debug", "info", "warn", "error",
    ]  # fmt: skip
    assert log.set_logger(before) is logger
    log.info("nowhere")
    assert len(path.read_text().splitlines()) == 5


def test_before_init_lines_are_counted_and_gone(restored: None) -> None:
    silent = log.Logger(None)
    log.set_logger(silent)
    log.error("x")
    log.debug("below the level")
    assert (silent.written, silent.dropped) == (0, 1)


NASTY = ["a\nb\r\n\tc", 'say "no" \\ \\n', "\x00\x1b[0m\x7f\x85\u2028\u2029", "\udcff\udc80", "\U0001f433 ü", ""]


@pytest.mark.parametrize("text", NASTY)
def test_json_gives_back_what_was_logged_in_one_line(text: str) -> None:
    line = log.format_json(log.WARN, text, {"id": text, "n": 7, "big": 2**60, "yes": True, "none": None, "raw": b"\xff"}, 1)
    assert len(line.splitlines()) == len(line.decode().splitlines()) == 1 and line.endswith(b"}\n")
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000000001Z", "level": "warn", "id": text, "n": 7, "big": str(2**60), "yes": True,
        "none": None, "raw": "b'\\xff'", "msg": text,
    }  # fmt: skip


def test_json_keys_that_would_shadow_or_come_twice() -> None:
    pairs: list[tuple[str, object]] = json.loads(
        log.format_json(log.INFO, "m", {"msg": 1, 'a"b': 2, "a_b": 3, "level": 4}, 0), object_pairs_hook=list
    )
    assert pairs[2:] == [("fields.msg", 1), ("a_b", 2), ("a_b_", 3), ("fields.level", 4), ("msg", "m")]


@pytest.mark.parametrize("char", ["x", '"', "\x01", "ü", "\U0001f433", "\udcff"])
@pytest.mark.parametrize("fields", [0, 1, 300])
def test_json_of_any_size_is_one_whole_object(char: str, fields: int) -> None:
    for size in (500, 900, *range(2900, 3100, 7), *range(3900, 4100, 7), 100_000):
        line = log.format_json(log.INFO, char * size, {f"k{n}": char * size for n in range(fields)}, 0)
        assert len(line) <= log.MAX_LINE
        found = json.loads(line)
        assert found["msg"] == char * size or re.search(r"\[\.\.\. \d+ more\]$", found["msg"])


@pytest.mark.parametrize(
    ("env", "default", "chosen"),
    [
        ({}, "logfmt", log.format_line), ({}, "json", log.format_json),
        ({"SHIMCORE_LOG_FORMAT": "JSON"}, "logfmt", log.format_json),
        ({"SHIMCORE_LOG_FORMAT": "logfmt"}, "json", log.format_line), ({"SHIMCORE_LOG_FORMAT": "xml"}, "json", log.format_json),
        ({}, "xml", log.format_line),
    ],
)  # fmt: skip
def test_the_format_that_is_chosen(env: dict[str, str], default: str, chosen: object) -> None:
    assert log.choose_format(default, env) is chosen


@pytest.mark.parametrize("way", ["environment", "configuration"])
def test_a_shim_that_logs_json(author: Make, way: str) -> None:
    source = """
        class Author(Author):
            def __init__(self, runtime_id, flags, config):
                super().__init__(runtime_id, flags, config)
                config.log_format = "json"
    """
    shim = author(source if way == "configuration" else "")
    address = shim.start(env={"SHIMCORE_LOG_FORMAT": "json"} if way == "environment" else {})
    serving: list[dict[str, object]] = []

    def look() -> bool:  # it is logged once the address has been told
        lines = shim.look(address, "sys.modules['shimcore.logger'].get_logger().recent")
        serving[:] = [one for one in map(json.loads, lines) if one["msg"] == "serving"]
        return bool(serving)

    until(look)
    assert not shim.look(address, "'json' in sys.modules")
    assert [(one["level"], one["namespace"], one["id"]) for one in serving] == [("info", shim.namespace, "c1")]
    assert serving[0]["pid"] == shim.pid(address)
