"""The `shimcore` command: `pip install shimcore[cli]`. Never imported by a shim.

Each command has --json. Exit status: 0, 1 when something was found wrong or could not be done, 2 for a wrong command line.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import click
except ModuleNotFoundError:
    sys.exit("the command shimcore needs click: pip install 'shimcore[cli]'")

from .. import __version__
from ..errors import ShimError
from . import checks, nodes

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
COLOURS = {checks.OK: "green", checks.WARNING: "yellow", checks.PROBLEM: "red"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shimcore")
def main() -> None:
    """See into containerd's shims, install ours, and run one without containerd."""


def _fail(error: Exception) -> None:
    raise click.ClickException(str(error))


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


@main.command()
@json_option
def ps(as_json: bool) -> None:
    """Every shim on this node, found without containerd."""
    found = [nodes.look(shim) for shim in nodes.shims()]
    if as_json:
        _print([{**asdict(shim), "told": None, **_summary(shim)} for shim in found])
        return
    rows = [["PID", "SHIM", "NAMESPACE", "ID", "CONTAINERS", "PROCESSES", "UNSENT", "MEMORY", "AGE"]]
    for shim in found:
        summary = _summary(shim)
        rows.append(
            [str(shim.pid), shim.name, shim.namespace, shim.id]
            + ["-" if summary[key] is None else str(summary[key]) for key in ("containers", "processes", "unsent")]
            + ["-" if summary["private"] is None else f"{summary['private'] / 1048576:.1f}M"]
            + ["-" if summary["age"] is None else _age(summary["age"])]
        )
    _table(rows)


def _summary(shim: nodes.Shim) -> dict[str, Any]:
    told = shim.told
    if not told:
        return dict.fromkeys(("containers", "processes", "unsent", "private", "age"))
    alive = [one for one in told["processes"] if one["phase"] in ("opened", "bound", "exited")]
    return {
        "containers": len({one["container"] for one in told["processes"]}),
        "processes": len(alive),
        "unsent": told["core"]["queued"] + told["core"]["in_flight"],
        "private": told["memory"].get("private"),
        "age": told["now"] - told["started"],
    }


@main.command()
@click.argument("shim")
def dump(shim: str) -> None:
    """The whole state of one SHIM (container id, or pid) as JSON; see docs/debugging.md."""
    try:
        click.echo(nodes.ask(nodes.choose(shim, nodes.shims()), "/dump"), nl=False)
    except nodes.NoAnswer as error:
        _fail(error)


@main.command()
@click.argument("shim")
def metrics(shim: str) -> None:
    """The metrics of one SHIM (container id, or pid) as OpenMetrics text."""
    try:
        click.echo(nodes.ask(nodes.choose(shim, nodes.shims()), "/metrics"), nl=False)
    except nodes.NoAnswer as error:
        _fail(error)


@main.command()
@click.argument("shim")
@json_option
def inspect(shim: str, as_json: bool) -> None:
    """The processes and the last exits of one SHIM (container id, or pid)."""
    try:
        told = json.loads(nodes.ask(nodes.choose(shim, nodes.shims()), "/dump"))
    except nodes.NoAnswer as error:
        _fail(error)
    if as_json:
        _print({"processes": told["processes"], "exits": told["exits"], "task": told["task"]})
        return
    click.echo(f"{told['runtime']}, pid {told['pid']}, shimcore {told['shimcore']}, Python {told['python']}")
    click.echo(f"bundle {told['bundle']}\nsocket {told['socket']}\n")
    rows = [["CONTAINER", "EXEC", "PID", "PHASE", "STATUS", "EXIT"]]
    for one in told["processes"]:
        ended = str(one["exit_status"]) if "exit_status" in one else ""
        rows.append([one["container"], one["exec"], str(one["pid"]), one["phase"], one["status"], ended])
    _table(rows)
    exits = told["exits"][-10:]
    if exits:
        click.echo("\nthe last exits, µs after each was reaped:")
        rows = [["CONTAINER", "EXEC", "PID", "RECORDED", "SENT", "ACKNOWLEDGED"]]
        for one in exits:
            times = [one[name] for name in ("recorded_us", "sent_us", "acknowledged_us")]
            rows.append([one["container"], one["exec"], str(one["pid"]), *("-" if at is None else f"{at:.0f}" for at in times)])
        _table(rows)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """What is wrong with this node's shims, and what to do about it. Exits with 1 when there is a problem."""
    found = list(checks.examine([nodes.look(shim) for shim in nodes.shims()]))
    if as_json:
        _print([asdict(finding) for finding in found])
    else:
        for finding in found:
            click.echo(f"{click.style(finding.level.ljust(7), fg=COLOURS[finding.level])}  {finding.what}")
            if finding.advice:
                click.echo(f"         → {finding.advice}")
    sys.exit(any(finding.level == checks.PROBLEM for finding in found))


@main.command()
@click.option("--dest", default="/usr/local/bin", show_default=True, help="Directory on containerd's PATH.")
@click.option("--runtime-id", help="The runtime's name, such as io.containerd.foo.v1, for a shim of your own.")
@click.option("--template/--no-template", default=None, help="Start it from a warm template (default: our own shim alone).")
@click.argument("shim", required=False, metavar="[MODULE:CLASS]")
def install(dest: str, runtime_id: str | None, template: bool | None, shim: str | None) -> None:
    """Put a shim where containerd finds it: ours for runc, or yours; prints the configuration for containerd."""
    from ..install import RUNTIME_ID, SHIM
    from ..install import install as put

    if shim and not runtime_id:
        raise click.UsageError("a shim of your own needs --runtime-id")
    runtime_id = runtime_id or RUNTIME_ID
    try:
        path = put(dest, runtime_id=runtime_id, shim=shim or SHIM, template=template)
    except (ShimError, OSError) as error:
        _fail(error)
    click.echo(f"{path}\n")
    handler = "-".join(runtime_id.split(".")[-2:])
    click.echo("ctr and nerdctl find it by name:\n")
    click.echo(f"    ctr run --rm --runtime {runtime_id} IMAGE NAME COMMAND\n")
    click.echo("For Kubernetes, in containerd's config.toml, and `handler` of a RuntimeClass:\n")
    for versions, plugin in (("1.6, 1.7", "io.containerd.grpc.v1.cri"), ("2.0 and later", "io.containerd.cri.v1.runtime")):
        click.echo(f"    # containerd {versions}")
        click.echo(f"    [plugins.'{plugin}'.containerd.runtimes.{handler}]")
        click.echo(f'      runtime_type = "{runtime_id}"\n')
    if shutil.which(Path(path).name) is None:
        click.echo(f"note: {dest} is not on the PATH of this shell; it has to be on containerd's", err=True)


@main.command()
@click.option("--dest", default="/usr/local/bin", show_default=True, help="Where it was installed.")
@click.option("--runtime-id", help="The runtime's name; by default that of our shim for runc.")
def uninstall(dest: str, runtime_id: str | None) -> None:
    """Take a shim away again. Those that run go on."""
    from ..install import RUNTIME_ID, binary_name

    try:
        name = binary_name(runtime_id or RUNTIME_ID)
    except ShimError as error:
        _fail(error)
    there = [path for path in (Path(dest) / name, Path(dest) / f"{name}.py") if path.exists()]
    if not there:
        _fail(FileNotFoundError(f"there is no {name} in {dest}"))
    for path in there:
        path.unlink()
        click.echo(f"removed {path}")


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run a container under any shim without containerd: `shimcore run --shim PATH -- COMMAND` (--help for more)."""
    from ..rig.__main__ import main as rig

    sys.exit(rig(["run", *arguments]))


@main.command()
@json_option
@click.option("--runtime", default="", help="OCI runtime binary; the shim's own choice by default.")
@click.option("--generation", default="1.6", metavar="VERSION", help="The containerd that starts the shim: 1.6, 1.7 or 2.3.")
@click.option("--only", multiple=True, metavar="TRIAL", help="Run this trial alone; may be repeated.")
@click.argument("shim")
def conform(shim: str, runtime: str, generation: str, only: tuple[str, ...], as_json: bool) -> None:
    """Try whether SHIM (a path or name) does what containerd expects; see docs/conform.md. Exits with 1 when it does not."""
    from ..rig import conform as trials

    results = []
    try:
        for result in trials.conform(shim, runtime=runtime, only=only, generation=generation):
            results.append(result)
            if not as_json:
                good = result.outcome == trials.PASSED
                mark = click.style(result.outcome, fg="green" if good else "red")
                click.echo(f"{mark}  {result.name:18} {result.expects}")
                for line in result.detail.splitlines():
                    click.echo(f"          {line}")
    except (OSError, ValueError) as error:
        _fail(error)
    failed = sum(result.outcome == trials.FAILED for result in results)
    if as_json:
        _print({"shim": shim, "failed": failed, "trials": [asdict(result) for result in results]})
    else:
        click.echo(f"\n{shim}: {len(results) - failed} of {len(results)} passed")
    sys.exit(failed > 0)
