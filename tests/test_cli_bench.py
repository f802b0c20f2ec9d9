"""`shimcore bench`: shims side by side, through the rig."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from shimcore.rig import Rig, compare
from shimcore.rig.compare import RATE, WHAT, Side
from tests.test_cli import STOCK, cli


@pytest.fixture
def ours(shim_dir: Path) -> str:
    if not shutil.which("runc"):
        pytest.skip("runc is not installed")
    return str(shim_dir / "containerd-shim-runc-v2-py")


def test_two_shims_side_by_side(ours: str) -> None:
    """red: `times` without what `life` measures last"""
    peer = str(STOCK) if STOCK.exists() else ours
    told = json.loads(cli("bench", ours, peer, "--rounds", "2", "--json"))
    assert told["rounds"] == 2 and [shim["path"] for shim in told["shims"]] == [ours, peer]
    for shim in told["shims"]:
        assert shim["left"] == [] and list(shim["times"]) == list(WHAT)
        times = shim["times"]
        assert all(one["median"] > 0 and one["ratio"] > 0 for one in times.values())
        assert times["create"]["median"] > times["start"]["median"], "the one holds the other"
        assert times[RATE]["p99"] <= times[RATE]["median"] and times["exec"]["p99"] >= times["exec"]["median"]
    assert {one["ratio"] for one in told["shims"][0]["times"].values()} == {1.0}


def test_the_table(ours: str) -> None:
    text = cli("bench", ours, "--rounds", "1", "--plain")
    assert f"1: {ours}, started as containerd 1.6 does" in text and "1 containers of each" in text
    firsts = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    assert set(WHAT) <= set(firsts) and "ratio" not in text.split("\n\n")[2]


def test_no_template_outlives_the_run(ours: str) -> None:
    """red: without _end_templates the template is still there"""
    sides = compare.compare([ours], rounds=1)
    assert sides[0].left == []
    marks = [line for line in _command_lines() if "--shimcore-template" in line and os.path.dirname(ours) in line]
    assert marks == []


def _command_lines() -> list[str]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit():
                found.append(Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            pass
    return found


def test_each_life_is_a_whole_one(ours: str) -> None:
    with Rig(ours) as rig:
        times = compare.life(rig)
        assert set(times) == set(WHAT) and not rig.sessions
        assert rig.events.all == [], "events of a round are not kept for all of them"


def test_a_shim_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "containerd-shim-broken-v1"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    said = cli("bench", str(broken), "--rounds", "1", status=1)
    assert said.startswith("Error: containerd-shim-broken-v1: ") and "it is broken" in said
    assert "no executable shim 'nothing'" in cli("bench", "nothing", status=1)
    assert "Missing argument" in cli("bench", status=2)


def test_names_differ() -> None:
    names = compare._names(["/a/x", "/b/x", "/c/y", "/c/y"])
    assert names == ["/a/x", "/b/x", "y", "y #2"]


def test_p99() -> None:
    side = Side("s", "/s", "1.6")
    side.times["start"] = [float(value) for value in range(1, 201)]
    side.times[RATE] = list(side.times["start"])
    assert side.p99("start") == 198 and side.median("start") == 100.5
    assert side.p99(RATE) == 3, "of a rate the worst are the lowest"
