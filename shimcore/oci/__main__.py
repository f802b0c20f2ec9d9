"""The shim over runc as what pip puts into its folder of commands, containerd-shim-runc-v2-py, and as `python -m shimcore.oci`.

It needs no `shimcore install`, and has neither its launcher nor its isolation from the environment: each start is an
interpreter's.
"""

from __future__ import annotations

from ..shim import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    run("io.containerd.runc.v2-py", "shimcore.oci.shim:RuncShim")


if __name__ == "__main__":
    main()
