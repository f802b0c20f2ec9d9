"""The containerd suite under several containerds: `make matrix`. Writes docs/matrix.md.

Debian's containerd is taken as it is installed; a newer one is built from its Go module, below build/matrix. "stock" is the
shim that comes with that containerd, "ours" is containerd-shim-runc-v2-py. `make cri` runs the tests of pods alone (--cri), and
writes nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from gobuild import BUILD, CRICTL, ROOT, build, crictl

# What the parameter of a test says: whose shim, whether the shim is the pod's sandbox, and whether stdio are streams, too.
SIDES = ("stock", "ours")
SANDBOX = ("ours-sandbox",)
STREAMING = ("ours-streaming",)

# version, and test -> side -> "passed", "failed" or "skipped"
Column = tuple[str, dict[str, dict[str, str]]]


def run(binaries: Path | None, tests: str) -> Column:
    """The suite, or a file of it, under one containerd."""
    path = os.environ["PATH"] if binaries is None else f"{binaries}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, env=env, check=True).stdout
    print(said, flush=True)
    report = BUILD / "report.xml"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", tests, f"--junitxml={report}"], cwd=ROOT, env=env)
    found: dict[str, dict[str, str]] = {}
    for case in xml.parse(report).iter("testcase"):
        name, _, side = case.get("name", "").rstrip("]").partition("[")
        if side not in SIDES + SANDBOX + STREAMING:
            continue
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "–" if "skipped" in kinds else "passed"
        results = found.setdefault(name, {})
        # A test whose teardown fails is in the report twice.
        results[side] = "failed" if "failed" in (result, results.get(side)) else result
    return re.sub(r"[~+].*|^v", "", said.split()[2]), found


def table(columns: list[Column], tests: list[str], sides: tuple[str, ...], prefix: str = "test_") -> str:
    head = [f"{version}, {side.partition('-')[0]}" for version, _ in columns for side in sides]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in tests:
        cells = [found.get(name, {}).get(side, "–") for _, found in columns for side in sides]
        lines.append(f"| {name.removeprefix(prefix).replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    only_cri = "--cri" in sys.argv
    crictl()
    versions = [build(one) for one in sys.argv[1:] if one != "--cri"]
    tests = "tests/containerd/test_cri.py" if only_cri else "tests/containerd"
    columns = [run(binaries, tests) for binaries in (None, *versions)]
    names = list(dict.fromkeys(name for _, found in columns for name in found))
    pods = [name for name in names if name.startswith("test_cri_")]
    newer = [one for one in columns if any(results.get(SANDBOX[0], "–") != "–" for results in one[1].values())]
    plain = table(columns, [name for name in names if name not in pods], SIDES)
    cri = table(columns, pods, SIDES, "test_cri_")
    sandbox = table(newer, pods, SANDBOX, "test_cri_")
    streaming = table(newer, pods, STREAMING, "test_cri_")
    if only_cri:
        print(cri, "\nThe shim as the sandbox:\n", sandbox, "\nStreams for stdio:\n", streaming, sep="\n")
    else:
        text = PAGE.format(plain=plain, cri=cri, sandbox=sandbox, streaming=streaming, crictl=CRICTL)
        (ROOT / "docs" / "matrix.md").write_text(text)
        print(text)
    ours = [results.get(side) for _, found in columns for results in found.values() for side in ("ours", *SANDBOX, *STREAMING)]
    return int("failed" in ours)


PAGE = """# Under which containerd

Made by `make matrix`: the suite in `tests/containerd`, under Debian's containerd and under newer ones built from their Go
module, with the shim that comes with each (stock) and with ours. A cell says what one run has seen.

{plain}

## Pods through CRI

The same, asked for by crictl {crictl} through containerd's CRI plugin, as a kubelet does (`make cri` alone). The
machine's cgroups are version 1 with a version 2 mount beside it.

{cri}

## The shim as the sandbox

With `sandboxer = "shim"` of containerd 2: the pod is made through the shim's Sandbox service, and has no pause container.

{sandbox}

## Streams for stdio

The same with `io_type = "streaming"`: stdin, stdout and stderr of containers and execs come over the shim's Streaming service
([stdio.md](stdio.md)).

{streaming}
"""

if __name__ == "__main__":
    sys.exit(main())
