"""-info of our shim beside that of a containerd 2.x's own, alternating in one run.

    python -m benchmarks.info --peer build/matrix/v2.4.2/bin/containerd-shim-runc-v2

containerd 1.6's shim has no -info, so the peer is named; `make matrix` builds one. Both ask the same runtime. Ours is warm (from
its template, with the features kept) or, with --plain, an interpreter for each; what is timed is from exec to the end of output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.lifecycle import timed
from shimcore.rig.compare import p99
from shimcore.rig.templates import end_templates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shim", default="build/shim/containerd-shim-runc-v2-py", type=Path)
    parser.add_argument("--peer", required=True, type=Path)
    parser.add_argument("-n", "--rounds", default=200, type=int)
    parser.add_argument("--plain", action="store_true", help="without the template")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ, "SHIMCORE_TEMPLATE": "0" if args.plain else "1", "SHIMCORE_TEMPLATE_DIR": f"{folder}/t",
            "SHIMCORE_TEMPLATE_TRACE": f"{folder}/trace", "SHIMCORE_FEATURES_DIR": f"{folder}/f",
        }  # fmt: skip
        trace = Path(folder, "trace")

        def run(binary: Path) -> None:
            subprocess.run([binary.resolve(), "-info"], input=b"", capture_output=True, check=True, env=env)

        try:
            run(args.shim)
            while not args.plain and trace.read_text().split()[-1] != "warm":
                run(args.shim)
            before = len(trace.read_text().splitlines()) if trace.exists() else 0
            times: dict[str, list[float]] = {"peer": [], "ours": []}
            for number in range(args.rounds):
                order = [("peer", args.peer), ("ours", args.shim)]
                for name, binary in order if number % 2 else order[::-1]:
                    times[name].append(timed(lambda binary=binary: run(binary)))  # type: ignore[misc]
            cold = [line for line in trace.read_text().splitlines()[before:] if line.strip() != "warm"] if trace.exists() else []
        finally:
            end_templates(f"{folder}/t")
    for name, values in times.items():
        print(f"{name}: median {median(values):.2f} ms, p99 {p99(values):.2f} ms ({len(values)} runs)")
    print(f"ratio of medians: {median(times['ours']) / median(times['peer']):.2f}")
    if cold and not args.plain:
        print(f"{len(cold)} of ours were not warm: {cold[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
