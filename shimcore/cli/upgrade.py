"""upgrade: shims that run go on with the code that is on the disk now (docs/upgrade.md)."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..errors import ShimError, Unimplemented
from ..serve import UPGRADE
from ..ttrpc import Client
from ..upgrade import TIMEOUT
from ..wire import Raw
from . import nodes
from .out import fail, json_option, living, namespace_option, note_of_root, print_json, table

# Beside the trial and the rest, each of which has --timeout, what the new code takes to start.
START_TIMEOUT = 20.0


class _Answer(Raw):
    def ParseFromString(self, data: bytes) -> int:
        self.data = bytes(data)
        return len(data)


def upgrade_one(shim: nodes.Shim, to: str, timeout: float) -> dict[str, Any]:
    """What the shim's new code says: pid, from, to (versions), seconds. Raises NoAnswer with the reason why there is none."""
    if not shim.socket:
        raise nodes.NoAnswer(f"{shim.name} (pid {shim.pid}) has no socket that we may see")
    wish = Raw(json.dumps({"to": to, "timeout": timeout}).encode())
    try:
        with Client(f"unix://{shim.socket}") as client:
            answer = client.call(UPGRADE, "Upgrade", wish, _Answer, timeout=2 * timeout + START_TIMEOUT)
    except Unimplemented:
        raise nodes.NoAnswer(f"{shim.name} (pid {shim.pid}) is not of a shimcore that can be upgraded in place") from None
    except (ShimError, OSError) as error:
        raise nodes.NoAnswer(str(error)) from None
    told: dict[str, Any] = json.loads(answer.data)
    return told


@click.command(short_help="New code for a shim that runs, its containers with it.")
@click.argument("shim", required=False, shell_complete=living)
@click.option("--all", "everyone", is_flag=True, help="Every shim of shimcore's; then no SHIM is named.")
@click.option("--to", default="", metavar="PATH", help="The new shim's executable; else the one that it was started by.")
@click.option("--timeout", default=TIMEOUT, show_default=True, metavar="SECONDS", help="For the new code to be ready.")
@json_option
@namespace_option
def upgrade(shim: str | None, everyone: bool, to: str, timeout: float, namespace: str, as_json: bool) -> None:
    """SHIM goes on with the code that is on the disk now, as the same process; its containers notice nothing.

    Refused, with the reason, where the new code does not start or there is something that it can't take over: then the shim goes
    on as if nothing had happened. See docs/upgrade.md.
    """
    if bool(shim) == everyone:
        raise click.UsageError("name a shim, or say --all")
    to = os.path.abspath(to) if to else ""
    note_of_root("other users' shims can't be asked")
    found = nodes.shims(namespace)
    if everyone:
        wanted = [one for one in found if one.debug and (not to or os.path.basename(to) == one.name)]
    else:
        try:
            wanted = [nodes.choose(str(shim), found)]
        except nodes.NoAnswer as error:
            fail(error)
    results = []
    for one in wanted:
        result: dict[str, Any] = {"pid": one.pid, "namespace": one.namespace, "id": one.id, "error": ""}
        try:
            result.update(upgrade_one(one, to, timeout))
        except nodes.NoAnswer as error:
            result["error"] = str(error)
        results.append(result)
    if as_json:
        print_json(results)
    elif shim and results[0]["error"]:
        fail(results[0]["error"])
    else:
        rows = [["PID", "NAMESPACE", "ID", "FROM", "TO", "RESULT"]]
        for one_result in results:
            done = not one_result["error"]
            versions = [one_result["from"], one_result["to"]] if done else ["-", "-"]
            what = f"{one_result['seconds']:.2f} s" if done else one_result["error"]
            rows.append([str(one_result["pid"]), one_result["namespace"], one_result["id"], *versions, what])
        table(rows)
    if any(result["error"] for result in results):
        raise SystemExit(1)
