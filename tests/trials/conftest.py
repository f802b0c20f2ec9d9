"""Every trial is marked, so that `make trials` finds it."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "trials":
            item.add_marker(pytest.mark.trial)
