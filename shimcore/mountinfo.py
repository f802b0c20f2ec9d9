"""/proc/PID/mountinfo, parsed (proc_pid_mountinfo(5)).

The kernel writes space, tab, newline and backslash in paths as three octal digits; who compares paths without
decoding them misses every mount below a directory with a space in its name.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Mount:
    """One line of mountinfo. Paths are str as os.fsdecode makes them; options are lists of str."""

    __slots__ = (
        "fstype", "mount_id", "mountpoint", "options", "parent_id", "root", "source", "super_options",
    )  # fmt: skip

    def __init__(
        self,
        mount_id: int,
        parent_id: int,
        root: str,
        mountpoint: str,
        options: list[str],
        fstype: str,
        source: str,
        super_options: list[str],
    ) -> None:
        self.mount_id = mount_id
        self.parent_id = parent_id
        self.root = root
        self.mountpoint = mountpoint
        self.options = options
        self.fstype = fstype
        self.source = source
        self.super_options = super_options

    def __repr__(self) -> str:
        return f"Mount({self.mountpoint!r}, {self.fstype!r}, root={self.root!r})"


_OCTAL = b"01234567"


def unescape(field: bytes) -> bytes:
    """A path field with its \\ooo escapes decoded; a backslash that starts no such escape stays."""
    parts = field.split(b"\\")
    if len(parts) == 1:
        return field
    out = [parts[0]]
    for part in parts[1:]:
        digits = part[:3]
        if len(digits) == 3 and digits[0] in b"0123" and digits[1] in _OCTAL and digits[2] in _OCTAL:
            out.append(bytes((int(digits, 8),)) + part[3:])
        else:
            out.append(b"\\" + part)
    return b"".join(out)


def parse(data: bytes) -> Iterator[Mount]:
    """Every mount of a mountinfo file's content, in its order; a line that isn't whole is skipped."""
    for line in data.split(b"\n"):
        # Optional fields of unknown number stand before the lone "-".
        head, dash, tail = line.partition(b" - ")
        left, right = head.split(b" "), tail.split(b" ")
        if not dash or len(left) < 6 or len(right) < 2:
            continue
        yield Mount(
            int(left[0]),
            int(left[1]),
            os.fsdecode(unescape(left[3])),
            os.fsdecode(unescape(left[4])),
            left[5].decode("ascii", "replace").split(","),
            os.fsdecode(unescape(right[0])),
            os.fsdecode(unescape(right[1])),
            os.fsdecode(right[2]).split(",") if len(right) > 2 else [],
        )


def read(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees. Raises OSError."""
    with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
        return list(parse(file.readall()))


def below(mounts: list[Mount], path: str) -> list[Mount]:
    """Those at `path` (absolute, resolved, without a trailing slash) or under it, in the order given."""
    prefix = path.rstrip("/") + "/"
    return [m for m in mounts if m.mountpoint == path or m.mountpoint.startswith(prefix)]
