"""The same trials against several shims: python tools/compare.py NAME=PATH[@GENERATION] ...

Ours comes last, by itself. Writes docs/comparison.md. Only trials with real runc that ask for what containerd or its users expect
of any shim are taken; what looks into our own daemon, has our own words or policies in it, or needs the fake runtime, is not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "compare.xml"
DOC = ROOT / "docs" / "comparison.md"
FILES = [f"tests/trials/test_{name}.py" for name in ("c", "c2", "d", "e", "f", "g")]
CHOSEN = "C6 or C10 or C11 or C12 and not in_mid_create or C13 or D1 or D4 or E1 or E2 or E4 or E6 or E7 or F1 or F2 or F3 or G10"
SESSION = "shimcore.testing.leaks.Left"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def run(path: str, generation: str) -> dict[str, tuple[str, str]]:
    """trial -> (outcome, why it failed). path: "" is ours."""
    env = dict(os.environ)
    if path:
        env.update(SHIMCORE_TRIALS_SHIM=path, SHIMCORE_TRIALS_GENERATION=generation)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--timeout", "120", "-k", CHOSEN, f"--junitxml={REPORT}", *FILES]
    subprocess.run(command, cwd=ROOT, env=env)
    found: dict[str, tuple[str, str]] = {}
    for case in xml.parse(REPORT).iter("testcase"):
        name = case.get("name", "").removeprefix("test_")
        outcome, why = found.get(name, (PASSED, ""))
        for child in case:
            if child.tag == "error" and SESSION in (child.get("message") or ""):
                continue  # the guard of the whole session, which speaks at the end of whatever trial is the last
            if child.tag in ("failure", "error"):
                outcome, why = FAILED, why or (child.get("message") or "")
            elif child.tag == "skipped":
                outcome, why = SKIPPED, child.get("message") or ""
        found[name] = (outcome, why)
    return found


def reason(message: str) -> str:
    """What a failure says, on one line and without the paths of its run."""
    text = re.sub(r"(unix://)?/(tmp|run/containerd/s)/[^\s'\"]*", "…", message)
    return " ".join(text.split()).replace("|", "\\|")[:160]


def main() -> int:
    shims = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    columns = [(name, run(*_split(path))) for name, path in shims] + [("ours", run("", "1.6"))]
    names = list(columns[-1][1])
    head = ["| trial | " + " | ".join(name for name, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = []
    for name in names:
        cells = [found.get(name, ("–", ""))[0] for _, found in columns]
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    said = [
        f"| {shim} | {name.replace('_', ' ')} | {reason(why)} |"
        for shim, found in columns
        for name, (outcome, why) in found.items()
        if outcome != PASSED
    ]
    table = "\n".join([*head, *rows])
    text = (ROOT / "tools" / "comparison.head.md").read_text()
    DOC.write_text(f"{text}\n{table}\n\n## What the others said\n\n| shim | trial | |\n|---|---|---|\n" + "\n".join(said) + "\n")
    print(table)
    worse = [name for name in names if columns[-1][1][name][0] == FAILED]
    for name in worse:
        print(f"ours fails {name}: {columns[-1][1][name][1]}")
    return bool(worse)


def _split(path: str) -> tuple[str, str]:
    shim, _, generation = path.partition("@")
    return shim, generation or "1.6"


if __name__ == "__main__":
    sys.exit(main())
