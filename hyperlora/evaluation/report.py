"""The report of an evaluation: a table, a contact sheet, and identity against prompt as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.subject_evaluator import Row

matplotlib.use("Agg")


def markdown(rows: Sequence[Row]) -> str:
    """The table, as in ``docs/results.md``."""
    lines = ["| | I | P | seconds per LoRA |", "|---|---|---|---|"]
    for row in rows:
        seconds = f"{row.seconds:.3f}" if row.seconds is not None else "–"
        lines.append(f"| {row.name} | {row.identity} | {row.prompt or '–'} | {seconds} |")
    if names := sorted({name for row in rows for name in row.attributes}):
        lines += ["", f"| P of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row in rows:
            lines.append(f"| {row.name} | {' | '.join(f'{row.attributes[n]:.2f}' for n in names)} |")
    return "\n".join([*lines, *_compared(rows)]) + "\n"


COMPARED: Final = "one photo"
"""The row that rows of the same people made otherwise are compared with."""


def _compared(rows: Sequence[Row]) -> list[str]:
    """What refining, more photos, choosing or fitting brings, person by person."""
    plain = next((row for row in rows if row.name == COMPARED), None)
    wanted = ("refined", "best of", "photos", "fitted")
    others = [row for row in rows if any(word in row.name for word in wanted)]
    if plain is None or not others:
        return []
    found = [f"{row.name} {_signed(row.identity.above(plain.identity))}" for row in others]
    return ["", f"I, person by person, against {COMPARED}: {'; '.join(found)}."]


def _signed(score: Score) -> str:
    return f"{score.mean:+.3f} ± {score.error:.3f}"


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [
        {
            "name": row.name,
            "identity": row.identity.mean,
            "identity_error": row.identity.error,
            "prompt": row.prompt.mean if row.prompt else None,
            "prompt_error": row.prompt.error if row.prompt else None,
            "seconds": row.seconds,
            "attributes": dict(row.attributes),
        }
        for row in rows
    ]


def write_report(folder: Path, rows: Sequence[Row], photos: Sequence[Image.Image]) -> None:
    """``report.md``, ``sheet.png`` (six subjects, all rows, two prompts) and ``scores.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(rows) + "\n![sheet](sheet.png)\n\n![scores](scores.png)\n")
    subjects = range(min(6, len(photos)))
    columns = [("photo", list(photos))] + [
        (f"{row.name} · {p + 1}", [row.images[s][p] for s in subjects])
        for row in rows
        if row.images
        for p in range(min(2, len(row.images[0])))
    ]
    contact_sheet([c[0] for c in columns], [[c[1][s] for c in columns] for s in subjects]).save(folder / "sheet.png")
    _plot(rows).savefig(folder / "scores.png", dpi=120)
    plt.close("all")


def contact_sheet(
    titles: Sequence[str], grid: Sequence[Sequence[Image.Image]], cell: int = 128, labels: Sequence[str] = ()
) -> Image.Image:
    """Pictures in rows under column titles (wrapped), on white; ``labels`` stand at the left of their rows."""
    font = ImageFont.load_default(size=12)
    wrapped = [_wrap(title, font, cell - 8) for title in titles]
    top = 10 + 15 * max(len(lines) for lines in wrapped)
    gap = 4
    left = gap + (cell if labels else 0)
    sheet = Image.new("RGB", (left + len(titles) * (cell + gap), top + len(grid) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, lines in enumerate(wrapped):
        pen.multiline_text((left + x * (cell + gap) + 2, 4), "\n".join(lines), fill="#222222", font=font, spacing=2)
    for y, label in enumerate(labels):
        lines = _wrap(label, font, cell - 8)
        pen.multiline_text(
            (gap + 2, top + y * (cell + gap) + 4), "\n".join(lines), fill="#222222", font=font, spacing=2
        )
    for y, row in enumerate(grid):
        for x, picture in enumerate(row):
            at = (left + x * (cell + gap), top + y * (cell + gap))
            sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), at)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _plot(rows: Sequence[Row]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for row in rows:
        if row.prompt is None:
            axes.axvline(row.identity.mean, alpha=0.4)
            continue
        axes.errorbar(
            row.identity.mean, row.prompt.mean, xerr=row.identity.error, yerr=row.prompt.error, fmt="o", capsize=2
        )
        at = (row.identity.mean, row.prompt.mean)
        axes.annotate(row.name, at, fontsize=7, xytext=(5, 4), textcoords="offset points")
    axes.set_xlabel("identity score I (0 anyone, 1 another real portrait)")
    axes.set_ylabel("prompt score P")
    axes.grid(alpha=0.3)
    return figure
