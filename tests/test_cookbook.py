"""docs/cookbook.md: its files, written into a folder as they stand, and its tests run there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = re.compile(r'^```python title="(\S+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def test_each_recipe(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "cookbook.md").read_text()
    files = dict(FILE.findall(text))
    assert len(files) == text.count("\n```python title=") and "conftest.py" in files
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["-p", "no:cacheprovider", "--color=no", "-rs", "--rootdir", str(tmp_path), "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    tests = sum(content.count("\ndef test_") for content in files.values())
    assert done.returncode == 0 and re.search(rf"^{tests} passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
