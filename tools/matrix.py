"""The containerd suite under several containerds: `make matrix`. Writes docs/matrix.md.

Debian's containerd is taken as it is installed; a newer one is built from its Go module, below build/matrix. "stock" is the
shim that comes with that containerd, "ours" is containerd-shim-runc-v2-py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from gobuild import BUILD, ROOT, build


def run(binaries: Path | None) -> tuple[str, dict[str, dict[str, str]]]:
    """(version, test -> side -> "passed", "failed" or "skipped") of the suite under one containerd."""
    path = os.environ["PATH"] if binaries is None else f"{binaries}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, env=env, check=True).stdout
    report = BUILD / "report.xml"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/containerd", f"--junitxml={report}"], cwd=ROOT, env=env)
    found: dict[str, dict[str, str]] = {}
    for case in xml.parse(report).iter("testcase"):
        name, _, side = case.get("name", "").rstrip("]").partition("[")
        if side not in ("stock", "ours"):
            continue
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(name, {})[side] = result
    return re.sub(r"[~+].*|^v", "", said.split()[2]), found


def main() -> int:
    columns = [run(None), *(run(build(version)) for version in sys.argv[1:])]
    head = [f"{version}, {side}" for version, _ in columns for side in ("stock", "ours")]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in columns[0][1]:
        cells = [found.get(name, {}).get(side, "–") for _, found in columns for side in ("stock", "ours")]
        lines.append(f"| {name.removeprefix('test_').replace('_', ' ')} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    (ROOT / "docs" / "matrix.md").write_text(f"""# Under which containerd

Made by `make matrix`: the suite in `tests/containerd`, under Debian's containerd and under newer ones built from their Go
module, with the shim that comes with each (stock) and with ours. A cell says what one run has seen.

{table}
""")
    print(table)
    return any(result == "failed" for _, found in columns for sides in found.values() if (result := sides.get("ours")))


if __name__ == "__main__":
    sys.exit(main())
