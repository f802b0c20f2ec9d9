"""The command line of an OCI runtime, and what it says when it fails.

A runtime's own words are in its log (--log, --log-format json): one JSON object a line, of which the last
with level=error is the reason. What it writes to stderr is the second best, and for create and exec not to be
had, since stderr is the container's by then.
"""

from __future__ import annotations

import os

from ..errors import DeadlineExceeded, Unknown
from ..util import json_loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._reaper import JobResult
    from ..errors import ShimError
    from .options import Options

DEFAULT_ROOT = "/run/containerd/runc"
DEFAULT_BINARY = "runc"
LOG_FILE = "log.json"
INIT_PID_FILE = "init.pid"

# Seconds. A runtime that is past them is killed; the caller's own deadline comes first when it is nearer.
CREATE_TIMEOUT = 120.0
START_TIMEOUT = 60.0
EXEC_TIMEOUT = 60.0
DELETE_TIMEOUT = 30.0
PAUSE_TIMEOUT = 30.0
UPDATE_TIMEOUT = 30.0

# Bytes: of a runtime's output that are kept, of the end of its log that are read, of either that an error
# carries.
OUTPUT_CAP = 65536
LOG_TAIL = 262144
MESSAGE_MAX = 4096


class Runtime:
    """The argument vectors for one container: binary, --root, --log and --systemd-cgroup are the same for all
    its calls."""

    __slots__ = ("binary", "log", "root", "systemd_cgroup")

    def __init__(self, options: Options, namespace: str, bundle: str) -> None:
        self.binary = options.binary_name or DEFAULT_BINARY
        self.root = os.path.join(options.root or DEFAULT_ROOT, namespace)
        self.log = os.path.join(bundle, LOG_FILE)
        self.systemd_cgroup = options.systemd_cgroup

    def argv(self, *command: str, log: str = "") -> list[str]:
        head = [self.binary, "--root", self.root, "--log", log or self.log, "--log-format", "json"]
        if self.systemd_cgroup:
            head.append("--systemd-cgroup")
        return [*head, *command]

    def create(
        self, id: str, bundle: str, pid_file: str, *, no_pivot: bool = False, no_new_keyring: bool = False, console: str = ""
    ) -> list[str]:
        """console: the path of the socket to send the terminal to, "" without a terminal."""
        flags = ["--bundle", bundle, "--pid-file", pid_file]
        if console:
            flags += ["--console-socket", console]
        if no_pivot:
            flags.append("--no-pivot")
        if no_new_keyring:
            flags.append("--no-new-keyring")
        return self.argv("create", *flags, id)

    def start(self, id: str) -> list[str]:
        return self.argv("start", id)

    def exec(self, id: str, process_file: str, pid_file: str, log: str, console: str = "") -> list[str]:
        """log: each exec has its own, since several run at once and one must not be told another's error."""
        flags = ["--process", process_file, "--detach", "--pid-file", pid_file]
        if console:
            flags += ["--console-socket", console]
        return self.argv("exec", *flags, id, log=log)

    def delete(self, id: str, *, force: bool = False) -> list[str]:
        return self.argv("delete", "--force", id) if force else self.argv("delete", id)

    def pause(self, id: str) -> list[str]:
        return self.argv("pause", id)

    def resume(self, id: str) -> list[str]:
        return self.argv("resume", id)

    def update(self, id: str) -> list[str]:
        return self.argv("update", "--resources=-", id)

    def state_dir(self, id: str) -> str:
        """Where runc, crun and youki keep what they know of a container; gone once it has been deleted."""
        return os.path.join(self.root, id)


def cut(text: str, limit: int = MESSAGE_MAX) -> str:
    """At most `limit` characters and a word on the rest; the end of a runtime's message says more than its
    middle."""
    text = text.strip()
    if len(text) <= limit:
        return text
    head = limit // 4
    return f"{text[:head]} … [{len(text) - limit} characters left out] … {text[head - limit :]}"


def last_error(log: bytes) -> str:
    """The message of the last level=error entry of a runtime's log, "" when there is none. Lines that aren't
    JSON objects (a log cut at its start, a runtime that was killed in mid-line) are passed over."""
    message = ""
    for line in log.splitlines():
        if b"error" not in line:
            continue
        try:
            entry = json_loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("level") == "error" and isinstance(entry.get("msg"), str):
            message = entry["msg"].strip() or message
    return message


def read_log(path: str, since: int = 0) -> tuple[bytes, int]:
    """(at most LOG_TAIL bytes of the log's end that lie beyond `since`, the log's size); for the pool."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b"", since
    try:
        size = os.fstat(fd).st_size
        start = max(since, size - LOG_TAIL)
        return os.pread(fd, max(0, size - start), start), size
    except OSError:
        return b"", since
    finally:
        os.close(fd)


def describe(result: JobResult, log: bytes) -> str:
    """Why a call failed, in the runtime's words if there are any."""
    message = last_error(log) or result.output.decode("utf-8", "replace").strip()
    if message:
        return cut(message)
    if result.signaled:
        return f"the runtime was killed by signal {result.status - 128}"
    return f"the runtime exited with status {result.status}"


def failure(what: str, result: JobResult, log: bytes) -> ShimError:
    """The error to answer a failed call with. what: "OCI runtime create failed"."""
    if result.timed_out:
        return DeadlineExceeded(f"{what}: the runtime did not end in time and was killed")
    return Unknown(f"{what}: {describe(result, log)}")


def is_missing(text: str) -> bool:
    """Whether a failed `delete` means that there is nothing to delete (runc, crun and youki all say so in
    these words)."""
    return "does not exist" in text
