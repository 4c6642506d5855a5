"""The report of an evaluation of edits: a table for each group of edits, and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hyperlora.data.images import to_image
from hyperlora.evaluation.edit_evaluator import METRICS, EditRow
from hyperlora.evaluation.edit_suite import Undone
from hyperlora.evaluation.report import contact_sheet

_DIGITS = {"psnr": 1}


def edit_markdown(rows: Sequence[EditRow], reverse: Undone | None = None) -> str:
    """A table for each group of edits, one of the accuracy by kind, and how well edits are undone."""
    groups = list(dict.fromkeys(edit.group for edit in rows[0].edits))
    named = any(edit.truth for edit in rows[0].edits)
    lines: list[str] = []
    for group in groups:
        count = sum(edit.group == group for edit in rows[0].edits)
        lines += [f"**{group or 'all edits'}** ({count} edits)", ""]
        lines += [f"| | {' | '.join(METRICS)} | seconds |", "|---" * (len(METRICS) + 2) + "|"]
        for row in rows:
            cells = [_cell(row, metric, group) for metric in METRICS]
            seconds = f"{row.seconds:.3f}" if row.seconds is not None else "–"
            lines.append(f"| {row.name} | {' | '.join(cells)} | {seconds} |")
        lines.append("")
    if named:
        kinds = list(rows[0].by_kind("accuracy"))
        lines += [f"| accuracy of | {' | '.join(row.name for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
        found = [row.by_kind("accuracy") for row in rows]
        lines += [f"| {kind} | {' | '.join(f'{of[kind]:.2f}' for of in found)} |" for kind in kinds]
        lines.append("")
    if reverse is not None:
        around = reverse.round_trip
        lines += ["| undone by | error | of the autoencoder's |", "|---|---|---|"]
        lines += [
            f"| {name} | {error} | {error.mean / max(around.mean, 1e-9):.2f} × |"
            for name, error in (
                ("-Δ", reverse.undone), ("-Δ, the rest kept", reverse.undone_kept),
                ("the pair turned round", reverse.turned),
                ("the pair turned round, the rest kept", reverse.turned_kept),
                ("nothing: the answer as it is", reverse.untouched), ("the picture, through the autoencoder", around),
            )
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def edits_as_json(rows: Sequence[EditRow], reverse: Undone | None = None) -> dict[str, object]:
    """The same numbers: by row, group and metric."""
    groups = list(dict.fromkeys(edit.group for edit in rows[0].edits))
    table = [
        {
            "name": row.name,
            "seconds": row.seconds,
            "groups": {g: {m: [row.score(m, g).mean, row.score(m, g).error] for m in METRICS} for g in groups},
            "kinds": row.by_kind("accuracy"),
        }
        for row in rows
    ]
    back = {k: v.mean for k, v in vars(reverse).items()} if reverse is not None else None
    return {"edits": len(rows[0].edits), "rows": table, "reverse": back}


def write_edit_report(folder: Path, rows: Sequence[EditRow], reverse: Undone | None = None) -> None:
    """``report.md`` and ``sheet.png``: for the first edit of every kind the pair, the picture to edit, its answer and
    what every row made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(edit_markdown(rows, reverse) + "\n![sheet](sheet.png)\n")
    sheet(rows).save(folder / "sheet.png")


def sheet(rows: Sequence[EditRow]) -> Image.Image:
    """One line for the first edit of every kind."""
    edits, grid, kinds, first = rows[0].edits, [], set(), 0
    for edit in edits:
        if edit.kind not in kinds or not edit.kind:
            kinds.add(edit.kind)
            drawn = [edit.shown[0, 0], edit.shown[0, 1], edit.others[0, 0], edit.others[0, 1]]
            grid.append([to_image(x) for x in (*drawn, *(row.pictures[first] for row in rows))])
        first += len(edit.others)
    titles = ["A", "A'", "B", "the answer B'", *(row.name for row in rows)]
    return contact_sheet(titles, grid[:24])


def _cell(row: EditRow, metric: str, group: str) -> str:
    score = row.score(metric, group)
    digits = _DIGITS.get(metric, 3)
    return f"{score.mean:.{digits}f} ± {score.error:.{digits}f}"
