"""Every trial is marked, so that `make trials` finds it; and trials may be run against another shim, as `make compare` does.

SHIMCORE_TRIALS_SHIM names that shim's executable, SHIMCORE_TRIALS_GENERATION the containerd that the rig plays for it. What looks
into our own daemon is skipped then, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore.rig import Rig
from tests.faults import OTHER_SHIM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "trials":
            item.add_marker(pytest.mark.trial)


if OTHER_SHIM:

    @pytest.fixture(scope="session", autouse=True)
    def generation() -> Iterator[None]:
        defaults = Rig.__init__.__kwdefaults__
        assert defaults is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(defaults, "generation", os.environ.get("SHIMCORE_TRIALS_GENERATION", "1.6"))
            yield

    @pytest.fixture(scope="session")
    def shim_dir(session_root: Path) -> Path:
        """The other shim under our name."""
        folder = session_root / "other"
        folder.mkdir()
        (folder / "containerd-shim-runc-v2-py").symlink_to(OTHER_SHIM)
        return folder

    @pytest.fixture(scope="session")
    def lab_shim(shim_dir: Path) -> Path:
        return shim_dir / "containerd-shim-runc-v2-py"
