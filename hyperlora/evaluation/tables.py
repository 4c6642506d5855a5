"""Tables of an evaluation as Markdown and CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from hyperlora.evaluation.metrics import Score

EMPTY_CELL = "–"


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.

    Returns:
        Lines of the table.
    """
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table as CSV.

    Args:
        path: File to write.
        header: Names of the columns.
        rows: Cells of each row; None becomes an empty cell.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def list_score_cells(score: Score | None) -> list[float | None]:
    """List mean and standard error of a score, which may be missing."""
    return [None, None] if score is None else [score.mean, score.standard_error]


def format_seconds(seconds: float | None) -> str:
    """Format a time with milliseconds, or a dash if it is missing."""
    return EMPTY_CELL if seconds is None else f"{seconds:.3f}"
