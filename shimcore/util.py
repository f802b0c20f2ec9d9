"""Files of the bundle, time, and small helpers; the counterpart of the Rust crate's util module.

JSON is read and written here without the json package, whose import (re, enum) costs as much as the whole
rest of a `start`: the scanner is its C part, called as json.decoder calls it, and the package itself is the
fallback.
"""

from __future__ import annotations

import os
import time

from .errors import InvalidArgument, NotFound
from .logger import rfc3339

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "CONFIG_FILE_NAME", "OPTIONS_FILE_NAME", "RUNTIME_FILE_NAME", "RemoveOnExit", "connect",
    "convert_to_any", "convert_to_timestamp", "from_timestamp", "json_dumps", "json_loads", "mkdir",
    "now_ns", "read_file_to_str", "read_options", "read_pid_from_file", "read_runtime", "read_spec",
    "rfc3339", "timestamp", "write_options", "write_runtime", "write_str_to_file",
]  # fmt: skip

CONFIG_FILE_NAME = "config.json"
OPTIONS_FILE_NAME = "options.json"
RUNTIME_FILE_NAME = "runtime"

# What options.json of the Go and Rust shims may hold: the fields of containerd.runc.v1.Options by their proto
# names.
_OPTION_DEFAULTS: dict[str, bool | int | str] = {
    "no_pivot_root": False,
    "no_new_keyring": False,
    "shim_cgroup": "",
    "io_uid": 0,
    "io_gid": 0,
    "binary_name": "",
    "root": "",
    "criu_path": "",
    "systemd_cgroup": False,
    "criu_image_path": "",
    "criu_work_path": "",
    "task_api_address": "",
    "task_api_version": 0,
}


# --- files


def read_file_to_str(path: str) -> str:
    """The whole file as text; bytes that are not UTF-8 become lone surrogates. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return file.readall().decode("utf-8", "surrogateescape")


def write_str_to_file(path: str, text: str | bytes, mode: int = 0o600) -> None:
    """Replace the file in one step: who reads it sees the old content or the new, byte for byte. Raises
    OSError.

    It is written beside its place under a dotted name, then renamed over it. A file left there by a writer
    that died is removed first; the Rust crate opens it with O_EXCL alone and can never write again. No fsync:
    the bundle is on a tmpfs, and what outlives a power cut in it describes processes that do not.
    """
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    head, tail = os.path.split(path)
    if not tail:
        raise InvalidArgument(f"not a file name: {path!r}")
    temporary = os.path.join(head, "." + tail)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, mode)
    except FileExistsError:
        os.unlink(temporary)
        fd = os.open(temporary, flags, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise


def mkdir(path: str, mode: int = 0o711) -> None:
    """Make a directory unless there is one. Raises OSError, also when something else stands there."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


class RemoveOnExit:
    """Context manager that unlinks a file at its end, and is quiet when the file has gone."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *exc: object) -> None:
        try:
            os.unlink(self.path)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                from . import logger

                logger.warn("cannot remove file", path=self.path, error=error)


# --- JSON


class _ScannerContext:
    """The attributes that _json.make_scanner reads off a json.JSONDecoder, with its defaults."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        return float(name.replace("Infinity", "inf"))


def json_loads(text: str | bytes) -> Any:
    """The value of one JSON text (UTF-8 when bytes). Raises ValueError as json.loads does."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        from _json import make_scanner

        start = len(text) - len(text.lstrip(" \t\n\r"))
        scan: Any = make_scanner  # typeshed has the pure twin's signature
        value, end = scan(_ScannerContext)(text, start)
        if not text[end:].strip(" \t\n\r"):
            return value
    except Exception:  # a syntax error, for json to name; or a scanner that wants a different context
        pass
    import json

    return json.loads(text)


def json_dumps(value: Any) -> str:
    """Compact JSON of dict (str keys), list, tuple, str, int, float, bool and None. Raises TypeError on
    anything else.
    """
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"keys must be str, not {type(key).__name__}")
            pairs.append(f"{json_dumps(key)}:{json_dumps(item)}")
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([json_dumps(item) for item in value]) + "]"
    if isinstance(value, str):
        try:
            from _json import encode_basestring_ascii

            return str(encode_basestring_ascii(value))
        except ImportError:
            pass
    elif not isinstance(value, float):
        raise TypeError(f"{type(value).__name__} has no JSON")
    import json

    return json.dumps(value)


# --- the bundle


def _read_object(path: str) -> dict[str, Any]:
    try:
        value = json_loads(read_file_to_str(path))
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path}: not a JSON object")
    return value


def read_options(bundle: str, into: Any = None) -> dict[str, Any]:
    """The runc options that were kept in the bundle's options.json, every field present; unknown ones are
    kept too.

    into: a containerd.runc.v1.Options to set the fields of as well. Raises NotFound (no file),
    InvalidArgument, OSError.
    """
    options = {**_OPTION_DEFAULTS, **_read_object(os.path.join(bundle, OPTIONS_FILE_NAME))}
    if into is not None:
        for name in into.DESCRIPTOR.fields_by_name:
            if name in options:
                setattr(into, name, options[name])
    return options


def write_options(bundle: str, options: Any) -> None:
    """Keep runc options, a mapping or a containerd.runc.v1.Options message, in the bundle's options.json.
    Raises OSError.
    """
    descriptor = getattr(options, "DESCRIPTOR", None)
    if descriptor is not None:
        options = {name: getattr(options, name) for name in descriptor.fields_by_name}
    write_str_to_file(os.path.join(bundle, OPTIONS_FILE_NAME), json_dumps({**_OPTION_DEFAULTS, **options}))


def read_runtime(bundle: str) -> str:
    """Name or path of the OCI runtime's binary that was kept in the bundle. Raises OSError."""
    return read_file_to_str(os.path.join(bundle, RUNTIME_FILE_NAME))


def write_runtime(bundle: str, binary_name: str) -> None:
    """Keep the OCI runtime's binary for `delete`, which may run when the daemon is dead. Raises OSError."""
    write_str_to_file(os.path.join(bundle, RUNTIME_FILE_NAME), binary_name)


def read_spec(bundle: str) -> dict[str, Any]:
    """The bundle's config.json. Raises NotFound (no file), InvalidArgument (not a JSON object), OSError."""
    return _read_object(os.path.join(bundle, CONFIG_FILE_NAME))


def read_pid_from_file(path: str) -> int:
    """The pid in a runtime's pid file, > 0. Raises OSError, or InvalidArgument when there is none in it
    (yet).
    """
    text = read_file_to_str(path).strip()
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InvalidArgument(f"{path}: no pid in {text[:64]!r}")
    return int(text)


# --- time


def now_ns() -> int:
    """Wall clock, ns since the epoch."""
    return time.time_ns()


def timestamp(ns: int | None = None) -> tuple[int, int]:
    """(seconds, nanos) of google.protobuf.Timestamp for ns since the epoch, now when None; 0 <= nanos <
    10**9, before 1970 too.
    """
    return divmod(time.time_ns() if ns is None else ns, 1_000_000_000)


def from_timestamp(seconds: int, nanos: int) -> int:
    """ns since the epoch of a google.protobuf.Timestamp's fields."""
    return seconds * 1_000_000_000 + nanos


def convert_to_timestamp(ns: int | None, into: Any) -> Any:
    """Set a google.protobuf.Timestamp to ns since the epoch, leave it alone when None; returns it."""
    if ns is not None:
        into.seconds, into.nanos = timestamp(ns)
    return into


def convert_to_any(message: Any) -> tuple[str, bytes]:
    """(type_url, value) of a google.protobuf.Any as containerd makes it: the bare full name, no
    type.googleapis.com.
    """
    return message.DESCRIPTOR.full_name, message.SerializeToString()


# --- connections


def connect(address: str) -> int:
    """Connect to a unix socket and return its fd, close-on-exec, blocking. Raises OSError.

    address: a path (what TTRPC_ADDRESS holds), or an address with a scheme; "\\0name" is abstract.
    """
    import _socket

    path = address.removeprefix("unix://")
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    return sock.detach()
