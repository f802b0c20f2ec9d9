"""Draw the pictures of the documents: python -m tools.pictures [--check]"""

from __future__ import annotations

import sys
from pathlib import Path

from .contract import pictures

DOCS = Path(__file__).resolve().parents[2] / "docs"

others = [name for name, text in pictures().items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
if sys.argv[1:] == ["--check"]:
    sys.exit(f"not as tools/pictures draws them: {', '.join(others)}" if others else 0)
for name in others:
    (DOCS / name).write_text(pictures()[name])
    print(f"docs/{name}")
