"""What the README tells a user to do, done."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from shimcore.testing.leaks import Guard
from tests.containerd.conftest import OURS
from tests.containerd.daemon import Containerd

REPO = Path(__file__).resolve().parents[2]


def test_as_a_user_would(session_root: Path, rootfs: Path, leak_guard: Guard) -> None:
    """`make shim DEST=DIR`, DIR on PATH, and a containerd with its own defaults but for its directories."""
    directory = session_root / "user"
    # As from a user's own shell, not as from inside the suite and the make that may run it.
    inside = ("MAKE", "MFLAGS", "PYTHON")
    env = {key: value for key, value in os.environ.items() if not key.startswith(inside)}
    subprocess.run(["make", "shim", f"DEST={directory}"], check=True, cwd=REPO, env=env, timeout=300)
    assert (directory / "containerd-shim-runc-v2-py").is_file()
    namespace = f"{leak_guard.prefix}-user"
    daemon = Containerd(session_root / "ucd", namespace, path=[directory], config=False)
    daemon.start()
    try:
        flags = ("--rm", "--runtime", OURS, "--rootfs", rootfs)
        done = daemon.ctr("run", *flags, "hello", "/bin/sh", "-c", "echo hello; exit 5", check=False)
        assert (done.returncode, done.stdout) == (5, "hello\n"), done.stderr
        assert daemon.tasks() == {} and daemon.containers() == []
    finally:
        daemon.stop()
