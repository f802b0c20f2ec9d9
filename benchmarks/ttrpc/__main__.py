"""ttrpc servers beside each other under one load generator: ours with an inline Python handler, Go's, Rust's, and a bare C loop.

    python -m benchmarks.ttrpc [--rounds N] [--ms N] [--sizes 0,1024,65536] [--outstanding 1,8,64] [--places pinned,free]

Every server echoes a google.protobuf.BytesValue, which it decodes and encodes. The load is a closed loop over one connection.
The servers take turns in each cell of each round; a figure is the median of the rounds. pinned: server and load share a core.
CPU is the server's, all threads counted. The floor's plain form sends each answer by itself, the batched one those of a receive
at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from ..exit_latency.place import ROOT, Program
from .peers import BATCHED, BUILD, FLOOR, GO, compile_c, servers
from .picture import picture

Cell = tuple[str, int, int]  # place, bytes, outstanding
Row = dict[str, float]  # rate (rpc/s), p50, p99, cpu (µs)


def measure(load: str, path: str, pid: int, size: int, outstanding: int, ms: int) -> Row:
    command = [load, path, str(pid), str(size), str(outstanding), str(max(20, ms // 5)), str(ms)]
    words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.split()
    calls, ns, p50, p99, cpu, _ = map(int, words)
    return {"rate": calls / ns * 1e9, "p50": p50 / 1e3, "p99": p99 / 1e3, "cpu": cpu / calls / 1e3}


def table(results: dict[Cell, dict[str, Row]]) -> str:
    lines = ["| place | bytes | outstanding | server | rpc/s | p50 µs | p99 µs | CPU µs/rpc | rpc/s ÷ Go | ÷ floor | ÷ batched |"]
    lines.append("|---" * 11 + "|")
    for (where, size, outstanding), rows in results.items():
        for name, row in rows.items():
            ratios = [f"{row['rate'] / rows[peer]['rate']:.2f}" if peer in rows else "–" for peer in (GO, FLOOR, BATCHED)]
            cells = [where, str(size), str(outstanding), name, f"{row['rate']:.0f}", f"{row['p50']:.1f}", f"{row['p99']:.1f}",
                     f"{row['cpu']:.2f}", *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=int, default=150, help="measured time of one server in one cell of one round")
    parser.add_argument("--sizes", default="0,1024,65536")
    parser.add_argument("--outstanding", default="1,8,64")
    parser.add_argument("--places", default="pinned,free")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="to pin to (default: %(default)s)")
    parser.add_argument("--json", default=str(ROOT / "build" / "ttrpc-bench.json"))
    options = parser.parse_args()
    load = compile_c("load")
    found, missing = servers()
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    everywhere = os.sched_getaffinity(0)
    samples: dict[Cell, dict[str, list[Row]]] = {}
    for where in options.places.split(","):
        # Children inherit it, and Go counts its cores at the start.
        os.sched_setaffinity(0, {options.core} if where == "pinned" else everywhere)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            running: dict[str, tuple[Program, str]] = {}
            try:
                for number, (name, command) in enumerate(found.items()):
                    path = f"{folder}/{number}"
                    running[name] = Program([*command, "serve", path]), path
                for turn in range(options.rounds):
                    names = list(running)[turn % len(running):] + list(running)[: turn % len(running)]
                    for size in map(int, options.sizes.split(",")):
                        for outstanding in map(int, options.outstanding.split(",")):
                            for name in names:
                                program, path = running[name]
                                row = measure(load, path, program.child.pid, size, outstanding, options.ms)
                                cell = samples.setdefault((where, size, outstanding), {other: [] for other in running})
                                cell[name].append(row)
            finally:
                for program, _ in running.values():
                    program.end()
    os.sched_setaffinity(0, everywhere)
    results = {
        cell: {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in by_name.items()}
        for cell, by_name in samples.items()
    }
    print(table(results))
    BUILD.mkdir(parents=True, exist_ok=True)
    for where in options.places.split(","):
        here = {cell[1:]: rows for cell, rows in results.items() if cell[0] == where}
        rates = {cell: {name: row["rate"] for name, row in rows.items()} for cell, rows in here.items()}
        Path(options.json).with_name(f"ttrpc-bench-{where}.svg").write_text(picture(rates, where))
    flat = [{"place": p, "bytes": s, "outstanding": k, "servers": samples[p, s, k]} for p, s, k in samples]
    Path(options.json).write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
