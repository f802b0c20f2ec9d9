"""What a shim tells of itself when it is asked: the dump, and its metrics.

Asked by SIGUSR1, it writes `shim.dump.json` into the bundle of its first container; asked on the socket `<task socket>.debug`, it
answers HTTP, so curl is enough:

    curl --unix-socket /run/containerd/s/….debug http://shim/dump
    curl --unix-socket /run/containerd/s/….debug http://shim/metrics

The socket is 0600 and read-only, and takes nobody but root and the shim's own user (SO_PEERCRED). Neither answer holds a
container's environment, arguments or output. Until somebody asks, this module is not imported, and all that there is of it is one
listening fd (debug.py). The socket outlives bundle and log, which is when it is needed.
"""

from __future__ import annotations

import os
import sys
import time

from . import _reaper, logger
from .address import DEBUG_SUFFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

    from .debug import Debug

DUMP_FILE = "shim.dump.json"
TIMEOUT = 2.0  # seconds for a peer to ask, and as many for it to take the answer
REQUEST_MAX = 8192

_PHASES = {
    _reaper.RESERVED: "reserved", _reaper.OPENED: "opened", _reaper.BOUND: "bound", _reaper.EXITED: "exited",
    _reaper.TOLD: "told", _reaper.DROPPED: "dropped",
}  # fmt: skip
_STATUSES = {
    _reaper.CREATED: "created", _reaper.RUNNING: "running", _reaper.STOPPED: "stopped", _reaper.PAUSED: "paused",
    _reaper.PAUSING: "pausing",
}  # fmt: skip


# --- what there is to tell


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def memory() -> dict[str, int]:
    """Resident, proportional and private memory in bytes, from smaps_rollup; empty where the kernel has none."""
    found = {"rss": 0, "pss": 0, "private": 0}
    text = _read("/proc/self/smaps_rollup")
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        amount = rest.split()
        if name in ("Rss", "Pss"):
            found[name.lower()] = int(amount[0]) * 1024
        elif name in ("Private_Clean", "Private_Dirty"):
            found["private"] += int(amount[0]) * 1024
    return found if text else {}


def _threads() -> list[dict[str, Any]]:
    """The process's threads as the kernel sees them."""
    found = []
    for tid in sorted(map(int, os.listdir("/proc/self/task"))):
        base = f"/proc/self/task/{tid}/"
        stat = _read(base + "stat").rpartition(")")[2].split()
        found.append({"tid": tid, "state": stat[0] if stat else "?", "waits_in": _read(base + "wchan")})
    return found


def _stacks() -> list[list[str]]:
    """Where every thread that runs Python is, innermost call first."""
    stacks = []
    for frame in sys._current_frames().values():
        stack: list[str] = []
        at: Any = frame
        while at is not None and len(stack) < 64:
            stack.append(f"{at.f_code.co_filename}:{at.f_lineno} {at.f_code.co_name}")
            at = at.f_back
        stacks.append(stack)
    return stacks


def _processes(core: _reaper.Core) -> list[dict[str, Any]]:
    return [
        {
            "container": slot.container_id,
            "exec": slot.exec_id,
            "phase": _PHASES.get(slot.phase, str(slot.phase)),
            "status": _STATUSES.get(slot.status, str(slot.status)),
            "pid": slot.pid,
            **({"exit_status": slot.exit_status, "exited_at_ns": slot.exited_at} if slot.exited_at else {}),
        }
        for slot in core.slots()
    ]


def _exits(core: _reaper.Core) -> list[dict[str, Any]]:
    """The last exits told. Microseconds after it was reaped: recorded, sent, acknowledged; null where that has not happened."""

    def after(then: int, reaped: int) -> float | None:
        return (then - reaped) / 1000 if then else None

    return [
        {
            "container": id, "exec": exec_id, "pid": pid, "reaped_ns": reaped, "recorded_us": after(recorded, reaped),
            "sent_us": after(sent, reaped), "acknowledged_us": after(acknowledged, reaped),
        }
        for id, exec_id, pid, reaped, recorded, sent, acknowledged in core.stamps()
    ]  # fmt: skip


def dump(about: Debug) -> dict[str, Any]:
    """Everything, as what JSON can hold. Times named _ns are of CLOCK_MONOTONIC or, exited_at_ns, since the epoch."""
    from . import __version__

    return {
        "shimcore": __version__,
        "python": sys.version.split()[0],
        "runtime": about.runtime_id,
        "namespace": about.namespace,
        "id": about.id,
        "pid": os.getpid(),
        "bundle": about.bundle,
        "socket": about.socket,
        "started": about.started,
        "now": time.time(),
        "now_ns": time.monotonic_ns(),
        "processes": _processes(about.core),
        "exits": _exits(about.core),
        "core": about.core.stats(),
        "rpc": about.server.stats(),
        "log_dropped": logger.get_logger().dropped,
        "memory": memory(),
        "fds": len(os.listdir("/proc/self/fd")) - 1,
        "threads": _threads(),
        "stacks": _stacks(),
        "task": about.task.describe(),
    }


def dump_json(about: Debug) -> bytes:
    from json import dumps

    return dumps(dump(about), indent=1, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace") + b"\n"


# --- metrics: OpenMetrics text, https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# name, what stats() calls it, help
_CORE_COUNTERS = (
    ("exits", "told", "Exits told to containerd."),
    ("exits_recorded", "recorded", "Exits written to a ledger before they were told."),
    ("exits_unrecorded", "unrecorded", "Exits told without a record: the disk was full, slow or gone."),
    ("exits_overdue", "overdue", "Execs still alive when the exit of their container had to be told."),
    ("statuses_stolen", "stolen", "Exit statuses that somebody else's wait took, told as 255."),
    ("orphans_reaped", "orphans", "Processes reaped that were nobody's task."),
    ("ooms", "ooms", "OOM kills told."),
    ("runtime_calls", "jobs", "Calls of the OCI runtime."),
    ("runtime_calls_timed_out", "jobs_timed_out", "Calls of the OCI runtime killed at their deadline."),
    ("events", "events", "Events queued for containerd."),
    ("events_acknowledged", "acknowledged", "Events that containerd has taken."),
    ("events_rejected", "rejected", "Events that containerd has refused for good."),
    ("events_dropped", "dropped", "Events dropped because memory and the spill file were full."),
    ("events_spilled", "spilled", "Events that had to wait in the spill file."),
    ("events_connections", "connections", "Connections made to containerd's events socket."),
)
_CORE_GAUGES = (
    ("events_queued", "queued", "Events waiting to be sent."),
    ("events_in_flight", "in_flight", "Events sent and not acknowledged yet."),
    ("processes", "slots", "Processes in the exit table, dead ones that were not deleted included."),
)
_RPC_COUNTERS = (
    ("rpcs", "calls", "Calls taken."),
    ("rpc_errors", "failures", "Calls answered with an error."),
    ("rpc_stand_ins", "stood_in", "Times that State and Wait were answered while Python kept the RPC thread away."),
)
_RPC_GAUGES = (
    ("rpcs_in_flight", "in_flight", "Calls being handled."),
    ("rpc_connections", "connections", "Connections of clients."),
)
_QUANTILES = (0.5, 0.9, 0.99, 1.0)


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _quantiles(values: list[int]) -> list[tuple[float, float]]:
    values.sort()
    return [(q, values[min(len(values) - 1, int(q * len(values)))] / 1e9) for q in _QUANTILES] if values else []


def metrics(about: Debug) -> bytes:
    """The counters, and the latency of the last exits (at most 256) from reaped to sent and to acknowledged, in seconds."""
    core, rpc = about.core.stats(), about.server.stats()
    labels = f'namespace="{_label(about.namespace)}",id="{_label(about.id)}",runtime="{_label(about.runtime_id)}"'
    out: list[str] = []

    def family(name: str, kind: str, help: str) -> str:
        full = "shimcore_" + name
        out.append(f"# TYPE {full} {kind}")
        out.append(f"# HELP {full} {help}")
        return full

    for stats, counters, gauges in ((core, _CORE_COUNTERS, _CORE_GAUGES), (rpc, _RPC_COUNTERS, _RPC_GAUGES)):
        for name, key, help in counters:
            out.append(f"{family(name, 'counter', help)}_total{{{labels}}} {stats[key]}")
        for name, key, help in gauges:
            out.append(f"{family(name, 'gauge', help)}{{{labels}}} {stats[key]}")
    name = family("log_lines_dropped", "counter", "Log lines that nobody read.")
    out.append(f"{name}_total{{{labels}}} {logger.get_logger().dropped}")
    for name, (help, value) in about.task.counters().items():
        out.append(f"{family(name, 'counter', help)}_total{{{labels}}} {value}")
    name = family("start_time_seconds", "gauge", "When the shim started, since the epoch.")
    out.append(f"{name}{{{labels}}} {about.started:.3f}")
    name = family("memory_bytes", "gauge", "Memory of the shim's process.")
    out.extend(f'{name}{{{labels},kind="{kind}"}} {amount}' for kind, amount in memory().items())
    name = family("exit_latency_seconds", "gauge", "Of the last exits: from reaped to sent, and to acknowledged by containerd.")
    stamps = about.core.stamps()
    for until, column in (("sent", 5), ("acknowledged", 6)):
        taken = [int(stamp[column]) - stamp[3] for stamp in stamps if stamp[column]]
        out.extend(f'{name}{{{labels},until="{until}",quantile="{q:g}"}} {value:.9f}' for q, value in _quantiles(taken))
    return "\n".join([*out, "# EOF", ""]).encode("utf-8", "backslashreplace")


# --- being asked


def write_dump(about: Debug) -> None:
    """The dump into the bundle, in one step; logged either way. For the pool."""
    from .util import write_str_to_file

    path = os.path.join(about.bundle, DUMP_FILE)
    try:
        write_str_to_file(path, dump_json(about).decode())
    except OSError as error:
        logger.error("state not dumped", path=path, error=error.strerror, instead=about.socket + DEBUG_SUFFIX)
    else:
        logger.info("state dumped", path=path)


def _reply(status: str, kind: str, body: bytes, head: bool = False) -> bytes:
    lines = f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lines.encode() + (b"" if head else body)


def respond(about: Debug, request: bytes) -> bytes:
    """The answer to one request, whole with its head."""
    words = request.split(b"\r\n", 1)[0].decode("latin-1").split()
    plain = "text/plain; charset=utf-8"
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _reply("400 Bad Request", plain, b"ask in HTTP: GET /dump or GET /metrics\n")
    method, path = words[0], words[1].partition("?")[0]
    if method not in ("GET", "HEAD"):
        return _reply("405 Method Not Allowed", plain, b"this socket is for reading: GET /dump or GET /metrics\n")
    if path == "/dump":
        return _reply("200 OK", "application/json", dump_json(about), method == "HEAD")
    if path == "/metrics":
        return _reply("200 OK", CONTENT_TYPE, metrics(about), method == "HEAD")
    return _reply("404 Not Found", plain, b"there are /dump, /metrics, /events and /log\n", method == "HEAD")


def _serve_one(about: Debug, peer: _socket.socket) -> None:
    import _socket
    from struct import unpack

    pid, uid, _ = unpack("3i", peer.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        logger.warn("refused to answer on the debug socket", pid=pid, uid=uid)
        return
    peer.settimeout(TIMEOUT)
    request = b""
    while b"\r\n\r\n" not in request and len(request) < REQUEST_MAX:
        piece = peer.recv(REQUEST_MAX - len(request))
        if not piece:
            break
        request += piece
    from . import follow

    if follow.wanted(request):
        follow.begin(about, peer, request)
    else:
        peer.sendall(respond(about, request))


def answer(about: Debug, listener: _socket.socket) -> None:
    """Answer everybody who waits on the listener, which is non-blocking, then wait for the next. For the pool."""
    import _socket

    while True:
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            break
        except OSError as error:
            logger.warn("the debug socket does not accept", error=error.strerror)
            time.sleep(0.2)  # no fds left, for one: not at once again
            break
        peer = _socket.socket(fileno=fd)
        try:
            _serve_one(about, peer)
        except OSError as error:  # it left, or was too slow
            logger.debug("no answer on the debug socket", error=str(error))
        except Exception as error:
            logger.error("the dump failed", error=repr(error))
        finally:
            peer.close()
    try:
        about.core.ask_fd(listener.fileno())
    except (OSError, ValueError):  # closed meanwhile: the shim ends
        pass
