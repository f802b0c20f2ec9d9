"""windows.py: the names are right, the rest says clearly that it is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shimcore import address, windows
from shimcore.errors import Unimplemented


def test_names() -> None:
    pipe = windows.pipe_address(r"\\.\pipe\containerd-containerd", "default", "1234")
    assert pipe == address.pipe_address(r"\\.\pipe\containerd-containerd", "default", "1234")
    assert pipe.startswith("\\\\.\\pipe\\containerd-shim-") and pipe.endswith("-pipe")
    assert windows.log_pipe("test", "clients") == "\\\\.\\pipe\\containerd-shim-test-clients-log"
    assert windows.debugger_event(12) == "Global\\debugger-12"


@pytest.mark.parametrize(
    "function", [windows.setup_debugger_event, windows.signal_server_started, windows.disable_handle_inheritance]
)
def test_windows_only(function: Callable[[], object]) -> None:
    with pytest.raises(Unimplemented, match=f"{function.__name__} exists on Windows only"):
        function()
