"""Instructions of one call in the server, by whose code they are; the kernel's are not counted. Needs valgrind.

    python -m benchmarks.ttrpc.instructions [--calls N] [--same]

Two runs under callgrind, one with N calls more: what they differ by, divided by N.
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf.wrappers_pb2 import BytesValue

from shimcore.ttrpc import Client

FEW = 200
_FUNCTION = re.compile(r"^\s*([\d,]+) \([ \d.]+%\)\s+.* \[(.+)\]$")
_TOTAL = re.compile(r"^\s*([\d,]+) \(100\.0%\)\s+PROGRAM TOTALS", re.MULTILINE)


def counted(calls: int, folder: Path, same: bool) -> collections.Counter[str]:
    """Instructions of a server that was asked so often, by object file."""
    path, out = folder / "s", folder / f"callgrind.{calls}"
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, "-m", "benchmarks.ttrpc.ours"]
    command += ["--same"] * same + ["serve", str(path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdin and server.stdout
    server.stdout.readline()
    with Client(str(path)) as client:
        for _ in range(calls):
            client.call("bench.Echo", "Echo", BytesValue(), BytesValue, timeout=60)
    server.stdin.close()
    server.wait(60)
    path.unlink()
    command = ["callgrind_annotate", "--threshold=100", "--inclusive=no", "--tree=none", "--auto=no", str(out)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    by_file: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            by_file[Path(found[2]).name.partition(".")[0]] += int(found[1].replace(",", ""))
    total = _TOTAL.search(text)
    assert total
    by_file["all"] = int(total[1].replace(",", ""))
    return by_file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ttrpc.instructions", description=__doc__, add_help=True)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--same", action="store_true", help="the handler answers with the message that it was asked with")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("there is no valgrind (Debian's package of that name)")
    with tempfile.TemporaryDirectory() as folder:
        few, many = (counted(calls, Path(folder), options.same) for calls in (FEW, FEW + options.calls))
    print("| whose code | instructions of a call |\n|---|---|")
    for name, count in many.most_common():
        if (each := (count - few[name]) / options.calls) >= 1:
            print(f"| {name} | {each:.0f} |")


if __name__ == "__main__":
    main()
