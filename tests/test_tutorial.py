"""docs/tutorial.md, played as it stands: each command, in a shell of its own folder, and what the page says that it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import HANG, Reader, blocks, parts
from tests.stand_ins import Tools

PAGE = "docs/tutorial.md"


def write(folder: Path, text: str) -> None:
    """A method takes the place of the one that is there; a whole file that of the tests."""
    if text.startswith("    def edit"):
        path = folder / "quiet_shim.py"
        method = re.compile(r"    def edit\(.*?\n\n(?=    async def)", re.DOTALL)
        new, found = method.subn(lambda _: text + "\n", path.read_text())
        assert found == 1
        path.write_text(new)
    else:
        (folder / "tests" / "test_shim.py").write_text(text)


@pytest.mark.timeout(HANG)
def test_the_tutorial(tmp_path: Path, rootfs: Path) -> None:
    env = {**Tools(tmp_path).env, "PYTEST_ADDOPTS": "-p no:cacheprovider --color=no"}
    typed = 0
    with Reader(tmp_path, env, changes={r"^shimcore run ": f"shimcore run --rootfs {rootfs} "}) as reader:
        for block in blocks(PAGE):
            if block.language == "python":
                write(tmp_path / "quiet", block.text)
                continue
            assert block.language == "console", str(block)
            if not block.text.startswith("# "):  # root's; see below
                typed += len(reader.play(block.text))
    assert typed == 12


def test_what_root_types_is_there(tmp_path: Path) -> None:
    """The commands for containerd's machine: that of ours is understood, and ctr knows its flags."""
    lines = [line for block in blocks(PAGE) if block.text.startswith("# ") for line, _ in parts(block.text)]
    assert [line.split()[0] for line in lines] == ["shimcore", "ctr"]
    ours = [sys.executable, "-m", "shimcore.cli", "install", "--help"]
    helped = subprocess.run(ours, capture_output=True, text=True, check=True)
    known = subprocess.run(["ctr", "run", "--help"], capture_output=True, text=True, check=True)
    for line, said in zip(lines, (helped.stdout, known.stdout), strict=True):
        for flag in re.findall(r" (--[a-z-]+)", line.split("'")[0]):
            assert flag in said, flag
