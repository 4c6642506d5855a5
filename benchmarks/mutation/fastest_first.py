"""A plugin of pytest that runs the fastest tests first, by the durations that mutmut measured."""

import json
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests by duration, where durations are known."""
    path = Path("mutmut-stats.json")  # mutmut runs pytest in its own folder
    if path.is_file():
        durations = json.loads(path.read_text())["duration_by_test"]
        items.sort(key=lambda item: durations.get(item.nodeid, 0.0))
