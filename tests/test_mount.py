"""mount.py: options, overlay's compaction, and real mounts (as root)."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shimcore import mount, mountinfo
from shimcore.errors import InvalidArgument, Unimplemented
from tests import syscalls

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled module's system calls, or ctypes' where it has not been built."""
    try:
        built = importlib.util.find_spec("shimcore._reaper") is not None
    except ImportError:
        built = False
    if not built:
        monkeypatch.setitem(sys.modules, "shimcore._reaper", syscalls.module())


@pytest.fixture
def folder(session_root: Path) -> Iterator[Path]:
    path = session_root / f"mount {uuid.uuid4().hex[:8]}"  # a space: mountinfo escapes it
    path.mkdir()
    yield path
    mount.umount_recursive(str(path))
    shutil.rmtree(path)


def mounted(path: Path) -> list[mountinfo.Mount]:
    return mountinfo.below(mountinfo.read(), str(path))


class Recorder:
    """Stands in for the compiled module and notes what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fail_at = fail_at
        monkeypatch.setitem(sys.modules, "shimcore._reaper", self)

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(errno.EPERM, "not permitted", str(call[0]))

    def mount(self, *args: object) -> None:
        self._note("mount", *args)

    def mount_in(self, *args: object) -> None:
        self._note("mount_in", *args)

    def umount2(self, *args: object) -> None:
        self._note("umount2", *args)


# --- options


def test_option_table_is_that_of_the_field() -> None:
    names = """async atime bind defaults dev diratime dirsync exec mand noatime nodev nodiratime noexec nomand
        norelatime nostrictatime nosuid rbind relatime remount ro rw strictatime suid sync private shared slave
        unbindable rprivate rshared rslave runbindable""".split()
    assert set(mount.OPTIONS) == set(names)


@pytest.mark.parametrize(
    ("options", "parsed"),
    [
        ([], (0, 0, False, [])),
        (["defaults", ""], (0, 0, False, [])),
        (["ro", "nosuid", "size=1m"], (1 | 2, 0, False, ["size=1m"])),
        (["ro", "rw"], (0, 0, False, [])),
        (["rw", "ro"], (1, 0, False, [])),
        (["noatime", "atime", "noexec", "exec"], (0, 0, False, [])),
        (["rbind", "private"], (mount.MS_BIND | mount.MS_REC, mount.MS_PRIVATE, False, [])),
        (["bind", "rslave"], (mount.MS_BIND, mount.MS_SLAVE | mount.MS_REC, False, [])),
        (["rshared", "unbindable"], (0, mount.MS_UNBINDABLE, False, [])),
        (["loop", "ro"], (1, 0, True, [])),
        (["a=b", "c"], (0, 0, False, ["a=b", "c"])),
    ],
)
def test_parse_options(options: list[str], parsed: tuple[int, int, bool, list[str]]) -> None:
    assert mount.parse_options(options) == parsed


@pytest.mark.parametrize(
    ("path", "trimmed"),
    [
        ("/", "/"),
        ("/foo", "/"),
        ("/.foo-_bar/foo", "/.foo-_bar/"),
        ("/.foo-_bar/foo/", "/.foo-_bar/foo/"),
        ("/.foo-_bar/foo/bar", "/.foo-_bar/foo/"),
        ("/.foo-_bar/foo/bar/", "/.foo-_bar/foo/bar/"),
    ],
)
def test_trim_flawed_dir(path: str, trimmed: str) -> None:
    assert mount.trim_flawed_dir(path) == trimmed


@pytest.mark.parametrize(
    ("dirs", "prefix"),
    [
        ([], ""),
        (["foo"], "foo"),
        (["foo", "bar"], ""),
        (["foo", "foo"], "foo"),
        (["foo", "foobar"], "foo"),
        (["foo", "", "foobar"], ""),
        (["/é1", "/é2", "/è"], "/"),
    ],
)
def test_longest_common_prefix(dirs: list[str], prefix: str) -> None:
    assert mount.longest_common_prefix(dirs) == prefix


@pytest.mark.parametrize(
    ("options", "base", "compacted"),
    [
        (["workdir=a"], None, ["workdir=a"]),
        (["workdir=a", "lowerdir=b"], None, ["workdir=a", "lowerdir=b"]),
        (["lowerdir=/snapshots/1/fs:/snapshots/10/fs"], "/snapshots/", ["lowerdir=1/fs:10/fs"]),
        (
            ["workdir=a", "lowerdir=/snapshots/1/fs:/snapshots/10/fs"],
            "/snapshots/",
            ["workdir=a", "lowerdir=1/fs:10/fs"],
        ),
        (
            ["lowerdir=/snapshots/1/fs:/snapshots/10/fs:/snapshots/2/fs"],
            "/snapshots/",
            ["lowerdir=1/fs:10/fs:2/fs"],
        ),
        (
            ["workdir=a", "lowerdir=/snapshots/1/fs:/snapshots/10/fs:/snapshots/2/fs"],
            "/snapshots/",
            ["workdir=a", "lowerdir=1/fs:10/fs:2/fs"],
        ),
        (
            ["lowerdir=/snapshots/1/fs:/other_snapshots/1/fs"],
            None,
            ["lowerdir=/snapshots/1/fs:/other_snapshots/1/fs"],
        ),
        (
            ["workdir=a", "lowerdir=/snapshots/1/fs:/other_snapshots/1/fs"],
            None,
            ["workdir=a", "lowerdir=/snapshots/1/fs:/other_snapshots/1/fs"],
        ),
        # beyond the Rust crate's: an escaped colon, a base that is itself a layer, data-only layers, a relative path
        ([r"lowerdir=/s/a\:1:/s/b"], "/s/", [r"lowerdir=a\:1:b"]),
        ([r"lowerdir=/s\:x/a:/s\:x/b"], None, [r"lowerdir=/s\:x/a:/s\:x/b"]),
        (["lowerdir=/s/:/s/b"], "/s/", ["lowerdir=.:b"]),
        (["lowerdir=/s/a::/s/b"], None, ["lowerdir=/s/a::/s/b"]),
        (["lowerdir=s/a:s/b"], None, ["lowerdir=s/a:s/b"]),
    ],
)
def test_compaction(options: list[str], base: str | None, compacted: list[str]) -> None:
    before = list(options)
    assert mount.compact_lowerdir_option(options) == (base, compacted)
    assert options == before


# --- which calls are made


def test_a_plain_mount_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    mount.mount_rootfs("tmpfs", "none", ["nodev", "size=1m", "mode=755"], "/t")
    assert recorder.calls == [("mount", b"none", b"/t", b"tmpfs", mount.MS_NODEV, b"size=1m,mode=755")]


def test_bind_ro_is_two_calls_and_propagation_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    mount.mount_rootfs("bind", "/s", ["rbind", "ro", "rslave"], "/t")
    flags = mount.MS_BIND | mount.MS_REC | mount.MS_RDONLY
    assert recorder.calls == [
        ("mount", b"/s", b"/t", b"bind", flags, None),
        ("mount", None, b"/t", None, mount.MS_SLAVE | mount.MS_REC, None),
        ("mount", None, b"/t", None, flags | mount.MS_REMOUNT, None),
    ]


def test_remounts(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    mount.mount_rootfs(None, None, ["remount", "bind", "ro"], "/t")
    mount.mount_rootfs(None, None, ["remount", "ro"], "/t")
    assert [call[4] for call in recorder.calls] == [
        mount.MS_REMOUNT | mount.MS_BIND | mount.MS_RDONLY,
        mount.MS_REMOUNT | mount.MS_RDONLY,
    ]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_what_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    recorder = Recorder(monkeypatch, fail_at)
    with pytest.raises(PermissionError):
        mount.mount_rootfs("bind", "/s", ["bind", "ro", "private"], "/t")
    assert recorder.calls[-1] == ("umount2", b"/t", mount.MNT_DETACH)


def test_a_failed_remount_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, 1)
    with pytest.raises(PermissionError):
        mount.mount_rootfs(None, None, ["remount", "bind", "private", "ro"], "/t")
    assert all(call[0] == "mount" for call in recorder.calls)


def test_the_error_names_source_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, 0)
    with pytest.raises(PermissionError) as caught:
        mount.mount_rootfs("tmpfs", "none", [], "/t")
    assert caught.value.filename == "mount none at /t"


def test_a_relative_target_survives_the_other_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.chdir(tmp_path)
    lower = "lowerdir=" + ":".join(f"/layers/{'x' * 60}{i}" for i in range(60))
    mount.mount_rootfs("overlay", "overlay", [lower], "rootfs")
    (call,) = recorder.calls
    assert call[:2] == ("mount_in", b"/layers/") and call[3] == os.fsencode(tmp_path / "rootfs")


def test_compaction_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a page less 512 bytes, not before; and of overlay alone."""
    recorder = Recorder(monkeypatch)
    page = os.sysconf("SC_PAGE_SIZE")
    fixed = len("lowerdir=/l/:/l/")
    for size in (page - 513, page - 512):
        half = (size - fixed) // 2
        options = [f"lowerdir=/l/{'a' * half}:/l/{'b' * (size - fixed - half)}"]
        assert mount.options_size(options) == size
        mount.mount_rootfs("overlay", "o", options, "/t")
        mount.mount_rootfs("other", "o", options, "/t")
    assert [call[0] for call in recorder.calls] == ["mount", "mount", "mount_in", "mount"]


def test_options_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with pytest.raises(InvalidArgument, match="do not fit"):
        mount.mount_rootfs("overlay", "o", ["lowerdir=" + "/x" * 3000], "/t")
    with pytest.raises(Unimplemented, match="idmapped"):
        mount.mount_rootfs("bind", "/s", ["bind", "uidmap=0:1000:1"], "/t")
    assert recorder.calls == []


# --- several mounts


def fake(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{"type": "tmpfs", "source": "s", "options": [], "target": ""} | fields)


def test_mount_all_undoes_in_reverse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = os.path.realpath(tmp_path)
    recorder = Recorder(monkeypatch, 2)
    with pytest.raises(PermissionError):
        mount.mount_all([fake(), fake(target="/sub"), fake(target="x")], root)
    undo = mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW
    assert recorder.calls[3:] == [("umount2", os.fsencode(f"{root}/sub"), undo), ("umount2", os.fsencode(root), undo)]


@pytest.mark.parametrize("target", ["..", "/../x", "link", "link/below"])
def test_a_target_may_not_lead_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    recorder = Recorder(monkeypatch)
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(InvalidArgument, match="leads out"):
        mount.mount_all([fake(target=target)], str(tmp_path))
    assert recorder.calls == []


# --- real mounts


@needs_root
def test_overlay_and_recursive_umount(folder: Path) -> None:
    for name in ("lower1", "lower2", "upper", "work", "rootfs"):
        (folder / name).mkdir()
    (folder / "lower1" / "one").touch()
    (folder / "lower2" / "two").touch()
    root = folder / "rootfs"
    options = [
        f"lowerdir={folder}/lower1:{folder}/lower2",
        f"upperdir={folder}/upper",
        f"workdir={folder}/work",
    ]
    mount.mount_rootfs("overlay", "overlay", options, str(root))
    assert sorted(os.listdir(root)) == ["one", "two"]
    (root / "sub").mkdir()
    mount.mount_rootfs("tmpfs", "none", [], str(root / "sub"))
    mount.mount_rootfs("tmpfs", "none", [], str(root / "sub"))  # one upon the other
    assert len(mounted(root)) == 3
    mount.umount_recursive(str(root))
    assert mounted(root) == [] and os.listdir(root) == []


@needs_root
def test_overlay_with_more_than_a_page_of_layers(folder: Path) -> None:
    layers = []
    for index in range(60):
        layer = folder / "snapshots" / f"{index:03}{'x' * 30}" / "fs"
        layer.mkdir(parents=True)
        (layer / f"file{index}").touch()
        layers.append(str(layer))
    root = folder / "rootfs"
    root.mkdir()
    options = ["lowerdir=" + ":".join(layers)]
    assert mount.options_size(options) > os.sysconf("SC_PAGE_SIZE")
    before = os.getcwd()
    mount.mount_rootfs("overlay", "overlay", options, str(root))
    assert len(os.listdir(root)) == 60 and os.getcwd() == before
    mount.umount_recursive(str(root))


@needs_root
def test_bind_ro_is_read_only(folder: Path) -> None:
    (folder / "source").mkdir()
    (folder / "target").mkdir()
    mount.mount_rootfs("bind", str(folder / "source"), ["bind", "ro", "rprivate"], str(folder / "target"))
    with pytest.raises(OSError) as caught:
        (folder / "target" / "file").touch()
    assert caught.value.errno == errno.EROFS
    (folder / "source" / "file").touch()


@needs_root
def test_propagation_is_set(folder: Path) -> None:
    mount.mount_rootfs("tmpfs", "none", ["shared"], str(folder))
    shared = subprocess.run(["findmnt", "-no", "PROPAGATION", str(folder)], capture_output=True, text=True)
    assert shared.stdout.strip() == "shared"
    mount.mount_rootfs(None, None, ["remount", "unbindable"], str(folder))
    shared = subprocess.run(["findmnt", "-no", "PROPAGATION", str(folder)], capture_output=True, text=True)
    assert "unbindable" in shared.stdout


@needs_root
def test_umount_of_what_hides_others(folder: Path) -> None:
    """A mount at /t/a, then one over /t: the first can't be reached before the second has gone."""
    (folder / "a").mkdir()
    mount.mount_rootfs("tmpfs", "none", [], str(folder / "a"))
    mount.mount_rootfs("tmpfs", "none", [], str(folder))
    assert len(mounted(folder)) == 2
    mount.umount_recursive(str(folder))
    assert mounted(folder) == []


@needs_root
def test_umount_leaves_neighbours_alone_and_takes_nothing_for_granted(folder: Path) -> None:
    for name in ("root", "root2"):
        (folder / name).mkdir()
        mount.mount_rootfs("tmpfs", "none", [], str(folder / name))
    mount.umount_recursive(str(folder / "root"))
    assert [m.mountpoint for m in mounted(folder)] == [str(folder / "root2")]
    mount.umount_recursive(str(folder / "root"))
    mount.umount_recursive(str(folder / "missing"))
    mount.umount_recursive(None)
    mount.umount_recursive("")


@needs_root
def test_a_busy_mount_is_an_error_or_detached(folder: Path) -> None:
    mount.mount_rootfs("tmpfs", "none", [], str(folder))
    held = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            mount.umount_recursive(str(folder))
        assert caught.value.errno == errno.EBUSY and len(mounted(folder)) == 1
        mount.umount_recursive(str(folder), mount.MNT_DETACH)
        assert mounted(folder) == []
    finally:
        os.close(held)


@needs_root
def test_a_symlink_at_the_target_is_not_followed(folder: Path) -> None:
    (folder / "real").mkdir()
    mount.mount_rootfs("tmpfs", "none", [], str(folder / "real"))
    (folder / "link").symlink_to(folder / "real")
    mount.umount_all(str(folder / "link"))
    assert len(mounted(folder)) == 1


@needs_root
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="no mkfs.ext4")
@pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices")
def test_loop(folder: Path) -> None:
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    (folder / "t").mkdir()
    fds = len(os.listdir("/proc/self/fd"))
    mount.mount_rootfs("ext4", str(image), ["loop", "ro"], str(folder / "t"))
    (found,) = mounted(folder / "t")
    device = os.path.basename(found.source)
    backing = Path(f"/sys/block/{device}/loop/backing_file")
    assert found.fstype == "ext4" and backing.read_text().strip() == str(image)
    assert Path(f"/sys/block/{device}/ro").read_text().strip() == "1"
    assert len(os.listdir("/proc/self/fd")) == fds
    mount.umount_recursive(str(folder / "t"))
    # autoclear: detached with the last reference, which the kernel may drop a moment later
    deadline = time.monotonic() + 10
    while backing.exists() and backing.read_text().strip() == str(image):
        assert time.monotonic() < deadline, "the loop device stays attached"
        time.sleep(0.01)


@needs_root
def test_loop_failures_leave_nothing(folder: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        mount.mount_rootfs("ext4", str(folder / "missing"), ["loop"], str(folder))
    with pytest.raises(InvalidArgument):
        mount.mount_rootfs("ext4", None, ["loop"], str(folder))
    if os.path.exists("/dev/loop-control"):
        (folder / "nofs").write_bytes(bytes(1 << 20))
        with pytest.raises(OSError):
            mount.mount_rootfs("ext4", str(folder / "nofs"), ["loop"], str(folder))
    assert len(os.listdir("/proc/self/fd")) == fds
