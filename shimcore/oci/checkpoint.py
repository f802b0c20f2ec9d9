"""Checkpoint and restore: the runtime's command lines, and what is said when criu, which does the work, can't do it."""

from __future__ import annotations

import os

from .. import wire
from ..errors import FailedPrecondition, InvalidArgument, Unknown
from .runc import read_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..errors import ShimError
    from .options import Options
    from .runc import Runtime

RUNC_CHECKPOINT = "containerd.runc.v1.CheckpointOptions"
LINUX_CHECKPOINT = "containerd.linux.runc.CheckpointOptions"

TIMEOUT = 600.0  # seconds, of either: gigabytes go to disk
MESSAGE_MAX = 512  # characters of criu's own log in an error

_FLAGS = {2: "--tcp-established", 3: "--ext-unix-sk", 4: "--shell-job", 5: "--file-locks"}
# What stands at 8 and 9 differs.
_PATHS = {
    RUNC_CHECKPOINT: {8: "image_path", 9: "work_path", 10: "parent_path"},
    LINUX_CHECKPOINT: {8: "work_path", 9: "image_path"},
}
_EXIT, _EMPTY_NAMESPACES, _CGROUPS_MODE = 1, 6, 7


class CheckpointOptions:
    """exit: the container ends with its checkpoint. flags: as runc has them."""

    __slots__ = ("exit", "flags", "image_path", "parent_path", "work_path")

    def __init__(self) -> None:
        self.exit = False
        self.flags: list[str] = []
        self.image_path = ""
        self.work_path = ""
        self.parent_path = ""


def options_of(type_url: str, value: bytes) -> CheckpointOptions:
    """From the Any of a CheckpointTaskRequest; without one, the defaults. Raises InvalidArgument."""
    options = CheckpointOptions()
    kind = type_url.rpartition("/")[2]
    if not value:
        return options
    if kind not in _PATHS:
        raise InvalidArgument(f"checkpoint options of the unknown type {type_url!r}")
    try:
        for number, item in wire.fields(value):
            _take(options, _PATHS[kind], number, item)
    except ValueError as error:
        raise InvalidArgument(f"checkpoint options: {error}") from None
    return options


def _take(options: CheckpointOptions, paths: Mapping[int, str], number: int, item: int | bytes) -> None:
    if number == _EXIT or number in _FLAGS:
        if not isinstance(item, int):
            raise ValueError(f"field {number} is no boolean")
        if number == _EXIT:
            options.exit = bool(item)
        elif item:
            options.flags.append(_FLAGS[number])
        return
    if number not in paths and number not in (_EMPTY_NAMESPACES, _CGROUPS_MODE):
        return
    if not isinstance(item, bytes):
        raise ValueError(f"field {number} is no text")
    text = item.decode()
    if number in paths:
        setattr(options, paths[number], text)
    elif text:
        options.flags += ["--empty-ns" if number == _EMPTY_NAMESPACES else "--manage-cgroups-mode", text]


def work_folder(bundle: str, wanted: str) -> str:
    """Where criu leaves its log: where the client wants it, else a folder in containerd's own for this task."""
    if wanted:
        return wanted
    work = os.path.join(bundle, "work")
    return os.path.join(work if os.path.isdir(work) else bundle, "criu-work")


def _head(runtime: Runtime, criu_path: str, command: str, *flags: str) -> list[str]:
    argv = runtime.argv(command, *flags)
    if criu_path:
        argv[1:1] = ["--criu", criu_path]
    return argv


def checkpoint_argv(runtime: Runtime, options: Options, wanted: CheckpointOptions, id: str, path: str, work: str) -> list[str]:
    """path: where the image goes. work: criu's folder."""
    flags = ["--image-path", path, "--work-path", work]
    if wanted.parent_path:
        flags += ["--parent-path", wanted.parent_path]
    if not wanted.exit:
        flags.append("--leave-running")
    return _head(runtime, options.criu_path, "checkpoint", *flags, *wanted.flags, id)


def restore_argv(
    runtime: Runtime, options: Options, id: str, bundle: str, pid_file: str, path: str, work: str, console: str
) -> list[str]:
    """path: where the image is; it names its parent itself."""
    flags = ["--image-path", path, "--work-path", work, "--detach", "--no-subreaper", "--bundle", bundle, "--pid-file", pid_file]
    if console:
        flags += ["--console-socket", console]
    if options.no_pivot_root:
        flags.append("--no-pivot")
    return _head(runtime, options.criu_path, "restore", *flags, id)


def explain(error: ShimError, work: str, log: str, bundle: str) -> ShimError:
    """What to answer for a runtime that has failed. log: dump.log or restore.log, criu's own, which is kept in the bundle, and of
    which the answer has the error that counts. For the pool."""
    text = str(error)
    if "criu" in text and ("executable file not found" in text or "no such file" in text.lower()):
        return FailedPrecondition(f"{text}: checkpoint and restore need criu on containerd's PATH; install it")
    data, _ = read_log(os.path.join(work, log))
    said = criu_error(data)
    if not said:
        return error
    kept = os.path.join(bundle, f"criu-{log}")
    try:
        fd = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError:
        kept = os.path.join(work, log)
    if "lookup mount" in said:  # a FIFO or file of the client's
        said += (
            "; criu can't save a process that holds files of the host: give it no stdio, or a logging binary, or the annotation"
            " io.shimcore.stdio=copy (docs/checkpoint.md)"
        )
    return Unknown(f"{text}; criu: {said} (its log: {kept})")


def criu_error(log: bytes) -> str:
    """The last error in criu's log that says something: after it come those of its callers, which have "failed"."""
    errors = [line.partition("Error ")[2] for line in log.decode("utf-8", "replace").splitlines() if "Error (" in line]
    telling = [line for line in errors if "FAILED" not in line and "failed with" not in line and "exited, status" not in line]
    return (telling or errors or [""])[-1].strip()[:MESSAGE_MAX]


def clear(work: str) -> None:
    """Remove a work folder that nobody has asked for; criu makes files in it, no folders. For the pool."""
    try:
        with os.scandir(work) as found:
            for entry in found:
                os.unlink(entry.path)
        os.rmdir(work)
    except OSError:
        pass
