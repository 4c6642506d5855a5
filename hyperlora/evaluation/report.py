"""The report of an evaluation: a table, a contact sheet, and identity against prompt as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.subject_evaluator import SubjectResult

matplotlib.use("Agg")


def format_markdown(results: Sequence[SubjectResult]) -> str:
    """The table, as in ``docs/results.md``."""
    lines = ["| | I | P | seconds per LoRA |", "|---|---|---|---|"]
    for row in results:
        seconds = f"{row.seconds:.3f}" if row.seconds is not None else "–"
        lines.append(f"| {row.name} | {row.identity} | {row.prompt_accuracy or '–'} | {seconds} |")
    if names := sorted({name for row in results for name in row.attribute_accuracy}):
        lines += ["", f"| P of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row in results:
            lines.append(
                f"| {row.name} | {' | '.join(f'{row.attribute_accuracy[n]:.2f}' for n in names)} |"
            )
    return "\n".join([*lines, *_format_comparison(results)]) + "\n"


REFERENCE_NAME: Final = "one photo"
"""The row that rows of the same people made otherwise are compared with."""


def _format_comparison(results: Sequence[SubjectResult]) -> list[str]:
    """What refining, more photos, choosing or fitting brings, person by person."""
    reference = next((row for row in results if row.name == REFERENCE_NAME), None)
    variant_names = ("refined", "best of", "photos", "fitted")
    variants = [row for row in results if any(word in row.name for word in variant_names)]
    if reference is None or not variants:
        return []
    differences = [
        f"{row.name} {_format_difference(row.identity.compute_paired_difference(reference.identity))}"
        for row in variants
    ]
    return ["", f"I, person by person, against {REFERENCE_NAME}: {'; '.join(differences)}."]


def _format_difference(score: Score) -> str:
    return f"{score.mean:+.3f} ± {score.standard_error:.3f}"


def build_json_report(results: Sequence[SubjectResult]) -> list[dict[str, object]]:
    return [
        {
            "name": row.name,
            "identity": row.identity.mean,
            "identity_error": row.identity.standard_error,
            "prompt": row.prompt_accuracy.mean if row.prompt_accuracy else None,
            "prompt_error": row.prompt_accuracy.standard_error if row.prompt_accuracy else None,
            "seconds": row.seconds,
            "attributes": dict(row.attribute_accuracy),
        }
        for row in results
    ]


def write_report(
    folder: Path, results: Sequence[SubjectResult], photos: Sequence[Image.Image]
) -> None:
    """``report.md``, ``sheet.png`` (six subjects, all rows, two prompts) and ``scores.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(
        format_markdown(results) + "\n![sheet](sheet.png)\n\n![scores](scores.png)\n"
    )
    subjects = range(min(6, len(photos)))
    columns = [("photo", list(photos))] + [
        (f"{row.name} · {p + 1}", [row.images[s][p] for s in subjects])
        for row in results
        if row.images
        for p in range(min(2, len(row.images[0])))
    ]
    draw_contact_sheet(
        [c[0] for c in columns], [[c[1][s] for c in columns] for s in subjects]
    ).save(folder / "sheet.png")
    _plot_scores(results).savefig(folder / "scores.png", dpi=120)
    plt.close("all")


def draw_contact_sheet(
    column_titles: Sequence[str],
    grid: Sequence[Sequence[Image.Image]],
    cell_size: int = 128,
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Pictures in rows under column titles (wrapped), on white; ``row_labels`` stand at the left of their rows."""
    font = ImageFont.load_default(size=12)
    title_lines = [_wrap_text(title, font, cell_size - 8) for title in column_titles]
    header_height = 10 + 15 * max(len(lines) for lines in title_lines)
    gap = 4
    label_width = gap + (cell_size if row_labels else 0)
    sheet = Image.new(
        "RGB",
        (
            label_width + len(column_titles) * (cell_size + gap),
            header_height + len(grid) * (cell_size + gap),
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for x, lines in enumerate(title_lines):
        draw.multiline_text(
            (label_width + x * (cell_size + gap) + 2, 4),
            "\n".join(lines),
            fill="#222222",
            font=font,
            spacing=2,
        )
    for y, label in enumerate(row_labels):
        lines = _wrap_text(label, font, cell_size - 8)
        draw.multiline_text(
            (gap + 2, header_height + y * (cell_size + gap) + 4),
            "\n".join(lines),
            fill="#222222",
            font=font,
            spacing=2,
        )
    for y, row in enumerate(grid):
        for x, image in enumerate(row):
            position = (label_width + x * (cell_size + gap), header_height + y * (cell_size + gap))
            sheet.paste(image.resize((cell_size, cell_size), Image.Resampling.LANCZOS), position)
    return sheet


def _wrap_text(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= max_width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    return lines


def _plot_scores(results: Sequence[SubjectResult]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for row in results:
        if row.prompt_accuracy is None:
            axes.axvline(row.identity.mean, alpha=0.4)
            continue
        axes.errorbar(
            row.identity.mean,
            row.prompt_accuracy.mean,
            xerr=row.identity.standard_error,
            yerr=row.prompt_accuracy.standard_error,
            fmt="o",
            capsize=2,
        )
        position = (row.identity.mean, row.prompt_accuracy.mean)
        axes.annotate(row.name, position, fontsize=7, xytext=(5, 4), textcoords="offset points")
    axes.set_xlabel("identity score I (0 anyone, 1 another real portrait)")
    axes.set_ylabel("prompt score P")
    axes.grid(alpha=0.3)
    return figure
