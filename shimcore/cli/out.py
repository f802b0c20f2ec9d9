"""What the commands print with: tables, JSON, errors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from . import nodes

F = TypeVar("F", bound=Callable[..., Any])

json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def living(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the shims that live, for a shell that completes."""
    return [CompletionItem(one.id, help=one.name) for one in nodes.shims() if one.id.startswith(incomplete)]


def binaries(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shims on PATH; with a slash, files."""
    if "/" in incomplete:
        return [CompletionItem(incomplete, type="file")]
    found: set[str] = set()
    for folder in os.get_exec_path():
        with contextlib.suppress(OSError):
            found.update(name for name in os.listdir(folder) if nodes.NAME.fullmatch(name) and not name.endswith(".py"))
    return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]


namespace_option: Callable[[F], F] = click.option("--namespace", default="", metavar="NS", help="Of this namespace alone.")

#: A container's id or a shim's pid, and a shim's program.
shim_argument: Callable[[F], F] = click.argument("shim", shell_complete=living)
binary_argument: Callable[[F], F] = click.argument("shim", shell_complete=binaries)


def fail(error: Exception | str) -> NoReturn:
    """Ends the command with 1 and one line on stderr."""
    raise click.ClickException(str(error))


def note(text: str) -> None:
    """One line on stderr, beside the result."""
    click.echo(f"note: {text}", err=True)


def note_of_root(what: str) -> None:
    """Says so where the user is not root, without whom `what`."""
    if os.geteuid():
        note(f"you are not root: {what}")


def print_json(value: Any) -> None:
    """One value over several lines."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_line(value: Any) -> None:
    """One value on a line of its own, at once: what follows something prints such lines."""
    click.echo(json.dumps(value, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as they need be; the first row is the head. right: numbers of columns of figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def age(seconds: float) -> str:
    """In one unit: 5s, 3m, 2h, 4d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
