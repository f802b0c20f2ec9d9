"""stats: what each container of each shim uses, by the Task API's Stats over the shim's own socket."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import Closed, DeadlineExceeded, NotFound, ShimError
from . import nodes
from .out import fail, json_option, living, namespace_option, note_of_root, print_json, print_line, table

if TYPE_CHECKING:
    from ..ttrpc import Client

TIMEOUT = 2.0  # seconds: what containerd allows Stats
_AT_ONCE = 8
_UNLIMITED = 1 << 62  # cgroup v1 says "no limit" with the largest number of pages


@dataclass
class Usage:
    """One container at one time.

    at: monotonic ns. cpu_ns: used since its beginning; cpu_percent: of one core, since the sample before, None without one.
    memory: bytes without the page cache that is not in use. Limits: None where there is none.
    error: why there are no figures, else "".
    """

    namespace: str
    container: str
    shim: str
    shim_pid: int
    at: int = 0
    cpu_ns: int = 0
    cpu_percent: float | None = None
    memory: int = 0
    memory_limit: int | None = None
    pids: int = 0
    pids_limit: int | None = None
    error: str = ""


def _limit(value: int) -> int | None:
    return value if 0 < value < _UNLIMITED else None


def _fill(usage: Usage, url: str, value: bytes) -> None:
    """From io.containerd.cgroups.v1.Metrics or v2.Metrics. Raises DecodeError."""
    from ..protos import metrics_v1_pb2, metrics_v2_pb2

    kind = url.rpartition("/")[2]
    if kind == "io.containerd.cgroups.v1.Metrics":
        v1 = metrics_v1_pb2.Metrics.FromString(value)
        usage.cpu_ns = v1.cpu.usage.total
        usage.memory = max(v1.memory.usage.usage - v1.memory.total_inactive_file, 0)
        usage.memory_limit = _limit(v1.memory.usage.limit)
        usage.pids, usage.pids_limit = v1.pids.current, _limit(v1.pids.limit)
    elif kind == "io.containerd.cgroups.v2.Metrics":
        v2 = metrics_v2_pb2.Metrics.FromString(value)
        usage.cpu_ns = v2.cpu.usage_usec * 1000
        usage.memory = max(v2.memory.usage - v2.memory.inactive_file, 0)
        usage.memory_limit = _limit(v2.memory.usage_limit)
        usage.pids, usage.pids_limit = v2.pids.current, _limit(v2.pids.limit)
    else:
        usage.error = f"figures of a kind that is not known here: {kind or 'none'}"


def _stats(client: Client, container: str) -> Any:
    """The answer's Any, of version 2 or 3 of the Task API: newer shims have the latter alone. Raises ShimError."""
    from ..rig.task import Task

    try:
        return Task(client, container, timeout=TIMEOUT).stats()
    except (NotFound, DeadlineExceeded, Closed):
        raise
    except ShimError:  # Unimplemented says ttrpc of a service that is not there; Rust's says InvalidArgument
        return Task(client, container, version=3, timeout=TIMEOUT).stats()


def _ask(shim: nodes.Shim) -> list[Usage]:
    """All containers of one shim, over one connection."""
    from google.protobuf.message import DecodeError

    from ..ttrpc import Client

    found = [Usage(shim.namespace, id, shim.name, shim.pid) for id in nodes.containers(shim)]
    if not shim.socket:
        for usage in found:
            usage.error = "the shim listens on no socket"
        return found
    try:
        client = Client(shim.socket if shim.socket.startswith("@") else f"unix://{shim.socket}", namespace=shim.namespace)
    except (ShimError, OSError) as error:
        for usage in found:
            usage.error = f"the shim can't be reached: {error}"
        return found
    with client:
        for usage in found:
            try:
                packed = _stats(client, usage.container)
                usage.at = time.monotonic_ns()
                _fill(usage, packed.type_url, packed.value)
            except (ShimError, DecodeError) as error:
                usage.error = str(error) or type(error).__name__
    return found


def sample(shims: Iterable[nodes.Shim], before: Iterable[Usage] = ()) -> list[Usage]:
    """What is used now. before: an earlier sample, for cpu_percent."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [usage for usages in pool.map(_ask, shims) for usage in usages]
    earlier = {(one.shim_pid, one.container): one for one in before if not one.error}
    for usage in found:
        old = earlier.get((usage.shim_pid, usage.container))
        if old and not usage.error and usage.at > old.at:
            usage.cpu_percent = 100 * max(usage.cpu_ns - old.cpu_ns, 0) / (usage.at - old.at)
    return found


def size(amount: int | None) -> str:
    """Bytes in the unit that fits: 512B, 1.5M, 2.0G."""
    if amount is None:
        return "-"
    value, unit = float(amount), "B"
    for unit in "BKMGT":
        if value < 1024 or unit == "T":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if unit == "B" else f"{value:.1f}{unit}"


def _show(usages: list[Usage]) -> None:
    rows = [["NAMESPACE", "CONTAINER", "SHIM PID", "CPU%", "CPU TIME", "MEMORY", "LIMIT", "PIDS", "LIMIT", ""]]
    for one in usages:
        row = [one.namespace, one.container, str(one.shim_pid)]
        if one.error:
            row += ["-", "-", "-", "-", "-", "-", one.error]
        else:
            row += ["-" if one.cpu_percent is None else f"{one.cpu_percent:.1f}", f"{one.cpu_ns / 1e9:.2f}s", size(one.memory)]
            row += [size(one.memory_limit), str(one.pids), str(one.pids_limit or "-"), ""]
        rows.append(row)
    table(rows, right=range(2, 9))


@click.command(short_help="What each container uses, live.")
@json_option
@namespace_option
@click.option("--once", is_flag=True, help="One table, after one interval, which CPU% is of.")
@click.option("-n", "--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="SECONDS")
@click.argument("shims", nargs=-1, metavar="[SHIM]...", shell_complete=living)
def stats(shims: tuple[str, ...], namespace: str, once: bool, interval: float, as_json: bool) -> None:
    """CPU, memory and processes of every container of every shim, or of those of each SHIM (container id, or pid).

    Until Ctrl-C, or once. CPU% is of one core. Memory is without the page cache that nothing uses. With --json a line for each
    time.
    """

    def chosen() -> list[nodes.Shim]:
        all_of_them = nodes.shims(namespace)
        return [nodes.choose(name, all_of_them) for name in shims] if shims else all_of_them

    note_of_root("other users' shims can't be asked")
    try:
        usages = sample(chosen())
        while True:
            time.sleep(interval)  # a sample's distance from the one before is measured
            usages = sample(chosen(), usages)
            if as_json:
                (print_json if once else print_line)([asdict(usage) for usage in usages])
            else:
                if not once and sys.stdout.isatty():
                    click.echo("\x1b[H\x1b[J", nl=False)
                _show(usages)
            if once:
                return
    except nodes.NoAnswer as error:
        fail(error)
    except KeyboardInterrupt:
        return
