"""ps, inspect, dump, metrics, doctor: what shims tell of themselves, and what is wrong with them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import Any

import click

from . import checks, nodes
from .out import age, fail, json_option, namespace_option, note_of_root, print_json, shim_argument, table

COLOURS = {checks.OK: "green", checks.WARNING: "yellow", checks.PROBLEM: "red"}


@click.command(short_help="Every shim on this node.")
@json_option
@namespace_option
def ps(namespace: str, as_json: bool) -> None:
    """Every shim on this node, found without containerd."""
    found = [nodes.look(shim) for shim in nodes.shims(namespace)]
    note_of_root("of other users' shims little can be seen")
    if as_json:
        print_json([{**asdict(shim), "told": None, **_summary(shim)} for shim in found])
        return
    rows = [["PID", "SHIM", "NAMESPACE", "ID", "CONTAINERS", "SANDBOX", "PROCESSES", "UNSENT", "MEMORY", "AGE"]]
    for shim in found:
        summary = _summary(shim)
        rows.append(
            [str(shim.pid), shim.name, shim.namespace, shim.id]
            + ["-" if summary["containers"] is None else str(summary["containers"]), _word(summary["sandbox"])]
            + ["-" if summary[key] is None else str(summary[key]) for key in ("processes", "unsent")]
            + ["-" if summary["private"] is None else f"{summary['private'] / 1048576:.1f}M"]
            + ["-" if summary["age"] is None else age(summary["age"])]
        )
    table(rows)


def _sandbox(told: dict[str, Any]) -> dict[str, Any] | None:
    """The sandbox that a shim is; None: it is none, or an author's service or an older shimcore says nothing of it."""
    task = told["task"]
    found = task.get("sandbox") if isinstance(task, dict) else None
    return found if isinstance(found, dict) else None


def _word(state: str | None) -> str:
    """SANDBOX_READY is ready."""
    return state.removeprefix("SANDBOX_").lower() if state else "-"


def _summary(shim: nodes.Shim) -> dict[str, Any]:
    told = shim.told
    if not told:
        return dict.fromkeys(("containers", "sandbox", "processes", "unsent", "private", "age"))
    alive = [one for one in told["processes"] if one["phase"] in ("opened", "bound", "exited")]
    return {
        "containers": len({one["container"] for one in told["processes"]}),
        "sandbox": (_sandbox(told) or {}).get("state"),
        "processes": len(alive),
        "unsent": told["core"]["queued"] + told["core"]["in_flight"],
        "private": told["memory"].get("private"),
        "age": told["now"] - told["started"],
    }


@click.command(short_help="The whole state of one shim.")
@shim_argument
@click.option("--json", is_flag=True, expose_value=False, help="It is JSON always.")
def dump(shim: str) -> None:
    """The whole state of one SHIM (container id, or pid) as JSON; see docs/debugging.md."""
    try:
        click.echo(nodes.ask(nodes.choose(shim, nodes.shims()), "/dump"), nl=False)
    except nodes.NoAnswer as error:
        fail(error)


_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples(text: str) -> list[dict[str, Any]]:
    """name, labels and value of each line of OpenMetrics text that is a sample."""
    matches = [_SAMPLE.match(line) for line in text.splitlines() if not line.startswith("#")]
    return [
        {
            "name": match[1],
            "labels": {name: re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value) for name, value in _labels(match)},
            "value": float(match[3]),
        }
        for match in matches
        if match
    ]


def _labels(match: re.Match[str]) -> list[tuple[str, str]]:
    return _LABEL.findall(match[2] or "")


@click.command(short_help="The metrics of one shim, as OpenMetrics text.")
@shim_argument
@json_option
def metrics(shim: str, as_json: bool) -> None:
    """The metrics of one SHIM (container id, or pid) as OpenMetrics text."""
    try:
        text = nodes.ask(nodes.choose(shim, nodes.shims()), "/metrics")
    except nodes.NoAnswer as error:
        fail(error)
    if as_json:
        print_json(samples(text.decode()))
    else:
        click.echo(text, nl=False)


@click.command(short_help="The processes and last exits of one shim.")
@shim_argument
@json_option
def inspect(shim: str, as_json: bool) -> None:
    """The processes and the last exits of one SHIM (container id, or pid)."""
    try:
        told = json.loads(nodes.ask(nodes.choose(shim, nodes.shims()), "/dump"))
    except nodes.NoAnswer as error:
        fail(error)
    if as_json:
        parts = {"sandbox": _sandbox(told), "processes": told["processes"], "exits": told["exits"], "task": told["task"]}
        print_json(parts)
        return
    click.echo(f"{told['runtime']}, pid {told['pid']}, shimcore {told['shimcore']}, Python {told['python']}")
    click.echo(f"bundle {told['bundle']}\nsocket {told['socket']}")
    if sandbox := _sandbox(told):
        ended = f", exit status {sandbox['exit_status']}" if "exit_status" in sandbox else ""
        click.echo(f"sandbox {sandbox['id']}, {_word(sandbox['state'])}, pid {sandbox['pid']}{ended}")
    click.echo()
    rows = [["CONTAINER", "EXEC", "PID", "PHASE", "STATUS", "EXIT"]]
    for one in told["processes"]:
        ended = str(one["exit_status"]) if "exit_status" in one else ""
        rows.append([one["container"], one["exec"], str(one["pid"]), one["phase"], one["status"], ended])
    table(rows)
    exits = told["exits"][-10:]
    if exits:
        click.echo("\nthe last exits, µs after each was reaped:")
        rows = [["CONTAINER", "EXEC", "PID", "RECORDED", "SENT", "ACKNOWLEDGED"]]
        for one in exits:
            times = [one[name] for name in ("recorded_us", "sent_us", "acknowledged_us")]
            rows.append([one["container"], one["exec"], str(one["pid"]), *("-" if at is None else f"{at:.0f}" for at in times)])
        table(rows)


@click.command(short_help="What is wrong, and what to do about it.")
@json_option
def doctor(as_json: bool) -> None:
    """What is wrong with this node's shims, and what to do about it. Exits with 1 when there is a problem."""
    found = list(checks.examine([nodes.look(shim) for shim in nodes.shims()]))
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            click.echo(f"{click.style(finding.level.ljust(7), fg=COLOURS[finding.level])}  {finding.what}")
            if finding.advice:
                click.echo(f"         → {finding.advice}")
    sys.exit(any(finding.level == checks.PROBLEM for finding in found))
