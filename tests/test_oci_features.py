"""-info and the features that it keeps: when the runtime is asked, and when what was kept is not believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shimcore.bootstrap import Config, parse_invocation
from shimcore.oci import features
from shimcore.oci.shim import RuncShim
from shimcore.protos import runc_options_pb2, types_pb2
from shimcore.wire import any as any_of

RUNTIME = """#!/bin/sh
echo called >> "$0.calls"
echo '{{"ociVersionMax":"{version}"}}'
exit {status}
"""


class Node:
    """A runtime that counts its calls, and a directory for what is kept of it."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "state"
        self.runtime = root / "runtime"
        self.install("1")

    def install(self, version: str, status: int = 0) -> None:
        """As a package manager does: beside the old one, then renamed over it."""
        new = self.runtime.with_suffix(".new")
        new.write_text(RUNTIME.format(version=version, status=status))
        new.chmod(0o755)
        new.replace(self.runtime)

    def calls(self) -> int:
        path = Path(f"{self.runtime}.calls")
        return len(path.read_text().splitlines()) if path.exists() else 0

    def info(self) -> str | None:
        """The version in the features that -info gives."""
        options = runc_options_pb2.Options(binary_name=str(self.runtime)).SerializeToString()
        invocation = parse_invocation(["-info"], {}, any_of("containerd.runc.v1.Options", options))
        shim = RuncShim("io.containerd.runc.v2-py", invocation.flags, Config())
        info = types_pb2.RuntimeInfo.FromString(shim.shim_info(invocation))
        return str(json.loads(info.features.value)["ociVersionMax"]) if info.HasField("features") else None

    def file(self) -> Path:
        (path,) = self.directory.iterdir()
        return path


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node(tmp_path)
    monkeypatch.setenv(features.VARIABLE, str(node.directory))
    return node


def test_the_runtime_is_asked_once(node: Node) -> None:
    assert [node.info() for _ in range(3)] == ["1"] * 3
    assert node.calls() == 1
    assert node.directory.stat().st_mode & 0o777 == 0o700
    assert node.file().stat().st_mode & 0o777 == 0o600


def test_a_new_binary_is_asked(node: Node) -> None:
    node.info()
    node.install("2")
    assert (node.info(), node.info(), node.calls()) == ("2", "2", 2)
    assert node.file().exists()  # in the place of the old one's


def test_a_binary_that_was_written_over_is_asked_though_its_times_were_set_back(node: Node) -> None:
    node.info()
    before = node.runtime.stat()
    node.runtime.write_text(RUNTIME.format(version="3", status=0))
    os.utime(node.runtime, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (node.runtime.stat().st_ino, node.runtime.stat().st_size) == (before.st_ino, before.st_size)
    assert node.info() == "3"


def test_a_link_to_another_binary_is_asked(node: Node, tmp_path: Path) -> None:
    old = node.runtime.rename(tmp_path / "old")
    node.runtime.symlink_to(old)
    assert node.info() == "1"
    shutil.copy(old, tmp_path / "copy")
    (tmp_path / "copy").write_text(RUNTIME.format(version="4", status=0))
    node.runtime.unlink()
    node.runtime.symlink_to(tmp_path / "copy")
    assert node.info() == "4"


@pytest.mark.parametrize("spoil", ["empty", "cut", "flipped", "no line", "longer", "another runtime's"])
def test_what_is_not_whole_is_replaced(node: Node, spoil: str) -> None:
    node.info()
    whole = node.file().read_bytes()
    bad = {
        "empty": b"", "cut": whole[:-3], "flipped": whole.replace(b'"1"', b'"9"'), "no line": whole.replace(b"\n", b" "),
        "longer": whole + b" ", "another runtime's": whole.replace(os.fsencode(node.runtime), b"/usr/sbin/runc"),
    }[spoil]  # fmt: skip
    assert bad != whole
    node.file().write_bytes(bad)
    assert (node.info(), node.calls()) == ("1", 2)
    assert node.file().read_bytes() == whole
    assert (node.info(), node.calls()) == ("1", 2)


@pytest.mark.parametrize("what", ["mode", "owner"])
def test_a_file_that_others_may_have_written_is_not_believed(node: Node, what: str) -> None:
    node.info()
    node.file().write_bytes(forged(node, b'{"ociVersionMax":"forged"}'))
    assert node.info() == "forged"  # it is well made: nothing but mode and owner speaks against it
    if what == "mode":
        node.file().chmod(0o620)
    else:
        os.chown(node.file(), 65534, -1)
    assert (node.info(), node.calls()) == ("1", 2)
    found = node.file().stat()
    assert (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o600)


def forged(node: Node, text: bytes) -> bytes:
    return features._head(features._identity(str(node.runtime)), text) + text


@pytest.mark.parametrize("what", ["mode", "owner", "link"])
def test_a_directory_that_others_may_write_to_is_not_used(node: Node, tmp_path: Path, what: str) -> None:
    node.info()
    node.file().write_bytes(forged(node, b'{"ociVersionMax":"forged"}'))
    kept = node.file().read_bytes()
    if what == "mode":
        node.directory.chmod(0o770)
    elif what == "owner":
        os.chown(node.directory, 65534, -1)
    else:
        node.directory.rename(tmp_path / "elsewhere")
        node.directory.symlink_to(tmp_path / "elsewhere")
    assert (node.info(), node.calls()) == ("1", 2)
    assert node.file().read_bytes() == kept


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_what_lies_in_the_files_place_is_not_followed(node: Node, tmp_path: Path, what: str) -> None:
    node.info()
    path = node.file()
    (tmp_path / "target").write_bytes(forged(node, b'{"ociVersionMax":"forged"}'))
    (tmp_path / "target").chmod(0o600)
    path.unlink()
    if what == "link":
        path.symlink_to(tmp_path / "target")
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir(0o700)
    assert node.info() == "1"
    assert b"forged" in (tmp_path / "target").read_bytes()
    assert [entry.name for entry in node.directory.iterdir()] == [path.name]


def test_a_runtime_without_the_command_is_asked_again(node: Node) -> None:
    node.install("1", status=1)
    assert (node.info(), node.info(), node.calls()) == (None, None, 2)
    assert list(node.directory.iterdir()) == []
    node.install("5")
    assert node.info() == "5"


def test_one_replaced_while_it_is_asked_is_not_kept(node: Node) -> None:
    def ask() -> bytes:
        node.install("6")
        return b'{"ociVersionMax":"1"}'

    assert features.cached(str(node.runtime), ask) == b'{"ociVersionMax":"1"}'
    assert node.info() == "6"


def test_nothing_is_kept_where_that_is_asked_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(features.VARIABLE, "")
    assert (node.info(), node.info(), node.calls()) == ("1", "1", 2)
    assert not node.directory.exists()


def test_the_binary_that_is_run_is_the_one_that_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/runc").mkdir()  # neither a directory nor what can't be executed is run
    (tmp_path / "b/runc").write_text("")
    (tmp_path / "c/runc").write_text("#!/bin/sh\n")
    (tmp_path / "c/runc").chmod(0o755)
    monkeypatch.setenv("PATH", ":".join(str(tmp_path / name) for name in ("a", "b", "c")))
    assert features.resolve("runc") == str(tmp_path / "c/runc")
    assert features.resolve("./runc") == "./runc"
    assert features.resolve("crun") == "crun"


def test_the_real_runtimes_features_are_what_it_says(shim_dir: Path, tmp_path: Path) -> None:
    env = {**os.environ, features.VARIABLE: str(tmp_path / "state")}
    said = subprocess.run(["runc", "features"], capture_output=True, check=True).stdout.strip()
    for _ in range(2):
        command = [shim_dir / "containerd-shim-runc-v2-py", "-info"]
        done = subprocess.run(command, input=b"", capture_output=True, env=env, timeout=60, check=True)
        info = types_pb2.RuntimeInfo.FromString(done.stdout)
        assert info.features.value == said and done.stderr == b""
    assert len(list((tmp_path / "state").iterdir())) == 1
