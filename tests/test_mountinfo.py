"""mountinfo.py: the format of proc_pid_mountinfo(5), escapes included."""

from __future__ import annotations

import os

import pytest

from shimcore import mountinfo

SAMPLE = rb"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:4 - ext3 /dev/root rw,errors=continue
37 36 0:21 / /a\040b\011c\012d\134e rw - tmpfs tmp\040fs rw
38 36 0:22 /r\040x /plain ro - fuse.x src
39 36 0:23 / /with\303\251\377 rw - tmpfs none rw
40 36 bad
"""


def test_parse() -> None:
    first, second, third, fourth = mountinfo.parse(SAMPLE)
    assert (first.mount_id, first.parent_id, first.root, first.mountpoint) == (36, 35, "/mnt1", "/mnt2")
    assert (first.options, first.fstype, first.source) == (["rw", "noatime"], "ext3", "/dev/root")
    assert first.super_options == ["rw", "errors=continue"]
    assert (second.mountpoint, second.source) == ("/a b\tc\nd\\e", "tmp fs")
    assert (third.root, third.super_options) == ("/r x", [])
    assert os.fsencode(fourth.mountpoint) == "/withé".encode() + b"\xff"


@pytest.mark.parametrize(
    ("field", "plain"),
    [
        (rb"\040", b" "),
        (rb"\134040", rb"\040"),  # an escaped backslash before digits
        (rb"\04", rb"\04"),
        (rb"\999", rb"\999"),
        (rb"\777", rb"\777"),  # no byte
        (b"x\\", b"x\\"),
        (b"", b""),
    ],
)
def test_unescape(field: bytes, plain: bytes) -> None:
    assert mountinfo.unescape(field) == plain


def test_below() -> None:
    lines = b"".join(b"1 1 0:1 / %s rw - t s rw\n" % p for p in (b"/", b"/a", b"/a/b", b"/ab", b"/c"))
    mounts = list(mountinfo.parse(lines))
    assert [m.mountpoint for m in mountinfo.below(mounts, "/a")] == ["/a", "/a/b"]
    assert len(mountinfo.below(mounts, "/")) == 5


def test_the_kernels_own() -> None:
    mounts = mountinfo.read()
    assert any(m.mountpoint == "/proc" and m.fstype == "proc" for m in mounts)
    with open("/proc/self/mountinfo", "rb") as file:
        assert len(mounts) == len(file.readlines())
