"""What `shimcore run` shows while it runs, and its picture of the events in time."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shimcore.rig import picture
from shimcore.rig.live import Live
from shimcore.rig.runner import Report, Step

RUN = [sys.executable, "-m", "shimcore.cli", "run"]
WAIT = "echo here; while [ ! -e $GO ]; do usleep 2000; done; echo gone; exit 5"


@pytest.fixture
def words(shim_dir: Path, rootfs: Path) -> list[str]:
    if not shutil.which("runc"):
        pytest.skip("runc is not installed")
    return [*RUN, "--shim", str(shim_dir / "containerd-shim-runc-v2-py"), "--rootfs", str(rootfs)]


def waiting(words: list[str], rootfs: Path) -> tuple[list[str], Path]:
    """A run whose container ends when the file is there."""
    go = f"/tmp/go-{os.urandom(4).hex()}"
    return [*words, "--env", f"GO={go}", "--", "sh", "-c", WAIT], rootfs / go[1:]


def test_each_step_is_shown_as_it_comes(words: list[str], rootfs: Path) -> None:
    """red: without the watcher the first line of output waits for the end of the run, which waits for us"""
    command, go = waiting(words, rootfs)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        seen = ""
        try:
            for line in child.stdout:
                seen += line
                if "/tasks/start" in seen and re.search(r"stdout +here\n", seen):
                    break
        finally:
            go.touch()
        rest = child.stdout.read()
    go.unlink()
    assert child.returncode == 5
    assert re.search(r"stdout +gone\n", rest) and "exit code 5\nnothing left behind\n" in rest
    assert "\x1b" not in seen + rest and "\r" not in seen + rest, "colours and progress are for terminals"


def test_a_terminal_is_told_what_is_waited_for(words: list[str], rootfs: Path) -> None:
    command, go = waiting(words, rootfs)
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        seen = ""
        try:
            while True:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # EIO: nobody holds the other side any more
                    break
                seen += data.decode()
                if re.search(r"\r\x1b\[K  wait: [\d.]+ s; 2 events, 1 lines of output", seen):
                    go.touch()
        finally:
            go.touch()
            os.close(ours)
    go.unlink()
    assert child.returncode == 5
    assert "\x1b[36m" in seen and "\r\x1b[K  wait: " in seen


def test_json_is_json_alone(words: list[str], rootfs: Path) -> None:
    command = [*words, "--json", "--", "sh", "-c", "echo a; echo b >&2; exit 2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 2 and not done.stderr
    times = [step["at"] for step in report["steps"]]
    assert times == sorted(times)
    assert {("stdout", "a"), ("stderr", "b")} <= {(step["kind"], step["what"]) for step in report["steps"]}


# --- the parts


STEPS = [
    Step(40.0, "call", "start", took=40.0),
    Step(100.0, "call", "create", took=50.0),
    Step(60.0, "event", "/tasks/create"),
    Step(80.0, "stdout", "one"),
    Step(99.0, "stdout", "two"),
]


def test_a_picture() -> None:
    lines = picture.draw(STEPS, 79)  # 51 cells for 100 ms: one for 2 ms
    bars = {line[:18].strip(): line[19:] for line in lines}
    assert bars["start"] == "█" * 20 + " 40.0".rjust(5) and bars["create"] == " " * 25 + "█" * 25 + " 50.0"
    assert bars["/tasks/create"] == " " * 30 + "●"
    assert bars["stdout"] == " " * 40 + "●" + " " * 8 + "● 2"
    assert lines[-2].lstrip().startswith("┬") and lines[-1].split() == ["0", "ms", "50", "100"]
    assert picture.draw([]) == []


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.3, 7.0, 123.4, 86_400_000.0])
@pytest.mark.parametrize("width", [1, 40, 100, 300])
def test_a_picture_of_any_size(length: float, width: int) -> None:
    steps = [Step(length, "call", "a name that is longer than its room", took=length), Step(length, "event", "e")]
    lines = picture.draw(steps, width)
    assert max(map(len, lines)) <= max(width, 60)
    assert len(lines) == 4
    assert lines[0][19] in "█▏▎▍▌▋▊▉", "what is there is seen"


def test_what_a_container_prints_does_nothing_to_the_terminal() -> None:
    text = str(Step(1.0, "stdout", "\x1b[2Jred\r\x9b1m\tend"))
    assert text.endswith("\\x1b[2Jred\\x0d\\x9b1m\tend")


def test_an_output_that_nobody_reads_ends_the_looking_on_alone() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Live(Gone()) as live:
        live.begun(Report("s", "1.6", "n", "i", ["true"]))
        live.seen(STEPS[0])
    out = io.StringIO()
    with Live(out) as live:
        live.seen(STEPS[0])
    assert out.getvalue() == f"{STEPS[0]}\n"
