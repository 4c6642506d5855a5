"""A plugin of pytest that runs fast and different tests of a mutant first, by mutmut's durations.

A function that everything uses has a thousand tests, most of which are one test with other
parameters. So each further case of a test counts as if it took longer. Tests that do not fit into
``MAX_SECONDS`` together with those before them are left out.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

MAX_SECONDS: Final = 60.0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests by duration times the number of their case, and leave out those too many."""
    path = Path("mutmut-stats.json")  # mutmut runs pytest in its own folder
    if "__mutmut_" not in os.environ.get("MUTANT_UNDER_TEST", "") or not path.is_file():
        return
    durations = json.loads(path.read_text())["duration_by_test"]
    items.sort(key=lambda item: durations.get(item.nodeid, 0.0))
    num_cases: Counter[str] = Counter()
    costs = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        num_cases[test] += 1
        costs[item.nodeid] = num_cases[test] * durations.get(item.nodeid, 0.0)
    items.sort(key=lambda item: costs[item.nodeid])
    total, kept, left_out = 0.0, items[:1], []
    for item in items[1:]:
        duration = durations.get(item.nodeid, 0.0)
        if total + duration > MAX_SECONDS:
            left_out.append(item)
        else:
            kept.append(item)
            total += duration
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
