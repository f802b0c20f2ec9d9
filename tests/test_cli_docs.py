"""docs/cli.md and the command itself say the same."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from shimcore.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text()
COMMANDS = sorted(main.commands)
# What else begins with the program's name: a package, a folder, an option.
OTHERS = {"shimcore"}


def section(command: str) -> str:
    """What stands under the command's heading."""
    match = re.search(rf"^##+ {command}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"docs/cli.md has no part about {command}"
    return match[1]


def options(command: str) -> set[str]:
    return {name for item in main.commands[command].params if isinstance(item, click.Option) for name in item.opts}


def calls(text: str) -> list[str]:
    """The words after `shimcore` in code, as a command line has them."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    said = [line for line in lines if line.startswith("shimcore ")] + re.findall(r"`(shimcore [^`]+)`", text)
    return [line.split()[1] for line in said]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_shown(command: str) -> None:
    text = section(command)
    assert f"shimcore {command}" in text, "no example"
    known = {"--help", "--json", *options(command)}
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    own = [re.split(r" -- | \| ", line)[0] for line in re.findall(rf"^\$ shimcore {command}\b.*", text, re.MULTILINE)]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join([prose, *own]))) <= known
    assert f"[{command}](#{command})" in PAGE, "not in the table at the top"


def test_each_heading_is_a_command() -> None:
    assert set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) | {"completion"} == set(COMMANDS)


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name)
def test_each_call_in_any_page_is_of_a_command(page: Path) -> None:
    assert [word for word in calls(page.read_text()) if word not in main.commands and word not in OTHERS] == []


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"completion"}))
def test_each_has_json(command: str) -> None:
    assert "--json" in options(command)


def test_each_says_what_it_does() -> None:
    for name, command in main.commands.items():
        assert command.help and command.short_help and len(command.short_help) <= 60, name
