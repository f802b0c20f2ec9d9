"""new, install, uninstall: a project for a shim, and a shim onto containerd's PATH and away from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from ..errors import ShimError
from .out import fail, json_option, print_json
from .project import Project


@click.command(short_help="A project for a shim of your own.")
@json_option
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where; by default a new folder NAME here.")
@click.argument("name")
def new(name: str, folder: Path | None, as_json: bool) -> None:
    """Make a project for a shim of your own: a class with one method to edit, tests, packaging."""
    try:
        project = Project(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="NAME") from None
    folder = folder or Path(name)
    try:
        written = project.write(folder)
    except OSError as error:
        fail(error)
    if as_json:
        print_json({**vars(project), "folder": str(folder.absolute()), "files": [str(path.absolute()) for path in written]})
        return
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"\nWhat it does is {project.stem}Task.edit in {folder / project.module}.py. Next, as root:\n")
    click.echo(f"    cd {folder}")
    click.echo("    pip install -e '.[dev]'")
    click.echo("    pytest")
    click.echo(f"    shimcore run --shim {project.binary} -- sh -c 'echo hello from $SHIM'")


@click.command(short_help="A shim onto containerd's PATH.")
@json_option
@click.option("--dest", default="/usr/local/bin", show_default=True, help="Directory on containerd's PATH.")
@click.option("--runtime-id", help="The runtime's name, such as io.containerd.foo.v1, for a shim of your own.")
@click.option("--template/--no-template", default=None, help="Start it from a warm template (default: our own shim alone).")
@click.argument("shim", required=False, metavar="[MODULE:CLASS]")
def install(dest: str, runtime_id: str | None, template: bool | None, shim: str | None, as_json: bool) -> None:
    """Put a shim where containerd finds it: ours for runc, or yours; prints the configuration for containerd."""
    from ..install import RUNTIME_ID, SHIM
    from ..install import install as put

    if shim and not runtime_id:
        raise click.UsageError("a shim of your own needs --runtime-id")
    runtime_id = runtime_id or RUNTIME_ID
    try:
        path = put(dest, runtime_id=runtime_id, shim=shim or SHIM, template=template)
    except (ShimError, OSError) as error:
        fail(error)
    if as_json:
        on_path = shutil.which(Path(path).name) is not None
        print_json({"path": path, "runtime": runtime_id, "shim": shim or SHIM, "on_path": on_path})
        return
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


@click.command(short_help="And away again.")
@json_option
@click.option("--dest", default="/usr/local/bin", show_default=True, help="Where it was installed.")
@click.option("--runtime-id", help="The runtime's name; by default that of our shim for runc.")
def uninstall(dest: str, runtime_id: str | None, as_json: bool) -> None:
    """Take a shim away again. Those that run go on."""
    from ..install import RUNTIME_ID, binary_name

    try:
        name = binary_name(runtime_id or RUNTIME_ID)
    except ShimError as error:
        fail(error)
    there = [path for path in (Path(dest) / name, Path(dest) / f"{name}.py") if path.exists()]
    if not there:
        fail(FileNotFoundError(f"there is no {name} in {dest}"))
    for path in there:
        path.unlink()
        if not as_json:
            click.echo(f"removed {path}")
    if as_json:
        print_json({"removed": [str(path) for path in there]})
