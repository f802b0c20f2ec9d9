"""Newer containerds, and crictl, built from their Go modules below build/matrix: what no Debian package has.

    python tools/gobuild.py v1.7.35 v2.1.9 crictl

prints the directory of each one's binaries.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
COMMANDS = ("containerd", "ctr", "containerd-shim-runc-v2")
CRICTL = "v1.34.0"
# Snapshotters that need C libraries, which no test has a use for.
TAGS = "no_btrfs,no_devmapper,no_zfs"


def build(version: str) -> Path:
    """The directory of a containerd's binaries, "v1.7.35" or "v2.1.9", built unless they are there.
    Raises CalledProcessError, and FileNotFoundError without Go."""
    module = "github.com/containerd/containerd" + ("/v2" if version.startswith("v2") else "")
    return _build(BUILD / version, module, version, COMMANDS)


def crictl() -> Path:
    """The directory of crictl, built unless it is there. Raises as build() does."""
    return _build(BUILD / "crictl", "sigs.k8s.io/cri-tools", CRICTL, ("crictl",))


def _build(folder: Path, module: str, version: str, commands: tuple[str, ...]) -> Path:
    binaries = folder / "bin"
    if all((binaries / name).exists() for name in commands):
        return binaries
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "CGO_ENABLED": "0"}
    # A module of its own, since a module that replaces others can't be installed by `go install`.
    (folder / "go.mod").write_text("module matrix\n\ngo 1.24\n")
    packages = [f"{module}/cmd/{name}" for name in commands]
    subprocess.run(["go", "get", *(f"{one}@{version}" for one in packages)], cwd=folder, env=env, check=True)
    for name, package in zip(commands, packages, strict=True):
        flags = ["-tags", TAGS, "-ldflags", f"-s -w -X {module}/version.Version={version}", "-o", str(binaries / name)]
        subprocess.run(["go", "build", *flags, package], cwd=folder, env=env, check=True)
    return binaries


def main() -> int:
    for name in sys.argv[1:]:
        print(crictl() if name == "crictl" else build(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
