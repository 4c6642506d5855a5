"""The copy that mutmut mutates, and the scores of its results."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.mutation import report
from benchmarks.mutation.copy_repository import copy_repository, prepare_source
from benchmarks.mutation.named_faults import ROOT, NamedFault, find_failed_test, load_faults
from benchmarks.mutation.order_tests import pytest_collection_modifyitems
from benchmarks.mutation.report import EquivalenceRule, Mutant, compute_scores, list_missed_targets
from benchmarks.mutation.run import load_rules

SOURCE = '''"""A module."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from typing_extensions import override


@contextmanager
def open_one() -> Iterator[int]:
    yield 1


@torch.no_grad()
def multiply(x, y):
    return x * y


class Shape:
    """A class."""

    sides: int = 4

    @property
    @override
    def corners(self) -> int:
        return self.sides

    @cached_property
    def area(self) -> list[int]:
        return [self.sides]

    @classmethod
    def make(cls) -> "Shape":
        return cls()


class Training:
    def __init__(
        self,
        lr=1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def save_hyperparameters(self):
        pass
'''


def test_prepare_source_moves_decorators_and_keeps_the_meaning() -> None:
    text = prepare_source(SOURCE)
    decorators = [line.strip() for line in text.splitlines() if line.strip().startswith("@")]
    assert decorators == ["@classmethod"], "of which mutmut mutates the function"
    marked = [line.strip() for line in text.splitlines() if "pragma" in line]
    assert marked == [") -> None:  # pragma: no mutate block"]
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    with namespace["open_one"]() as one:
        assert one == 1
    assert not namespace["multiply"](torch.ones(2, requires_grad=True), 2).requires_grad
    shape = namespace["Shape"].make()
    assert shape.corners == 4 and shape.area is shape.area


def test_copy_repository_writes_what_changed_and_removes_what_is_gone(
    tmp_path: Path, make_repository: Callable[..., Path]
) -> None:
    source = make_repository(core={"a.py": SOURCE, "b.py": SOURCE}, docs={"page.md": "# A page\n"})
    target = tmp_path / "copy"
    copy_repository(source, target, ["core/a*.py"])
    assert (target / "core/a.py").read_text() == prepare_source(SOURCE)
    assert (target / "core/b.py").read_text() == SOURCE
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.py")}
    (target / "mutants").mkdir()
    (target / "mutants/result").write_text("kept")
    (source / "core/b.py").write_text("x = 1\n")
    (source / "docs/page.md").unlink()
    copy_repository(source, target, ["core/a*.py"])
    assert (target / "core/b.py").read_text() == "x = 1\n"
    assert (target / "core/a.py").stat().st_mtime_ns == times[target / "core/a.py"]
    assert not (target / "docs/page.md").exists() and (target / "mutants/result").exists()


@pytest.fixture
def make_repository(tmp_path: Path) -> Callable[..., Path]:
    import subprocess

    def make(**folders: dict[str, str]) -> Path:
        folder = tmp_path / "repository"
        for name, files in folders.items():
            (folder / name).mkdir(parents=True)
            for file_name, text in files.items():
                (folder / name / file_name).write_text(text)
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        return folder

    return make


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> list[Mutant]:
    """Ten of one file, of which two survive, and one untested of another."""
    lines = ["-    return a + b  # a sum", "+    return a - b  # a sum"]
    monkeypatch.setattr(Mutant, "diff_lines", lines)
    statuses = ["killed"] * 8 + ["survived", "no tests"]
    names = [f"hyperlora.core.xǁShapeǁadd__mutmut_{i}" for i in range(10)]
    return [
        *map(Mutant, names, ["hyperlora/core.py"] * 10, statuses),
        Mutant("hyperlora.other.x_add__mutmut_1", "hyperlora/other.py", "not tested"),
    ]


def test_scores_leave_out_equivalent_mutants(mutants: list[Mutant]) -> None:
    assert mutants[0].function == "hyperlora.core.Shape.add"
    assert mutants[-1].function == "hyperlora.other.add"
    scores = compute_scores(mutants, [])
    assert scores["core.py"].format_cells() == ["10", "0", "8", "2", "80.0%"]
    assert list(scores) == ["core.py", report.ALL_FILES]
    assert list_missed_targets(scores) == [
        "core.py: 80.0%, target 85%",
        "all files: 80.0%, target 92%",
    ]
    for rule, num_equivalent in (
        (EquivalenceRule(r".*\.add", r"a \+ b", "a - b", "b is 0"), 2),
        (EquivalenceRule(r"\.add", r"a \+ b", "a - b", "a whole name is matched"), 0),
        (EquivalenceRule(r".*\.add", r"a \+ b", "a / b", "another change"), 0),
    ):
        scores = compute_scores(mutants, [rule])
        assert scores["core.py"].num_equivalent == num_equivalent
    assert report.list_equivalent_rows(mutants, [rule]) == []
    rule = EquivalenceRule(r".*\.add", r"a \+ b", "a - b", "b is 0")
    assert report.list_equivalent_rows(mutants, [rule]) == [["`core.Shape.add`", "2", "b is 0"]]
    survivor = ["`core.Shape.add`", "`return a + b`", "`return a - b`"]
    assert report.list_survivor_rows(mutants, []) == [survivor] * 2
    assert report.list_survivor_rows(mutants, [rule]) == []
    text = report.format_survivors(mutants, [])
    assert text.count("return a - b") == 2 and "add__mutmut_9 (no tests)" in text


def test_rules_of_equivalent_mutants_have_reasons() -> None:
    for rule in load_rules():
        assert rule.functions.startswith(("hyperlora", ".*")) and len(rule.reason) > 10


def test_different_tests_of_a_mutant_run_first_up_to_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    durations = {"a[1]": 16.0, "a[2]": 1.0, "a[3]": 2.0, "b[1]": 9.0, "c": 40.0, "d[1]": 0.5}
    (tmp_path / "mutmut-stats.json").write_text(json.dumps({"duration_by_test": durations}))
    deselected: list[Any] = []
    config: Any = SimpleNamespace(
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    )
    names = [*durations, "new"]
    for mutant, kept, left_out in (
        ("stats", names, []),
        ("hyperlora.core.x_add__mutmut_1", ["new", "d[1]", "a[2]", "a[3]", "b[1]", "c"], ["a[1]"]),
    ):
        monkeypatch.setenv("MUTANT_UNDER_TEST", mutant)
        items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
        pytest_collection_modifyitems(config, items)
        assert [item.nodeid for item in items] == kept
        assert [item.nodeid for item in deselected] == left_out


def test_named_faults_are_in_the_source(tmp_path: Path) -> None:
    for fault in load_faults():
        text = (ROOT / fault.path).read_text()
        compile(fault.apply(text), fault.path, "exec")
        assert fault.apply(text) != text and (ROOT / fault.tests).is_file()


def test_failed_test_of_a_fault_is_found_and_the_fault_taken_out(tmp_path: Path) -> None:
    (tmp_path / "core.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_core.py").write_text(
        "from core import add\n\ndef test_add_adds():\n    assert add(2, 3) == 5\n"
    )
    for wrong, expected in (("a - b", "test_add_adds"), ("b + a", None)):
        fault = NamedFault("sign", "core.py", "a + b", wrong, "test_core.py")
        assert find_failed_test(tmp_path, fault) == expected
        assert "a + b" in (tmp_path / "core.py").read_text()
    with pytest.raises(ValueError, match=r"core.py has no 'a \* b'"):
        NamedFault("sign", "core.py", "a * b", "a", "test_core.py").apply("a + b")
