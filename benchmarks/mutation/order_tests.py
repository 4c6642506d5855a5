"""A plugin of pytest that runs the fast tests of few functions first, by statistics of mutmut.

A function that everything uses has a thousand tests. Its own tests use few other functions, so they
find a mutant soon. Tests that would take a mutant that survives beyond ``MAX_SECONDS`` are left
out.
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
    """Sort tests by duration times the number of functions they use, and cut their total time."""
    path = Path("mutmut-stats.json")  # mutmut runs pytest in its own folder
    if "__mutmut_" not in os.environ.get("MUTANT_UNDER_TEST", "") or not path.is_file():
        return
    statistics = json.loads(path.read_text())
    durations = statistics["duration_by_test"]
    num_functions = Counter(
        test for tests in statistics["tests_by_mangled_function_name"].values() for test in tests
    )
    items.sort(
        key=lambda item: durations.get(item.nodeid, 0.0) * max(1, num_functions[item.nodeid])
    )
    total, num_kept = 0.0, 0
    for item in items:
        total += durations.get(item.nodeid, 0.0)
        if num_kept and total > MAX_SECONDS:
            break
        num_kept += 1
    config.hook.pytest_deselected(items=items[num_kept:])
    del items[num_kept:]
