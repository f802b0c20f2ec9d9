"""What a shim needs on Windows alone: the names of its pipes, which are pure, and the rest, which this
library has not.

Sources: containerd's Rust crate and the Windows shim in hcsshim.
"""

from __future__ import annotations

from .errors import Unimplemented

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def pipe_address(path: str, namespace: str, id: str) -> str:
    r"""Pipe that the shim serves on: \\.\pipe\containerd-shim-<hash>-pipe, hashed as a socket's address is.
    """
    from .address import pipe_address

    return pipe_address(path, namespace, id)


def log_pipe(namespace: str, id: str) -> str:
    r"""Pipe that the shim serves its log on, where containerd is the client:
    \\.\pipe\containerd-shim-<ns>-<id>-log.
    """
    return rf"\\.\pipe\containerd-shim-{namespace}-{id}-log"


def debugger_event(pid: int) -> str:
    r"""Name of the event that a shim started with SHIM_DEBUGGER would wait for: Global\debugger-<pid>."""
    return rf"Global\debugger-{pid}"


def _windows_only(what: str) -> NoReturn:
    raise Unimplemented(f"{what} exists on Windows only, which shimcore does not serve")


def setup_debugger_event() -> NoReturn:
    """Would halt the shim until a debugger signals its event. Raises Unimplemented."""
    _windows_only("setup_debugger_event")


def signal_server_started() -> NoReturn:
    """Would close stdout to let `start` return; here a readiness pipe does that. Raises Unimplemented."""
    _windows_only("signal_server_started")


def disable_handle_inheritance() -> NoReturn:
    """Would keep the daemon from inheriting containerd's handles; here everything is close-on-exec. Raises
    Unimplemented.
    """
    _windows_only("disable_handle_inheritance")
