"""The documents' code blocks, and who types what stands in them into a shell.

A console block with `$ ` in it is a session: these lines are commands, the others what they print. Without it each line is a
command, `# ` before it says that it is root's. What is shown is compared in one of two ways:

exact   each line is there, in order; … stands for anything
alike   each line is there; … stands for anything, a number, time or size for any other, a name by chance (a socket's, a rig's)
        for any other, spaces for any number of spaces, a picture's bars and points for any; statuses of exits are exact
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ *(?:```|~~~)", re.MULTILINE)
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r' title="[^"]*"')
HANG = 300.0  # seconds after which what was typed has hung
DONE = "--- done "


@dataclass(frozen=True)
class Block:
    """One fenced block. page: its path below ROOT; line: of its opening fence; language: "" where none is said; "python title" of
    a file that is named.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"


def pages() -> list[str]:
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    """A page's, in order; of these languages alone, if any are named."""
    text, found = read(page), []
    for at in _BLOCK.finditer(text):
        language = _TITLE.sub(" title", at[1].strip())
        found.append(Block(page, text.count("\n", 0, at.start()) + 1, language, at[2]))
    return [block for block in found if not languages or block.language in languages]


def only(page: str, language: str) -> str:
    """The text of the page's one block in this language."""
    (block,) = blocks(page, language)
    return block.text


def parts(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines that it is shown to print) of a console block."""
    lines = text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        yield from ((line.removeprefix("# "), []) for line in lines if line)
        return
    assert lines[0].startswith("$ "), f"printed by no command: {lines[0]}"
    for part in re.split(r"^(?=\$ )", text, flags=re.MULTILINE)[1:]:
        command, *shown = part[2:].splitlines()
        yield command, [line for line in shown if line]


_NUMBER = r"\d(?:[\d.:TZ-]*\d)?[BKMGZsmhd]?"
_ALIKE = re.compile(
    r"(?P<any>…)|(?P<space> +)"
    r"|(?P<exact>(?:exit_status=|exit code |exit status )\d+)"
    r"|(?P<name>\brig-\w+|\bc?[0-9a-f]{9,}\b)"
    rf"|(?P<number>(?<![\w/]){_NUMBER}(?!\w))"
)
_KINDS = {"any": ".*", "space": " +", "name": r"[\w-]+", "number": _NUMBER}
_PICTURE = re.compile(r"[█▉▊▋▌▍▎▏●┬]")


def alike(line: str) -> str:
    """The pattern of lines that are like this one but for what no two runs have in common."""
    if drawn := _PICTURE.search(line):
        label = line[: drawn.start()].strip()
        return f" *{re.escape(label)} *{_PICTURE.pattern}.*"
    if re.fullmatch(r" +0 ms[ \d]+", line):  # the scale below it
        return r" +0 ms[ \d]+"
    pattern, at = "", 0
    for found in _ALIKE.finditer(line):
        pattern += re.escape(line[at : found.start()]) + _KINDS.get(str(found.lastgroup), re.escape(found[0]))
        at = found.end()
    return pattern + re.escape(line[at:])


def said_alike(shown: Iterable[str], said: str, command: str) -> None:
    lines = [line.rstrip() for line in said.splitlines()]
    for line in shown:
        pattern = re.compile(alike(line.rstrip()))
        assert any(pattern.fullmatch(one) for one in lines), f"{command}\nsaid\n{said}\nand nothing like {line!r}"


def said_as_shown(shown: Iterable[str], said: str, command: str) -> None:
    at = 0
    for line in shown:
        pattern = ".*".join(map(re.escape, line.split("…")))
        found = re.compile(pattern if "…" in line else f"^{pattern}$", re.MULTILINE).search(said, at)
        assert found, f"{command}\nsaid\n{said}\nand not {line!r}"
        at = found.end()


@dataclass
class Reader:
    """Who types what stands on a page into one shell. A context manager.

    home: the folder that the shell begins in.
    env: on top of this process's, whose environment of Python it has not.
    places: what stands on the page -> what takes its place in commands, and the other way round in what they say.
    changes: patterns -> replacements in a command, for what can't be left as it stands; the first that fits is applied.
    statuses: beginnings of commands -> the exit statuses that they may end with, instead of 0.
    compare: said_as_shown or said_alike.
    """

    home: Path
    env: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    statuses: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    compare: Callable[[Iterable[str], str, str], None] = said_as_shown

    def __enter__(self) -> Reader:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.shell = subprocess.Popen(
            ["bash", "--norc"], cwd=self.home, env={**env, **self.env}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1,
        )  # fmt: skip
        self.changed: set[str] = set()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.close()
        self.shell.wait(HANG)
        self.shell.stdout.close()

    def meant(self, command: str) -> str:
        """What is typed for a command of the page."""
        for pattern, instead in self.changes.items():
            command, found = re.subn(pattern, instead, command, count=1)
            if found:
                self.changed.add(pattern)
                break
        if not self.places:
            return command
        texts = "|".join(map(re.escape, sorted(self.places, key=len, reverse=True)))
        return re.sub(rf"(?<![\w./-])(?:{texts})(?![\w-])", lambda found: self.places[found[0]], command)

    def type(self, command: str) -> str:
        """What it says, stdout and stderr together, as the page would have it."""
        assert self.shell.stdin and self.shell.stdout
        may_end = next((it for begin, it in self.statuses.items() if command.startswith(begin)), (0,))
        # A group, as a command may end with a comment.
        self.shell.stdin.write(f"{{ {self.meant(command)}\n}} </dev/null\necho \"{DONE}\"$?\n")
        lines: list[str] = []
        for line in self.shell.stdout:
            if DONE in line:
                before, _, status = line.partition(DONE)  # the last line may not have been ended
                said = "".join([*lines, before])
                for text, place in sorted(self.places.items(), key=lambda item: len(item[1]), reverse=True):
                    said = said.replace(place, text)
                assert int(status) in may_end, f"{command}: {status.strip()}\n{said}"
                return said
            lines.append(line)
        raise AssertionError(f"the shell has ended at {command}\n{''.join(lines)}")

    def play(self, text: str) -> dict[str, str]:
        """Types all commands of a console block, which print what is shown; command -> what it said."""
        said = {}
        for command, shown in parts(text):
            said[command] = self.type(command)
            self.compare(shown, said[command], command)
        return said
