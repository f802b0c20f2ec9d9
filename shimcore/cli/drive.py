"""run, conform, bench: a shim without containerd."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .out import F, binaries, binary_argument, fail, json_option, note_of_root, print_json, table

# As shimcore.rig has them, which is not imported before it is needed: it costs what completion should not take.
OURS, SHIM = "containerd-shim-runc-v2-py", "containerd-shim-runc-v2"
NEEDS = "runc, and the sockets of shims, need root"

generation_option: Callable[[F], F] = click.option(
    "--generation", type=click.Choice(["1.6", "1.7", "2.3"]), default="1.6", show_default=True, help="As which containerd."
)

@click.command(
    short_help="A container under any shim, without containerd.", context_settings={"allow_interspersed_args": False}
)
@json_option
@click.option("--shim", default="", shell_complete=binaries, help=f"Path or name; {OURS} if that is on PATH, else {SHIM}.")
@click.option("--rootfs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="One of busybox is made if absent.")
@generation_option
@click.option("--runtime", default="", help="OCI runtime binary; the shim's own choice by default.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--cwd", default="/", show_default=True, help="Working directory in the container.")
@click.option("--timeout", type=float, default=math.inf, metavar="SECONDS", help="Time that the command may take.")
@click.option("--debug", is_flag=True, help="Call the shim with -debug.")
@click.argument("command", nargs=-1, metavar="[--] [COMMAND]...")
def run(shim: str, command: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run COMMAND in a real container under a shim, without containerd, and say what happened and when.

    Exits as the container did; with 125 when the shim failed, or left something behind.
    """
    from ..rig import runner
    from ..rig.live import Live

    try:
        with Live(quiet=as_json) as live:
            report = runner.run(shim or shutil.which(OURS) or SHIM, command or runner.HELLO, watcher=live, **options)
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(125)
    click.echo(report.json() if as_json else f"\n{report.end(live.width)}")
    if report.error:
        note_of_root(NEEDS)
    sys.exit(report.status)


@click.command(short_help="Does a shim do what containerd expects?")
@json_option
@click.option("--runtime", default="", help="OCI runtime binary; the shim's own choice by default.")
@generation_option
@click.option("--only", multiple=True, metavar="TRIAL", help="Run this trial alone; may be repeated.")
@binary_argument
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
        fail(error)
    failed = sum(result.outcome == trials.FAILED for result in results)
    if as_json:
        print_json({"shim": shim, "failed": failed, "trials": [asdict(result) for result in results]})
    else:
        click.echo(f"\n{shim}: {len(results) - failed} of {len(results)} passed")
    if failed:
        note_of_root(NEEDS)
    sys.exit(failed > 0)


@click.command(short_help="Shims side by side: how long does each take?")
@json_option
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Containers of each.")
@click.option("--runtime", default="", help="OCI runtime binary; each shim's own choice by default.")
@click.option("--generation", type=click.Choice(["1.6", "1.7", "2.3"]), default=None, help="By default the oldest each takes.")
@click.option("--plain", is_flag=True, help="Shims made with shimcore start without their warm template.")
@click.argument("shims", nargs=-1, required=True, shell_complete=binaries, metavar="SHIM...")
def bench(shims: tuple[str, ...], rounds: int, runtime: str, generation: str | None, plain: bool, as_json: bool) -> None:
    """Run containers under each SHIM (a path or name) alternately, and compare the times of each step with the first SHIM's."""
    from ..rig import compare

    def seen(done: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[Kround {done} of {rounds}{'' if done < rounds else chr(10)}", nl=False, err=True)

    try:
        sides = compare.compare(shims, rounds=rounds, runtime=runtime, generation=generation or "", plain=plain, seen=seen)
    except (OSError, RuntimeError) as error:
        note_of_root(NEEDS)
        fail(error)
    first = sides[0]
    ratios = {(side.name, what): side.median(what) / first.median(what) for side in sides for what in compare.WHAT}
    if as_json:
        print_json(
            {
                "rounds": rounds,
                "shims": [
                    {
                        "name": side.name,
                        "path": side.path,
                        "generation": side.generation,
                        "left": side.left,
                        "times": {
                            what: {"median": side.median(what), "p99": side.p99(what), "ratio": ratios[side.name, what]}
                            for what in compare.WHAT
                        },
                    }
                    for side in sides
                ],
            }
        )
        return
    for number, side in enumerate(sides, 1):
        click.echo(f"{number}: {side.path}, started as containerd {side.generation} does")
    click.echo(f"\n{rounds} containers of each, in turn; ms, and the ratio of medians to 1\n")
    heads = [[f"{number} median", "p99", *(["ratio"] if number > 1 else [])] for number in range(1, len(sides) + 1)]
    rows = [["", *(word for head in heads for word in head)]]
    for what in compare.WHAT:
        row = [what]
        for side in sides:
            row += [f"{side.median(what):.2f}", f"{side.p99(what):.2f}"]
            row += [] if side is first else [f"{ratios[side.name, what]:.2f}"]
        rows.append(row)
    table(rows, right=range(1, len(rows[0])))
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 2 * cores:
        click.echo(f"\nnote: the load average is {load:.0f} on {cores} cores: what else runs here blurs the ratios")
    for side in sides:
        for line in side.left:
            click.echo(f"left behind by {side.name}: {line}")
    click.echo()
    for what, meaning in compare.WHAT.items():
        click.echo(f"{what:13} {meaning}")
