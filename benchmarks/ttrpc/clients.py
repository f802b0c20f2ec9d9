"""ttrpc clients beside each other, each against the same bare C server: ours, Go's and Rust's.

    python -m benchmarks.ttrpc.clients [--rounds N] [--ms N] [--sizes 0,1024,65536] [--outstanding 1,8,64] [--places pinned,free]

One connection. More than one call is outstanding by the means that each library gives for it: Client.start, from one thread, or
threads that each `call`, for ours; asyncio.gather for our asyncio client; goroutines for Go's; threads and tasks for Rust's. Each
call encodes a google.protobuf.BytesValue and decodes the answer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from statistics import median

from google.protobuf.wrappers_pb2 import BytesValue

from ..exit_latency.place import Program
from .peers import GO, OURS, Missing, build_go, compile_c, rust

SERVICE, METHOD = "bench.Echo", "Echo"
Found = tuple[int, float, list[int]]  # calls, seconds, ns of each


def _checked(answer: BytesValue, size: int) -> None:
    if len(answer.value) != size:
        raise AssertionError(f"an answer of {len(answer.value)} bytes where {size} were due")


def pipelined(path: str, size: int, outstanding: int, seconds: float) -> Found:
    from shimcore.ttrpc import Client

    request = BytesValue(value=bytes(size))
    taken: list[int] = []
    with Client(path) as client:
        began = time.perf_counter_ns()
        until = began + int(seconds * 1e9)
        if outstanding == 1:
            while (before := time.perf_counter_ns()) < until:
                _checked(client.call(SERVICE, METHOD, request, BytesValue), size)
                taken.append(time.perf_counter_ns() - before)
        else:
            under_way = deque(
                (time.perf_counter_ns(), client.start(SERVICE, METHOD, request, BytesValue)) for _ in range(outstanding)
            )
            while under_way:
                before, call = under_way.popleft()
                _checked(call.result(), size)
                now = time.perf_counter_ns()
                taken.append(now - before)
                if now < until:
                    under_way.append((now, client.start(SERVICE, METHOD, request, BytesValue)))
    return len(taken), (time.perf_counter_ns() - began) / 1e9, taken


def threaded(path: str, size: int, outstanding: int, seconds: float) -> Found:
    from threading import Thread

    from shimcore.ttrpc import Client

    request = BytesValue(value=bytes(size))
    taken: list[list[int]] = [[] for _ in range(outstanding)]
    with Client(path) as client:
        began = time.perf_counter_ns()
        until = began + int(seconds * 1e9)

        def caller(mine: list[int]) -> None:
            while (before := time.perf_counter_ns()) < until:
                _checked(client.call(SERVICE, METHOD, request, BytesValue), size)
                mine.append(time.perf_counter_ns() - before)

        threads = [Thread(target=caller, args=(mine,)) for mine in taken]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    all = [ns for mine in taken for ns in mine]
    return len(all), (time.perf_counter_ns() - began) / 1e9, all


def asynchronous(path: str, size: int, outstanding: int, seconds: float) -> Found:
    import asyncio

    from shimcore.ttrpc.aio import Client

    request = BytesValue(value=bytes(size))
    taken: list[int] = []

    async def main() -> float:
        async with Client(path) as client:
            began = time.perf_counter_ns()
            until = began + int(seconds * 1e9)

            async def caller() -> None:
                while (before := time.perf_counter_ns()) < until:
                    _checked(await client.call(SERVICE, METHOD, request, BytesValue), size)
                    taken.append(time.perf_counter_ns() - before)

            await asyncio.gather(*(caller() for _ in range(outstanding)))
            return (time.perf_counter_ns() - began) / 1e9

    return len(taken), asyncio.run(main()), taken


KINDS = {"start": pipelined, "threads": threaded, "asyncio": asynchronous}


def load(words: list[str]) -> None:
    """KIND PATH BYTES OUTSTANDING MS, as the peers' `load`."""
    kind, path, size, outstanding, ms = words
    _, seconds, taken = KINDS[kind](path, int(size), int(outstanding), int(ms) / 1e3)
    taken.sort()
    print(len(taken), int(seconds * 1e9), taken[len(taken) // 2], taken[len(taken) * 99 // 100])


def clients() -> tuple[dict[str, list[str]], dict[str, str]]:
    ours = [sys.executable, "-m", "benchmarks.ttrpc.clients", "load"]
    found = {f"{OURS}, {kind}": [*ours, kind] for kind in KINDS}
    missing: dict[str, str] = {}
    try:
        found[GO] = [build_go("head"), "load"]
    except Missing as error:
        missing[GO] = str(error)
    return found | {name: [*command, "load"] for name, command in rust(missing).items()}, missing


def main() -> None:
    if sys.argv[1:2] == ["load"]:
        load(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=int, default=300, help="measured time of one client in one cell of one round")
    parser.add_argument("--sizes", default="0,1024,65536")
    parser.add_argument("--outstanding", default="1,8,64")
    parser.add_argument("--places", default="pinned,free")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="to pin to (default: %(default)s)")
    options = parser.parse_args()
    found, missing = clients()
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    everywhere = os.sched_getaffinity(0)
    print("| place | bytes | outstanding | client | calls/s | p50 µs | p99 µs | calls/s ÷ Go |")
    print("|---" * 8 + "|")
    for where in options.places.split(","):
        os.sched_setaffinity(0, {options.core} if where == "pinned" else everywhere)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = f"{folder}/s"
            server = Program([compile_c("floor"), "--batched", "serve", path])
            try:
                for size in options.sizes.split(","):
                    for outstanding in options.outstanding.split(","):
                        rows: dict[str, list[list[float]]] = {name: [] for name in found}
                        for turn in range(options.rounds):
                            names = list(found)
                            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                                command = [*found[name], path, size, outstanding, str(options.ms)]
                                words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
                                calls, ns, p50, p99 = map(int, words.split())
                                rows[name].append([calls / ns * 1e9, p50 / 1e3, p99 / 1e3])
                        middle = {name: [median(column) for column in zip(*row, strict=True)] for name, row in rows.items()}
                        for name, (rate, p50, p99) in middle.items():
                            ratio = f"{rate / middle[GO][0]:.2f}" if GO in middle else "–"
                            print(f"| {where} | {size} | {outstanding} | {name} | {rate:.0f} | {p50:.1f} | {p99:.1f} | {ratio} |")
            finally:
                server.end()
    os.sched_setaffinity(0, everywhere)


if __name__ == "__main__":
    main()
