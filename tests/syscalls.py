"""mount(2) and umount2(2) through ctypes, for tests that run before the compiled module is there; same errors as its own."""

from __future__ import annotations

import ctypes
import os
import types

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def mount(source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None) -> None:
    _call("mount", source, target, fstype, ctypes.c_ulong(flags), data)


def mount_in(
    cwd: bytes, source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None
) -> None:
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.chdir(cwd)
            mount(source, target, fstype, flags, data)
        except OSError as error:
            code = error.errno or 255
        os._exit(code)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number:
        raise OSError(number, os.strerror(number), "mount")


def umount2(target: bytes, flags: int) -> None:
    _call("umount2", target, flags)


def module() -> types.ModuleType:
    """A stand-in for shimcore._reaper with these three."""
    stand_in = types.ModuleType("shimcore._reaper")
    for function in (mount, mount_in, umount2):
        setattr(stand_in, function.__name__, function)
    return stand_in
