"""The documents' code does what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Pages whose programs stand with what they print.
PROGRAMS = ["contract.md", "ttrpc.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```\n\nprints\n\n```\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_program_prints_what_is_said(page: str, tmp_path: Path) -> None:
    programs = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert programs
    for program, printed in programs:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == (printed, "")


# Page -> where its tests are.
@pytest.mark.parametrize(
    ("page", "where"),
    [
        ("ttrpc.md", "test_ttrpc_*.py"),
        ("stdio.md", "test_oci_*.py"),
        ("security.md", "test_template*.py"),
        ("differences.md", "test_*.py"),
        ("upgrade.md", "test_*.py"),
    ],
)
def test_tests_that_are_named_are_there(page: str, where: str) -> None:
    names = re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text())
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob(where))
    assert names
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_each_difference_names_its_test() -> None:
    page = (ROOT / "docs" / "differences.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert rows and [row for row in rows if not re.search(r"\| `test_\w+` \|$", row)] == []


def test_the_sites_pages_are_there() -> None:
    nav = re.findall(r"^ *- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(nav) == len(set(nav)) and set(nav) == pages


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_between_pages(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / "docs" / link).exists()] == []


def test_modules_of_the_api_page_are_there() -> None:
    import importlib

    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?", text, re.MULTILINE)
    assert blocks
    for name, members in blocks:
        module = importlib.import_module(name)
        assert [member for member in members.split(", ") if member and not hasattr(module, member)] == []


def test_the_pictures_are_what_their_script_draws() -> None:
    command = [sys.executable, "-m", "tools.pictures", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_life_that_is_drawn_is_one_that_was_lived() -> None:
    """The order of events in the picture of a container's life is what the page's own program was told."""
    drawn = re.findall(r">(/tasks/[a-z]+)<", (ROOT / "docs" / "contract-life.svg").read_text())
    _, told = BLOCK.findall((ROOT / "docs" / "contract.md").read_text())[0]
    assert drawn == [line.split()[0] for line in told.splitlines() if line.endswith(" init")]
