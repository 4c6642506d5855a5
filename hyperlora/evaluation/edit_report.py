"""Report of an edit evaluation: tables by group and kind of edit, reversal errors, and a contact
sheet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from hyperlora.data.contact_sheet import draw_contact_sheet
from hyperlora.data.images import to_image
from hyperlora.evaluation.edit_evaluator import METRICS, EditResult
from hyperlora.evaluation.edit_suite import PRESERVED_SUFFIX, ReversalErrors
from hyperlora.evaluation.tables import (
    format_markdown_table,
    format_seconds,
    list_score_cells,
    write_csv,
)

_NUM_DECIMALS: Final = {"psnr": 1}
_MAX_SHEET_ROWS: Final = 24


def format_edit_markdown(
    results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> str:
    """Format a table for each group of edits, one of the accuracy by kind, and one of reversal.

    Args:
        results: Rows of the tables.
        reversal: Errors of undone edits.

    Returns:
        Markdown text.
    """
    edits = results[0].edits
    lines: list[str] = []
    for group in _list_groups(results):
        num_edits = sum(edit.group == group for edit in edits)
        rows = [
            [
                result.name,
                *(_format_cell(result, metric, group) for metric in METRICS),
                format_seconds(result.seconds),
            ]
            for result in results
        ]
        lines += [f"**{group or 'all edits'}** ({num_edits} edits)", ""]
        lines += [*format_markdown_table(["LoRA", *METRICS, "seconds"], rows), ""]
    if any(edit.truth for edit in edits):
        accuracies = [result.compute_mean_by_kind("accuracy") for result in results]
        rows = [
            [kind, *(f"{by_kind[kind]:.2f}" for by_kind in accuracies)] for kind in accuracies[0]
        ]
        header = ["accuracy of", *(result.name for result in results)]
        lines += [*format_markdown_table(header, rows), ""]
    if reversal is not None:
        lines += _format_reversal(reversal)
    return "\n".join(lines) + "\n"


def _format_reversal(reversal: ReversalErrors) -> list[str]:
    reference = max(reversal.vae_round_trip.mean, 1e-9)
    scores = {
        "negated LoRA": reversal.negated_lora,
        f"negated LoRA {PRESERVED_SUFFIX}": reversal.negated_lora_preserved,
        "LoRA of the reversed pair": reversal.reversed_pair,
        f"LoRA of the reversed pair {PRESERVED_SUFFIX}": reversal.reversed_pair_preserved,
        "no LoRA (target unchanged)": reversal.unchanged_input,
        "input (VAE round trip)": reversal.vae_round_trip,
    }
    rows = [[name, str(score), f"{score.mean / reference:.2f} ×"] for name, score in scores.items()]
    return format_markdown_table(["reversal by", "L1 error", "relative to VAE round trip"], rows)


def build_edit_json_report(
    results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> dict[str, object]:
    """Build the same numbers as a JSON object.

    Args:
        results: Rows of the tables.
        reversal: Errors of undone edits.

    Returns:
        ``edits`` (their number), ``rows`` with mean and standard error by group and metric, and
        ``reversal`` with mean errors.
    """
    rows: list[dict[str, object]] = []
    for result in results:
        groups = {
            group: {
                metric: list_score_cells(result.compute_score(metric, group)) for metric in METRICS
            }
            for group in _list_groups(results)
        }
        rows.append(
            {
                "name": result.name,
                "seconds": result.seconds,
                "groups": groups,
                "kinds": result.compute_mean_by_kind("accuracy"),
            }
        )
    reversal_means = None
    if reversal is not None:
        reversal_means = {name: score.mean for name, score in vars(reversal).items()}
    return {"edits": len(results[0].edits), "rows": rows, "reversal": reversal_means}


def write_edit_report(
    folder: Path, results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> None:
    """Write ``report.md``, ``results.csv``, ``kinds.csv`` and ``sheet.png``.

    ``results.csv`` has one row per result and group, ``kinds.csv`` one per result and kind of edit.

    Args:
        folder: Folder to write.
        results: Rows of the tables.
        reversal: Errors of undone edits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(
        format_edit_markdown(results, reversal) + "\n![sheet](sheet.png)\n"
    )
    _write_csv_files(folder, results)
    draw_edit_sheet(results).save(folder / "sheet.png")


def _write_csv_files(folder: Path, results: Sequence[EditResult]) -> None:
    metric_columns = [name for metric in METRICS for name in (metric, f"{metric}_standard_error")]
    rows = [
        [
            result.name,
            group,
            *(
                cell
                for metric in METRICS
                for cell in list_score_cells(result.compute_score(metric, group))
            ),
            result.seconds,
        ]
        for result in results
        for group in _list_groups(results)
    ]
    write_csv(folder / "results.csv", ["name", "group", *metric_columns, "seconds"], rows)
    kind_rows = [
        [result.name, kind, accuracy]
        for result in results
        for kind, accuracy in result.compute_mean_by_kind("accuracy").items()
    ]
    write_csv(folder / "kinds.csv", ["name", "kind", "accuracy"], kind_rows)


def _list_groups(results: Sequence[EditResult]) -> list[str]:
    """Groups of edits in order of appearance."""
    return list(dict.fromkeys(edit.group for edit in results[0].edits))


def draw_edit_sheet(results: Sequence[EditResult]) -> Image.Image:
    """Draw the first edit of every kind: example pair, input, target and all results."""
    grid: list[list[Image.Image]] = []
    kinds: set[str] = set()
    first_image = 0
    for edit in results[0].edits:
        if edit.kind not in kinds or not edit.kind:
            kinds.add(edit.kind)
            images = [*edit.example_pairs[0], *edit.test_pairs[0]]
            images += [result.images[first_image] for result in results]
            grid.append([to_image(image) for image in images])
        first_image += len(edit.test_pairs)
    titles = ["A", "A'", "B", "target B'", *(result.name for result in results)]
    return draw_contact_sheet(titles, grid[:_MAX_SHEET_ROWS])


def _format_cell(result: EditResult, metric: str, group: str) -> str:
    score = result.compute_score(metric, group)
    num_decimals = _NUM_DECIMALS.get(metric, 3)
    return f"{score.mean:.{num_decimals}f} ± {score.standard_error:.{num_decimals}f}"
