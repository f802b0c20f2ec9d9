"""A small run of tools/churn.py; the large one is `make churn`."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.faults import REPO, scale


# red: C5, as it is told in tests/trials/test_c2.py, and `delete` without clear_half_made
@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_C5_nothing_is_left_by_many_short_lives() -> None:
    command = [sys.executable, str(REPO / "tools" / "churn.py"), "--count", str(scale(100, 4000))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing left behind" in done.stdout, done.stdout + done.stderr


# red: a Delete that was given up, and a shim that waited for its Shutdown for ever
@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_C5_nothing_is_left_by_many_short_lives_under_containerd() -> None:
    if not shutil.which("containerd") or not shutil.which("ctr"):
        pytest.skip("containerd is not installed")
    command = [sys.executable, str(REPO / "tools" / "churn.py"), "--containerd", "--count", str(scale(40, 400))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing left behind" in done.stdout, done.stdout + done.stderr
