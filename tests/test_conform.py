"""`shimcore conform`: what it says of a shim that is right, of one that is wrong, and of one that is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shimcore.rig import conform

HANG = 120


def command(*args: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "shimcore.cli", "conform", *args]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG)


def test_our_shim_passes(shim_dir: Path, rootfs: Path) -> None:
    results = list(conform.conform(shim_dir / "containerd-shim-runc-v2-py", rootfs=rootfs))
    assert [(result.name, result.detail) for result in results if result.outcome != conform.PASSED] == []
    assert [result.name for result in results] == conform.names()


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "containerd-shim-wrong-v1"
    path.write_text("#!/bin/sh\necho 'this one is wrong' >&2\nexit 3\n")
    path.chmod(0o755)
    return path


def test_what_fails_is_said(wrong: Path) -> None:
    done = command("--only", "whole_life", "--only", "generation_2.3", str(wrong))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("failed  whole_life") and "this one is wrong" in lines[1]
    assert lines[2].startswith("failed  generation_2.3") and lines[-1] == f"{wrong}: 0 of 2 passed"
    report = json.loads(command("--json", "--only", "stdin", str(wrong)).stdout)
    assert (report["failed"], report["trials"][0]["name"], report["trials"][0]["outcome"]) == (1, "stdin", "failed")


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["--only", "nothing", "{}"], 1, "no such trial: nothing"),
        (["--generation", "9", "{}"], 2, "'9' is not one of '1.6', '1.7', '2.3'"),  # 2: of the command line, as click has it
        (["{}-not-there"], 1, "not-there"),
    ],
)
def test_what_can_not_be_run(wrong: Path, args: list[str], status: int, said: str) -> None:
    done = command(*(arg.format(wrong) for arg in args))
    assert done.returncode == status and done.stdout == ""
    assert "Error: " in done.stderr and said in done.stderr
