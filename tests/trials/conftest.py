"""Every trial is marked, so that `make trials` finds it; tests/faults.py has the fixtures."""

from __future__ import annotations

import pytest

from tests.faults import lab, lab_shim, new_lab, shared_lab, shm

__all__ = ["lab", "lab_shim", "new_lab", "shared_lab", "shm"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "trials":
            item.add_marker(pytest.mark.trial)
