"""What asyncio costs a shim: one of shimcore.aio beside a plain one that does the same, alternating in one run.

    python -m benchmarks.aio

Timed are `start` (warm and plain, from exec to the end of output), and calls that do nothing, one after the other, answered by
each kind of method; weighed are the daemons afterwards.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from google.protobuf.empty_pb2 import Empty

from benchmarks.lifecycle import timed
from shimcore.install import install
from shimcore.protos import task_pb2
from shimcore.rig.compare import p99
from shimcore.rig.templates import end_templates
from shimcore.ttrpc import Client

TASK = "containerd.task.v2.Task"
PLAIN, ASYNCIO = "plain", "asyncio"
SHIM = """
from google.protobuf.empty_pb2 import Empty
from {package} import Shim, Task
{imports}
class Service(Task):
    native = True
    def __init__(self, shim):
        self.shim = shim
    async def pause(self, request, context):
        return Empty()
    def resume(self, request, context):
        return Empty()
    def shutdown(self, request, context):
        self.shim.exit.signal()
        return Empty()
class Mine(Shim):
    def create_task_service(self, publisher):
        return Service(self)
"""
MODULES = {
    PLAIN: SHIM.format(package="shimcore", imports=""),
    ASYNCIO: SHIM.format(package="shimcore.aio", imports="import asyncio"),
}
KINDS = [
    ("plain `def`, on the pool", PLAIN, "Resume"),
    ("`async def`, of shimcore.jobs", PLAIN, "Pause"),
    ("`async def`, of asyncio", ASYNCIO, "Pause"),
]


class Side:
    """One shim's binary, and its daemon."""

    def __init__(self, folder: Path, name: str) -> None:
        (folder / f"bench_{name}.py").write_text(MODULES[name])
        self.bundle = folder / name
        self.bundle.mkdir()
        self.binary = install(str(folder / "bin"), runtime_id=f"io.containerd.bench{name}.v1", shim=f"bench_{name}:Mine")
        words = ["-namespace", f"bench-{os.getpid()}-{name}", "-address", str(folder / "containerd.sock"), "-id", "c1"]
        self.command = [self.binary, *words, "-publish-binary", "/bin/true", "start"]
        self.address = ""

    def start(self, env: dict[str, str]) -> None:
        environment = {**os.environ, **env, "TTRPC_ADDRESS": "/none"}
        done = subprocess.run(self.command, cwd=self.bundle, env=environment, input=b"", capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        self.address = done.stdout.decode()

    def pid(self, client: Client) -> int:
        return client.call(TASK, "Connect", task_pb2.ConnectRequest(), task_pb2.ConnectResponse).shim_pid

    def stop(self) -> None:
        with Client(self.address) as client:
            pidfd = os.pidfd_open(self.pid(client))
            client.call(TASK, "Shutdown", task_pb2.ShutdownRequest(id="c1"))
        select.select([pidfd], [], [], 60)
        os.close(pidfd)


def starts(sides: dict[str, Side], env: dict[str, str], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            side = sides[name]
            times[name].append(timed(lambda side=side: side.start(env)))  # type: ignore[misc]
            side.stop()
    return times


def weight(pid: int) -> tuple[float, float, int]:
    """PSS and private memory in MiB, and threads."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return sizes["Pss"] / 1024, private / 1024, len(os.listdir(f"/proc/{pid}/task"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default=40, type=int, help="starts of each, warm and plain")
    parser.add_argument("--calls", default=5000, type=int, help="of each kind")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, name)
        sides = {each: Side(folder, each) for each in MODULES}
        trace = folder / "trace"
        warm = {"SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": f"{name}/t", "SHIMCORE_TEMPLATE_TRACE": str(trace)}
        try:
            for side in sides.values():
                while True:
                    side.start(warm)
                    side.stop()
                    if trace.read_text().split("\n")[-2].strip() == "warm":
                        break
                    time.sleep(0.1)
            for how, env in (("warm", warm), ("plain", {"SHIMCORE_TEMPLATE": "0"})):
                times = starts(sides, env, args.rounds)
                for each, values in times.items():
                    print(f"start, {how}, {each}: median {median(values):.2f} ms, p99 {p99(values):.2f} ms ({len(values)} runs)")
                print(f"  ratio of medians: {median(times[ASYNCIO]) / median(times[PLAIN]):.2f}")
            for side in sides.values():
                side.start({"SHIMCORE_TEMPLATE": "0"})
            clients = {each: Client(side.address) for each, side in sides.items()}
            calls: dict[str, list[float]] = {kind: [] for kind, _, _ in KINDS}
            for number in range(args.calls):
                for kind, each, method in KINDS if number % 2 else KINDS[::-1]:
                    client = clients[each]
                    began = time.perf_counter()
                    client.call(TASK, method, Empty(), Empty)
                    calls[kind].append(1e6 * (time.perf_counter() - began))
            base = median(calls[KINDS[0][0]])
            for kind, values in calls.items():
                middle = median(values)
                print(f"call, {kind}: median {middle:.0f} µs, p99 {p99(values):.0f} µs, {middle / base:.2f} of the pool's")
            for each, side in sides.items():
                pss, private, threads = weight(side.pid(clients[each]))
                print(f"daemon, {each}: PSS {pss:.1f} MiB, private {private:.1f} MiB, {threads} threads")
            for each, side in sides.items():
                clients[each].close()
                side.stop()
        finally:
            end_templates(f"{name}/t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
