"""cgroup.py: layouts from samples, and this machine's own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import cgroup, mountinfo
from shimcore.errors import InvalidArgument, NotFound, ShimError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")


def mounts(*lines: str) -> list[mountinfo.Mount]:
    return list(mountinfo.parse("\n".join(f"1 1 0:1 {line}" for line in lines).encode()))


UNIFIED = mounts("/ / rw - ext4 r rw", "/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate")
LEGACY = mounts(
    "/ /sys/fs/cgroup ro - tmpfs tmpfs ro",
    "/ /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
    "/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
    "/ /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
)
HYBRID = [*LEGACY, *mounts("/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")]
# within a container, on v1, without a cgroup namespace
INSIDE = mounts("/docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory")


# --- layouts


@pytest.mark.parametrize(
    ("found", "mode"),
    [(UNIFIED, "unified"), (LEGACY, "legacy"), (HYBRID, "hybrid"), (mounts("/ / rw - ext4 r rw"), "none")],
)
def test_mode(found: list[mountinfo.Mount], mode: str) -> None:
    assert cgroup.mode(cgroup.hierarchies(found)) == mode


def test_hierarchies() -> None:
    found = {h.controllers: h for h in cgroup.hierarchies(HYBRID)}
    assert set(found) == {("name=systemd",), ("cpu", "cpuacct"), ("memory",), ()}
    assert found[()].v2 and found[()].mountpoint == "/sys/fs/cgroup/unified"
    # kubelets and containers mount hierarchies again, and only parts of them
    twice = cgroup.hierarchies([*INSIDE, *LEGACY, *INSIDE])
    (memory,) = [h for h in twice if h.controllers == ("memory",)]
    assert (memory.root, memory.mountpoint) == ("/", "/sys/fs/cgroup/memory")


@pytest.mark.parametrize(
    ("root", "path", "directory"),
    [
        ("/", "/", "/m"),
        ("/", "/a/b", "/m/a/b"),
        ("/", "/a/", "/m/a"),
        ("/docker/abc", "/docker/abc", "/m"),
        ("/docker/abc", "/docker/abc/x", "/m/x"),
        ("/docker/abc", "/docker/abcd", None),
        ("/docker/abc", "/", None),
        ("/", "/../other", None),
        ("/", "/..", None),
        ("/", "/..a", "/m/..a"),
    ],
)
def test_directory(root: str, path: str, directory: str | None) -> None:
    assert cgroup.Hierarchy("/m", root, ("memory",), False).directory(path) == directory


# --- of a process


def test_parse_proc_cgroup() -> None:
    text = "12:cpu,cpuacct:/a\n1:name=systemd:/b:c\n0::/d (deleted)\nnonsense\n3:memory:\n"
    assert cgroup.parse_proc_cgroup(text) == [
        (("cpu", "cpuacct"), "/a"),
        (("name=systemd",), "/b:c"),
        ((), "/d"),
        (("memory",), "/"),
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/user.slice/user-1000.slice/session-2.scope", "/user.slice/user-1000.slice/session-2.scope"),
        ("0::", "/"),
        ("0::/kubepods-besteffort-pod8.slice:cri-containerd:8", "/kubepods-besteffort-pod8.slice:cri-containerd:8"),
        ("5:memory:/x\n0::/y", "/y"),
    ],
)
def test_parse_v2_path(text: str, path: str) -> None:
    assert cgroup.parse_v2_path(text) == "/sys/fs/cgroup" + path
    assert cgroup.parse_v2_path(text, "/sys/fs/cgroup/unified/") == "/sys/fs/cgroup/unified" + path


def test_no_v2_path() -> None:
    with pytest.raises(NotFound):
        cgroup.parse_v2_path("5:memory:/x")


def test_paths_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = cgroup.parse_proc_cgroup("4:cpu,cpuacct:/a\n3:memory:/b\n2:pids:/unmounted\n1:name=systemd:/c\n0::/d")
    monkeypatch.setattr(cgroup, "_proc_cgroup", lambda pid: entries)
    assert cgroup.paths(1, cgroup.hierarchies(HYBRID)) == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/a",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/a",
        "memory": "/sys/fs/cgroup/memory/b",
        "name=systemd": "/sys/fs/cgroup/systemd/c",
        "": "/sys/fs/cgroup/unified/d",
    }
    assert cgroup.paths(1, cgroup.hierarchies(INSIDE)) == {}


def test_no_such_process() -> None:
    for function in (cgroup.paths, cgroup.find_directory, cgroup.read_oom_score_adj, cgroup.procs_path):
        with pytest.raises(NotFound):
            function(2**30)


# --- this machine's


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


class Groups:
    """Cgroups of one name in every hierarchy where a process can join without more ado."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.directories: dict[str, Path] = {}
        for hierarchy in cgroup.hierarchies():
            # cpuset takes nobody before it is configured
            key = hierarchy.controllers[0] if hierarchy.controllers else ""
            if key != "cpuset":
                path = Path(hierarchy.mountpoint) / name
                path.mkdir()
                self.directories[key] = path

    def remove(self) -> None:
        for top in self.directories.values():
            for path, _, _ in os.walk(top, topdown=False):
                rmdir(path)


def rmdir(path: str) -> None:
    # A cgroup stays busy for a moment after its last process has been reaped.
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.rmdir(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@pytest.fixture
def groups(namespace: str) -> Iterator[Groups]:
    # made before the sleeper is, hence removed after it has gone
    made = Groups(f"{namespace}-{uuid.uuid4().hex[:6]}")
    yield made
    made.remove()


@needs_root
def test_add_task_to_cgroup(groups: Groups, sleeper: subprocess.Popen[bytes]) -> None:
    joined = cgroup.add_task_to_cgroup("/" + groups.name, sleeper.pid)
    assert sorted(joined) == sorted(map(str, groups.directories.values()))
    for directory in joined:
        assert cgroup.cgroup_procs(directory) == [sleeper.pid]
    known = cgroup.paths(sleeper.pid)
    for key, path in groups.directories.items():
        assert known[key] == str(path)


@needs_root
@pytest.mark.parametrize("path", ["", "/", "../x", "a/../../b", "."])
def test_what_is_no_cgroup(path: str) -> None:
    with pytest.raises(InvalidArgument):
        cgroup.add_task_to_cgroup(path, os.getpid())


@needs_root
def test_a_cgroup_that_nobody_made_is_not_made(groups: Groups) -> None:
    with pytest.raises(NotFound):
        cgroup.add_task_to_cgroup(f"{groups.name}/missing", os.getpid())
    assert not any((path / "missing").exists() for path in groups.directories.values())
    with pytest.raises(NotFound, match="no process"):
        cgroup.add_task_to_cgroup(groups.name, 2**22 - 1)


@needs_root
def test_find_directory_of_a_container(groups: Groups, sleeper: subprocess.Popen[bytes]) -> None:
    cgroup.add_task_to_cgroup(groups.name, sleeper.pid)
    assert cgroup.find_directory(sleeper.pid).endswith(groups.name)
    for key, path in groups.directories.items():
        assert cgroup.find_directory(sleeper.pid, key) == str(path)
    assert cgroup.list_pids(cgroup.procs_path(sleeper.pid)) == [sleeper.pid]


def test_the_top_of_a_hierarchy_is_nobodys_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing the rest of a container must never mean everything on the machine."""
    found = cgroup.hierarchies()
    monkeypatch.setattr(cgroup, "paths", lambda pid, _: {h.controllers[0] if h.controllers else "": h.mountpoint for h in found})
    if cgroup.mode(found) == "none":
        pytest.skip("no cgroups")
    assert os.path.isdir(cgroup.find_directory(1))
    with pytest.raises(NotFound):
        cgroup.procs_path(1)


def test_v2_of_a_hybrid_machine_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "hierarchies", lambda: [
        cgroup.Hierarchy("/proc", "/", ("pids",), False), cgroup.Hierarchy("/sys", "/", (), True),
    ])  # fmt: skip
    monkeypatch.setattr(cgroup, "paths", lambda pid, _: {"": "/sys/kernel", "pids": "/proc/self"})
    assert cgroup.find_directory(1) == "/proc/self"
    assert cgroup.find_directory(1, "") == "/sys/kernel"


@needs_root
def test_cgroup_procs_is_recursive(groups: Groups, sleeper: subprocess.Popen[bytes]) -> None:
    top = next(iter(groups.directories.values()))
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "cgroup.procs").write_text(str(sleeper.pid))
    assert cgroup.cgroup_procs(str(top)) == [sleeper.pid]
    assert cgroup.cgroup_procs(str(top), recursive=False) == []
    with pytest.raises(NotFound):
        cgroup.cgroup_procs(str(top / "missing"))


@needs_root
def test_freeze_and_thaw(groups: Groups, sleeper: subprocess.Popen[bytes]) -> None:
    cgroup.add_task_to_cgroup(groups.name, sleeper.pid)
    tried = 0
    for key in ("freezer", ""):
        path = groups.directories.get(key)
        if path is None:
            continue
        tried += 1
        file, freeze, thaw = cgroup.freezer_file(str(path))
        cgroup.freeze(str(path))
        deadline = time.monotonic() + 10
        status = Path(file).parent / ("freezer.state" if key else "cgroup.events")
        while ("FROZEN" if key else "frozen 1") not in status.read_text():
            assert time.monotonic() < deadline
        assert Path(file).read_text().strip() == freeze
        cgroup.thaw(str(path))
        assert Path(file).read_text().strip() == thaw
    assert tried
    other = groups.directories.get("memory")
    if other is not None and not (other / "cgroup.freeze").exists():
        with pytest.raises(NotFound):
            cgroup.freezer_file(str(other))


@needs_root
def test_kill_file(groups: Groups, sleeper: subprocess.Popen[bytes]) -> None:
    path = groups.directories.get("")
    if path is None or not (path / "cgroup.kill").exists():
        pytest.skip("no cgroup.kill")
    cgroup.add_task_to_cgroup(groups.name, sleeper.pid)
    file = cgroup.kill_file(str(path))
    assert file is not None
    Path(file).write_text("1")
    assert sleeper.wait(10) == -signal.SIGKILL
    assert cgroup.kill_file("/proc") is None


# --- the OOM score


def test_oom_score_is_the_parents_plus_one(sleeper: subprocess.Popen[bytes]) -> None:
    parent = cgroup.read_oom_score_adj(os.getpid())
    assert cgroup.read_oom_score_adj(sleeper.pid) == parent
    wanted = min(parent + 1, 1000)
    assert cgroup.adjust_oom_score(sleeper.pid, os.getpid()) == wanted
    assert cgroup.read_oom_score_adj(sleeper.pid) == wanted
    assert cgroup.adjust_oom_score(sleeper.pid, os.getpid()) == wanted, "again changes nothing"


def test_oom_score_is_capped(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "1000"]) as parent:
        try:
            Path(f"/proc/{parent.pid}/oom_score_adj").write_text("1000")
            assert cgroup.adjust_oom_score(sleeper.pid, parent.pid) == 1000
            assert cgroup.read_oom_score_adj(sleeper.pid) == 1000
        finally:
            parent.kill()


def test_oom_score_that_was_not_taken_is_noticed(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial G10: read back."""
    monkeypatch.setattr(cgroup, "_write", lambda path, value: None)
    with pytest.raises(ShimError, match="oom_score_adj"):
        cgroup.adjust_oom_score(sleeper.pid, os.getpid())
