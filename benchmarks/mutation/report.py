"""Scores of a mutation run by file, and the mutants that survived, from mutmut's results."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from hyperlora.evaluation.tables import format_markdown_table

ALL_FILES: Final = "all files"
MIN_SCORE: Final = 0.92
MIN_FILE_SCORE: Final = 0.85
NOT_KILLED: Final = ("survived", "no tests")
MAX_NAMED_FUNCTIONS: Final = 4
_STATUS_BY_EXIT_CODE: Final[Mapping[int | None, str]] = {
    None: "not tested",
    0: "survived",
    1: "killed",
    3: "killed",  # an internal error of pytest
    5: "no tests",
    33: "no tests",
    -6: "killed",  # the process aborted,
    -9: "killed",  # had too little memory
    -11: "killed",  # or read a wrong address
    -24: "killed",  # and these ran out of time
    24: "killed",
    255: "killed",
    36: "killed",
    152: "killed",
}
"""Exit codes of pytest and mutmut; others are ``error``: the tests could not run."""


@dataclass(frozen=True)
class EquivalenceRule:
    """Mutants that no test can kill, since nothing changes.

    Attributes:
        functions: Regular expression of ``module.Class.function`` names.
        removed: Regular expression of the lines that the mutant removes, joined by newlines.
        added: Regular expression of the lines that it adds.
        reason: Why nothing changes.
    """

    functions: str
    removed: str
    added: str
    reason: str


@dataclass(frozen=True)
class Mutant:
    """A mutant and its result.

    Attributes:
        name: mutmut's name of it.
        path: File, relative to the repository.
        status: ``killed``, ``survived``, ``no tests``, ``not tested`` or ``error``.
    """

    name: str
    path: str
    status: str

    @property
    def function(self) -> str:
        """``module.Class.function``."""
        return (
            self.name.partition("__mutmut_")[0]
            .replace("xǁ", "")
            .replace("ǁ", ".")
            .replace(".x_", ".")
        )

    @cached_property
    def diff_lines(self) -> list[str]:
        """Lines that it removes and adds, with their sign."""
        from mutmut.mutation.diff_apply import get_diff_for_mutant  # only `make mutation` has it

        diff = get_diff_for_mutant(self.name, path=self.path)
        return [line for line in diff.splitlines()[2:] if line[:1] in "+-"]

    @property
    def changes(self) -> tuple[str, str]:
        """Lines that it removes, and lines that it adds."""
        removed, added = (
            "\n".join(line[1:].strip() for line in self.diff_lines if line[0] == sign)
            for sign in "-+"
        )
        return removed, added

    def find_reason(self, rules: Sequence[EquivalenceRule]) -> str | None:
        """Find the reason of the first rule that matches, or None."""
        removed, added = self.changes
        for rule in rules:
            if (
                re.fullmatch(rule.functions, self.function)
                and re.search(rule.removed, removed)
                and re.search(rule.added, added)
            ):
                return rule.reason
        return None


def read_mutants(folder: Path) -> list[Mutant]:
    """Read all results of a run.

    Args:
        folder: The folder in which mutmut ran; the working directory.

    Returns:
        Mutants, in the order of files and lines.
    """
    mutants = []
    for path in sorted((folder / "mutants" / "hyperlora").rglob("*.py.meta")):
        source = str(path.relative_to(folder / "mutants"))[: -len(".meta")]
        exit_codes: Mapping[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
        mutants += [
            Mutant(name, source, _STATUS_BY_EXIT_CODE.get(code, "error"))
            for name, code in exit_codes.items()
        ]
    return mutants


@dataclass(frozen=True)
class MutationScore:
    """Results of the mutants of a file, or of all.

    Attributes:
        num_killed: Mutants that a test notices.
        num_survived: Mutants that no test notices.
        num_equivalent: Mutants that change nothing.
    """

    num_killed: int
    num_survived: int
    num_equivalent: int

    @property
    def ratio(self) -> float:
        """Killed mutants among those that change something; 1 where there is none."""
        num_changed = self.num_killed + self.num_survived
        return self.num_killed / num_changed if num_changed else 1.0

    def format_cells(self) -> list[str]:
        """Format the number of mutants and of each kind, and the ratio."""
        numbers = (self.num_equivalent, self.num_killed, self.num_survived)
        return [str(sum(numbers)), *map(str, numbers), f"{self.ratio:.1%}"]


def compute_scores(
    mutants: Sequence[Mutant], rules: Sequence[EquivalenceRule]
) -> dict[str, MutationScore]:
    """Compute the score of each file, and last that of all files.

    Args:
        mutants: Results; those without are left out.
        rules: Rules of equivalent mutants.

    Returns:
        Scores by file, relative to ``hyperlora/``, and of ``ALL_FILES``.
    """
    counts: dict[str, Counter[str]] = {ALL_FILES: Counter()}
    for mutant in mutants:
        if mutant.status in ("not tested", "error"):
            continue
        kind = "killed" if mutant.status == "killed" else "survived"
        if kind == "survived" and mutant.find_reason(rules):
            kind = "equivalent"
        for name in (mutant.path.removeprefix("hyperlora/"), ALL_FILES):
            counts.setdefault(name, Counter())[kind] += 1
    counts[ALL_FILES] = counts.pop(ALL_FILES)  # last
    return {
        name: MutationScore(count["killed"], count["survived"], count["equivalent"])
        for name, count in counts.items()
    }


def format_score_table(scores: Mapping[str, MutationScore]) -> str:
    """Format scores as a Markdown table."""
    header = ["file", "mutants", "equivalent", "killed", "survived", "score"]
    rows = [[name, *score.format_cells()] for name, score in scores.items()]
    return "\n".join(format_markdown_table(header, rows))


def list_missed_targets(scores: Mapping[str, MutationScore]) -> list[str]:
    """List files below ``MIN_FILE_SCORE``, and all files below ``MIN_SCORE``."""
    return [
        f"{name}: {score.ratio:.1%}, target {target:.0%}"
        for name, score in scores.items()
        if score.ratio < (target := MIN_SCORE if name == ALL_FILES else MIN_FILE_SCORE)
    ]


def list_equivalent_rows(
    mutants: Sequence[Mutant], rules: Sequence[EquivalenceRule]
) -> list[list[str]]:
    """List the reasons of equivalent mutants, with their functions and their number.

    Args:
        mutants: Results.
        rules: Rules of equivalent mutants.

    Returns:
        Cells of a Markdown table, the most frequent reason first.
    """
    functions: dict[str, Counter[str]] = {}
    for mutant in mutants:
        if mutant.status in NOT_KILLED and (reason := mutant.find_reason(rules)):
            functions.setdefault(reason, Counter())[mutant.function] += 1
    rows = []
    for reason, counts in sorted(functions.items(), key=lambda item: -item[1].total()):
        names = sorted(f"`{name.removeprefix('hyperlora.')}`" for name in counts)
        if len(names) > MAX_NAMED_FUNCTIONS:
            names = [f"{len(names)} functions"]
        rows.append([", ".join(names), str(counts.total()), reason])
    return rows


def list_survivors(mutants: Sequence[Mutant], rules: Sequence[EquivalenceRule]) -> list[Mutant]:
    """List the mutants that survived and are not equivalent."""
    return [m for m in mutants if m.status in NOT_KILLED and not m.find_reason(rules)]


def list_survivor_rows(
    mutants: Sequence[Mutant], rules: Sequence[EquivalenceRule]
) -> list[list[str]]:
    """List the mutants that survived and are not equivalent.

    Args:
        mutants: Results.
        rules: Rules of equivalent mutants.

    Returns:
        Cells of a Markdown table: function, lines removed and lines added of each.
    """
    rows = []
    for mutant in list_survivors(mutants, rules):
        code = (re.sub(r"  # .*", "", lines) for lines in mutant.changes)  # no comments
        cells = (
            mutant.function.removeprefix("hyperlora."),
            *(" ".join(lines.split()) for lines in code),
        )
        rows.append([f"`{cell}`" if cell else "" for cell in cells])
    return rows


def format_survivors(mutants: Sequence[Mutant], rules: Sequence[EquivalenceRule]) -> str:
    """Format the changes of all mutants that survived and are not equivalent.

    Args:
        mutants: Results.
        rules: Rules of equivalent mutants.

    Returns:
        A block of text for each.
    """
    blocks = [
        "\n".join([f"{mutant.name} ({mutant.status})", *mutant.diff_lines])
        for mutant in list_survivors(mutants, rules)
    ]
    return "\n\n".join(blocks)
