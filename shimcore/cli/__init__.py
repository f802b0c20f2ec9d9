"""The `shimcore` command: `pip install shimcore[cli]`. Never imported by a shim.

Exit status: 0, 1 when something was found wrong or could not be done, 2 for a wrong command line. docs/cli.md shows each.
"""

from __future__ import annotations

import sys

try:
    import click
except ModuleNotFoundError:
    sys.exit("the command shimcore needs click: pip install 'shimcore[cli]'")

from .. import __version__
from . import drive, follow, look, put, stats, upgrade
from .out import fail


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shimcore")
def main() -> None:
    """See into containerd's shims, make one of your own, install it, and run it without containerd."""


@click.command(short_help="Completion for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """What makes SHELL complete this command's words, ids of shims among them: bash, zsh or fish.

    \b
    bash:  eval "$(shimcore completion bash)"                       in ~/.bashrc
    zsh:   eval "$(shimcore completion zsh)"                        in ~/.zshrc
    fish:  shimcore completion fish > ~/.config/fish/completions/shimcore.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    try:
        click.echo(kind(main, {}, "shimcore", "_SHIMCORE_COMPLETE").source())
    except RuntimeError as error:  # a bash that is too old
        fail(error)


for command in (
    look.ps, look.inspect, look.dump, look.metrics, look.doctor, stats.stats, follow.events, follow.logs,
    upgrade.upgrade, put.new, put.install, put.uninstall, drive.run, drive.conform, drive.bench, completion,
):  # fmt: skip
    main.add_command(command)
