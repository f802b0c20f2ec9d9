"""Mounting a container's root: mount(2) with the options of mount(8), as containerd's mount package does it.

Python has no mount(2), so the calls are compiled ones; they raise OSError. This is a process of many threads
and chdir is process-wide, so the one mount that needs a working directory (overlay with shortened paths) is
made by a forked child.
"""

from __future__ import annotations

import os

from . import mountinfo
from .errors import InvalidArgument, ShimError, Unimplemented

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = 16, 32, 64, 128
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_SILENT = 1 << 10, 1 << 11, 1 << 12, 1 << 14, 1 << 15
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME = 1 << 21, 1 << 24
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 1, 2, 4, 8

_PROPAGATION = MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED

# option -> (whether it clears, flags)
OPTIONS: dict[str, tuple[bool, int]] = {
    "async": (True, MS_SYNCHRONOUS),
    "atime": (True, MS_NOATIME),
    "bind": (False, MS_BIND),
    "defaults": (False, 0),
    "dev": (True, MS_NODEV),
    "diratime": (True, MS_NODIRATIME),
    "dirsync": (False, MS_DIRSYNC),
    "exec": (True, MS_NOEXEC),
    "mand": (False, MS_MANDLOCK),
    "noatime": (False, MS_NOATIME),
    "nodev": (False, MS_NODEV),
    "nodiratime": (False, MS_NODIRATIME),
    "noexec": (False, MS_NOEXEC),
    "nomand": (True, MS_MANDLOCK),
    "norelatime": (True, MS_RELATIME),
    "nostrictatime": (True, MS_STRICTATIME),
    "nosuid": (False, MS_NOSUID),
    "private": (False, MS_PRIVATE),
    "rbind": (False, MS_BIND | MS_REC),
    "relatime": (False, MS_RELATIME),
    "remount": (False, MS_REMOUNT),
    "ro": (False, MS_RDONLY),
    "rprivate": (False, MS_PRIVATE | MS_REC),
    "rshared": (False, MS_SHARED | MS_REC),
    "rslave": (False, MS_SLAVE | MS_REC),
    "runbindable": (False, MS_UNBINDABLE | MS_REC),
    "rw": (True, MS_RDONLY),
    "shared": (False, MS_SHARED),
    "slave": (False, MS_SLAVE),
    "strictatime": (False, MS_STRICTATIME),
    "suid": (True, MS_NOSUID),
    "sync": (False, MS_SYNCHRONOUS),
    "unbindable": (False, MS_UNBINDABLE),
}

_LOWERDIR = "lowerdir="


# --- options


def parse_options(options: Iterable[str]) -> tuple[int, int, bool, list[str]]:
    """(mount flags, propagation flags, loop, data options) of mount(8)'s options; the last of a pair that
    contradicts counts.

    MS_REC belongs to the bind or to the propagation that brought it: rbind,private is no recursive private.
    """
    flags = propagation = 0
    loop = False
    data = []
    for option in options:
        if option == "loop":
            loop = True
        elif option in OPTIONS:
            clear, bits = OPTIONS[option]
            if bits & _PROPAGATION:
                propagation = bits
            elif clear:
                flags &= ~bits
            else:
                flags |= bits
        elif option:
            data.append(option)
    return flags, propagation, loop, data


def options_size(options: Sequence[str]) -> int:
    """Bytes that the options take when joined by commas."""
    return len(os.fsencode(",".join(options)))


def longest_common_prefix(dirs: Sequence[str]) -> str:
    """The longest string that all begin with, whether or not it ends at a slash; "" for none."""
    if not dirs:
        return ""
    low, high = min(dirs), max(dirs)
    for index, char in enumerate(low):
        if char != high[index]:
            return low[:index]
    return low


def trim_flawed_dir(path: str) -> str:
    """A path up to and with its last slash, since a common prefix may end within a name; "/" without a slash.
    """
    return path[: path.rfind("/") + 1] or "/"


def _split_lower(value: str) -> list[str]:
    """lowerdir's directories: split at colons, but for escaped ones, which stay escaped (overlayfs's
    documentation).
    """
    dirs, start, index = [], 0, 0
    while index < len(value):
        if value[index] == "\\":
            index += 1
        elif value[index] == ":":
            dirs.append(value[start:index])
            start = index + 1
        index += 1
    return [*dirs, value[start:]]


def compact_lowerdir_option(options: Sequence[str]) -> tuple[str | None, list[str]]:
    """(directory to mount from, options with overlay's lowerdirs relative to it), or (None, the options as
    they are).

    The kernel takes at most a page of options; fifty layers under a long path are more.
    """
    result = list(options)
    at = [index for index, option in enumerate(result) if option.startswith(_LOWERDIR)]
    if len(at) != 1:
        return None, result
    dirs = _split_lower(result[at[0]][len(_LOWERDIR) :])
    if len(dirs) < 2:
        return None, result
    base = trim_flawed_dir(longest_common_prefix(dirs))
    # With an escape in it the base would not be the directory's name.
    if base == "/" or not base.startswith("/") or "\\" in base:
        return None, result
    result[at[0]] = _LOWERDIR + ":".join([d[len(base) :] or "." for d in dirs])
    return base, result


# --- loop devices

_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_SET_STATUS64, _LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C04, 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
_LOOP_TRIES = 128


def setup_loop(source: str, readonly: bool = False, autoclear: bool = True) -> tuple[str, int]:
    """Attach a file to a free loop device (loop(4)); returns (device's path, fd of it).

    With autoclear the device is detached at its last close, so the caller keeps the fd open until it is
    mounted, then closes it. Raises OSError; EBUSY after 128 devices that others were faster to take.
    """
    from fcntl import ioctl
    from struct import pack

    access = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC
    flags = (_LO_FLAGS_READ_ONLY if readonly else 0) | (_LO_FLAGS_AUTOCLEAR if autoclear else 0)
    info = pack("<5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(source)[:63], b"", b"", 0, 0)
    backing = os.open(source, access)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for left in range(_LOOP_TRIES - 1, -1, -1):
                path = f"/dev/loop{ioctl(control, _LOOP_CTL_GET_FREE)}"
                device = os.open(path, access)
                try:
                    ioctl(device, _LOOP_SET_FD, backing)
                    try:
                        ioctl(device, _LOOP_SET_STATUS64, info)
                    except OSError:
                        ioctl(device, _LOOP_CLR_FD, 0)
                        raise
                    return path, device
                except OSError as error:
                    os.close(device)
                    from errno import EBUSY

                    if error.errno != EBUSY or not left:
                        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
        finally:
            os.close(control)
    finally:
        os.close(backing)
    raise AssertionError


# --- mounting


def mount_rootfs(fs_type: str | None, source: str | None, options: Sequence[str], target: str) -> None:
    """Mount one file system at `target`, a directory that exists.

    Up to three calls: the mount; its propagation; and for bind,ro the remount without which the kernel
    ignores ro. When a later one fails the mount is taken back, so nothing is left writable that was asked to
    be read-only. Raises OSError, InvalidArgument (options of more than a page, even shortened), Unimplemented
    (idmapped mounts).
    """
    page = os.sysconf("SC_PAGE_SIZE")
    chdir = None
    options = list(options)
    # 512: containerd's margin for what the kernel adds.
    if fs_type == "overlay" and options_size(options) >= page - 512:
        chdir, options = compact_lowerdir_option(options)
    flags, propagation, loop, data = parse_options(options)
    for option in data:
        if option.startswith(("uidmap=", "gidmap=")):
            raise Unimplemented(f"idmapped mounts are not supported: {option}")
    joined = os.fsencode(",".join(data))
    if len(joined) >= page:
        raise InvalidArgument(f"mount options of {len(joined)} bytes do not fit in a page of {page}")

    place = os.fsencode(os.path.abspath(target))
    bind_ro = flags & (MS_BIND | MS_RDONLY) == MS_BIND | MS_RDONLY
    mounted = False
    # A remount of a read-only bind is the third call's work alone.
    if not (flags & MS_REMOUNT and bind_ro and not joined):
        _first_mount(chdir, source, place, fs_type, flags, joined, loop)
        mounted = not flags & MS_REMOUNT
    try:
        if propagation:
            _mount(None, place, None, propagation, None)
        if bind_ro:
            _mount(None, place, None, flags | MS_REMOUNT, None)
    except BaseException:
        if mounted:
            _umount2(place, MNT_DETACH)
        raise


def _first_mount(
    chdir: str | None,
    source: str | None,
    place: bytes,
    fs_type: str | None,
    flags: int,
    data: bytes,
    loop: bool,
) -> None:
    device = -1
    if loop:
        if not source:
            raise InvalidArgument("a loop mount needs a source")
        source, device = setup_loop(source, readonly=bool(flags & MS_RDONLY))
    try:
        args = (
            os.fsencode(source) if source is not None else None,
            place,
            os.fsencode(fs_type) if fs_type else None,
            flags,
            data or None,
        )
        if chdir is None:
            _mount(*args)
        else:
            from ._reaper import mount_in

            mount_in(os.fsencode(chdir), *args)
    except OSError as error:
        what = f"mount {source or fs_type} at {os.fsdecode(place)}"
        raise OSError(error.errno, os.strerror(error.errno or 0), what) from None
    finally:
        if device >= 0:
            os.close(device)


def _mount(source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None) -> None:
    from ._reaper import mount

    mount(source, target, fstype, flags, data)


def _umount2(target: bytes, flags: int) -> None:
    from ._reaper import umount2

    umount2(target, flags)


def _place(target: str, sub: str) -> str:
    """A mount's place below `target`, which a symlink of the root file system must not lead out of."""
    if not sub.strip("/"):
        return target
    root = os.path.realpath(target)
    place = os.path.realpath(os.path.join(root, sub.lstrip("/")))
    if place != root and not place.startswith(root.rstrip("/") + "/"):
        raise InvalidArgument(f"mount target {sub!r} leads out of {target}")
    return place


def mount_all(mounts: Iterable[Any], target: str) -> None:
    """Mount containerd.types.Mount messages (or objects with type, source, options, target) in order.

    Each at target + its own target. When one fails those before it are unmounted, last first. Raises as
    mount_rootfs does, and InvalidArgument for a target that leads out.
    """
    done: list[str] = []
    try:
        for mount in mounts:
            place = _place(target, getattr(mount, "target", ""))
            mount_rootfs(mount.type or None, mount.source or None, list(mount.options), place)
            done.append(place)
    except BaseException:
        for place in reversed(done):
            try:
                _umount2(os.fsencode(place), MNT_DETACH | UMOUNT_NOFOLLOW)
            except OSError:
                pass
        raise


def umount_all(target: str, flags: int = 0) -> None:
    """Unmount `target` until nothing is mounted there: mounts stack. Raises OSError, but not EINVAL (no
    mount) or ENOENT.
    """
    from errno import EINVAL, ENOENT

    place = os.fsencode(target)
    while True:
        try:
            _umount2(place, flags | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (EINVAL, ENOENT):
                return
            raise


def umount_recursive(target: str | None, flags: int = 0) -> None:
    """Unmount all at and under `target`, deepest first; nothing mounted, or no such directory, is fine.

    flags: umount2(2)'s. Raises OSError, EBUSY above all, when something stays mounted. A mount may hide
    others below its place, which can be reached only after it has gone: so the table is read again as long as
    it gets shorter.
    """
    if not target:
        return
    root = os.path.realpath(target)
    left = -1
    while True:
        mounts = mountinfo.below(mountinfo.read(), root)
        if not mounts:
            return
        failed: OSError | None = None
        for mount in sorted(mounts, key=lambda m: m.mountpoint.count("/"), reverse=True):
            try:
                umount_all(mount.mountpoint, flags)
            except OSError as error:
                failed = failed or error
        if 0 <= left <= len(mounts):
            raise failed or ShimError(f"{mounts[0].mountpoint} stays mounted")
        left = len(mounts)
