"""The report of an evaluation of edits: a table for each group of edits, and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hyperlora.data.images import to_image
from hyperlora.evaluation.edit_evaluator import METRICS, EditResult
from hyperlora.evaluation.edit_suite import ReversalErrors
from hyperlora.evaluation.report import draw_contact_sheet

_DECIMALS = {"psnr": 1}


def format_edit_markdown(
    results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> str:
    """A table for each group of edits, one of the accuracy by kind, and how well edits are undone."""
    groups = list(dict.fromkeys(edit.group for edit in results[0].edits))
    has_truth = any(edit.truth for edit in results[0].edits)
    lines: list[str] = []
    for group in groups:
        count = sum(edit.group == group for edit in results[0].edits)
        lines += [f"**{group or 'all edits'}** ({count} edits)", ""]
        lines += [f"| | {' | '.join(METRICS)} | seconds |", "|---" * (len(METRICS) + 2) + "|"]
        for row in results:
            cells = [_format_cell(row, metric, group) for metric in METRICS]
            seconds = f"{row.seconds:.3f}" if row.seconds is not None else "–"
            lines.append(f"| {row.name} | {' | '.join(cells)} | {seconds} |")
        lines.append("")
    if has_truth:
        kinds = list(results[0].compute_mean_by_kind("accuracy"))
        lines += [
            f"| accuracy of | {' | '.join(row.name for row in results)} |",
            "|---" * (len(results) + 1) + "|",
        ]
        accuracy_by_kind = [row.compute_mean_by_kind("accuracy") for row in results]
        lines += [
            f"| {kind} | {' | '.join(f'{of[kind]:.2f}' for of in accuracy_by_kind)} |"
            for kind in kinds
        ]
        lines.append("")
    if reversal is not None:
        round_trip = reversal.vae_round_trip
        lines += ["| undone by | error | of the autoencoder's |", "|---|---|---|"]
        lines += [
            f"| {name} | {error} | {error.mean / max(round_trip.mean, 1e-9):.2f} × |"
            for name, error in (
                ("-Δ", reversal.negated_lora),
                ("-Δ, the rest kept", reversal.negated_lora_preserved),
                ("the pair turned round", reversal.reversed_pair),
                ("the pair turned round, the rest kept", reversal.reversed_pair_preserved),
                ("nothing: the answer as it is", reversal.unchanged_input),
                ("the picture, through the autoencoder", round_trip),
            )
        ]
    return "\n".join(lines) + "\n"


def build_edit_json_report(
    results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> dict[str, object]:
    """The same numbers: by row, group and metric."""
    groups = list(dict.fromkeys(edit.group for edit in results[0].edits))
    table = [
        {
            "name": row.name,
            "seconds": row.seconds,
            "groups": {
                g: {
                    m: [row.compute_score(m, g).mean, row.compute_score(m, g).standard_error]
                    for m in METRICS
                }
                for g in groups
            },
            "kinds": row.compute_mean_by_kind("accuracy"),
        }
        for row in results
    ]
    reversal_means = (
        {k: v.mean for k, v in vars(reversal).items()} if reversal is not None else None
    )
    return {"edits": len(results[0].edits), "rows": table, "reverse": reversal_means}


def write_edit_report(
    folder: Path, results: Sequence[EditResult], reversal: ReversalErrors | None = None
) -> None:
    """``report.md`` and ``draw_edit_sheet.png``: for the first edit of every kind the pair, the picture to edit, its answer and
    what every row made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(
        format_edit_markdown(results, reversal) + "\n![sheet](sheet.png)\n"
    )
    draw_edit_sheet(results).save(folder / "sheet.png")


def draw_edit_sheet(results: Sequence[EditResult]) -> Image.Image:
    """One line for the first edit of every kind."""
    edits, grid, kinds, first_image = results[0].edits, [], set(), 0
    for edit in edits:
        if edit.kind not in kinds or not edit.kind:
            kinds.add(edit.kind)
            example_images = [
                edit.example_pairs[0, 0],
                edit.example_pairs[0, 1],
                edit.test_pairs[0, 0],
                edit.test_pairs[0, 1],
            ]
            grid.append(
                [
                    to_image(x)
                    for x in (*example_images, *(row.images[first_image] for row in results))
                ]
            )
        first_image += len(edit.test_pairs)
    titles = ["A", "A'", "B", "the answer B'", *(row.name for row in results)]
    return draw_contact_sheet(titles, grid[:24])


def _format_cell(result: EditResult, metric: str, group: str) -> str:
    score = result.compute_score(metric, group)
    num_decimals = _DECIMALS.get(metric, 3)
    return f"{score.mean:.{num_decimals}f} ± {score.standard_error:.{num_decimals}f}"
