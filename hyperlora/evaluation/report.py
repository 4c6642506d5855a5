"""Report of a subject evaluation: tables, a contact sheet, and a plot of identity and prompt
accuracy.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.subject_evaluator import SubjectResult
from hyperlora.evaluation.tables import (
    EMPTY_CELL,
    format_markdown_table,
    format_seconds,
    list_score_cells,
    write_csv,
)

matplotlib.use("Agg")


def format_markdown(results: Sequence[SubjectResult]) -> str:
    """Format the table of results, the accuracy of each attribute, and the paired comparison."""
    rows = [
        [
            result.name,
            str(result.identity),
            str(result.prompt_accuracy or EMPTY_CELL),
            format_seconds(result.seconds),
        ]
        for result in results
    ]
    header = ["LoRA", "identity", "prompt accuracy", "seconds per LoRA"]
    lines = format_markdown_table(header, rows)
    if attributes := _list_attributes(results):
        attribute_rows = [
            [result.name, *(f"{result.attribute_accuracy[name]:.2f}" for name in attributes)]
            for result in results
        ]
        header = ["prompt accuracy of", *attributes]
        lines += ["", *format_markdown_table(header, attribute_rows)]
    return "\n".join([*lines, *_format_comparisons(results)]) + "\n"


def _list_attributes(results: Sequence[SubjectResult]) -> list[str]:
    """Names of all attributes with an accuracy, sorted."""
    return sorted({name for result in results for name in result.attribute_accuracy})


def _format_comparisons(results: Sequence[SubjectResult]) -> list[str]:
    """Differences of identity between each reference and its variants, subject by subject."""
    comparisons: list[tuple[SubjectResult, list[str]]] = []
    for result in results:
        if result.role == "reference":
            comparisons.append((result, []))
        elif result.role == "variant" and comparisons:
            reference, differences = comparisons[-1]
            difference = result.identity.compute_paired_difference(reference.identity)
            differences.append(f"{result.name} {_format_difference(difference)}")
    lines = [
        f"identity, subject by subject, against {reference.name}: {'; '.join(differences)}."
        for reference, differences in comparisons
        if differences
    ]
    return ["", *lines] if lines else []


def _format_difference(score: Score) -> str:
    return f"{score.mean:+.3f} ± {score.standard_error:.3f}"


def build_json_report(results: Sequence[SubjectResult]) -> list[dict[str, object]]:
    """Build the results as JSON objects, one per row."""
    report: list[dict[str, object]] = []
    for result in results:
        prompt_accuracy, prompt_accuracy_error = list_score_cells(result.prompt_accuracy)
        report.append(
            {
                "name": result.name,
                "identity": result.identity.mean,
                "identity_standard_error": result.identity.standard_error,
                "prompt_accuracy": prompt_accuracy,
                "prompt_accuracy_standard_error": prompt_accuracy_error,
                "seconds": result.seconds,
                "attribute_accuracy": dict(result.attribute_accuracy),
            }
        )
    return report


def write_report(
    folder: Path, results: Sequence[SubjectResult], photos: Sequence[Image.Image]
) -> None:
    """Write ``report.md``, ``results.csv``, ``attributes.csv``, ``sheet.png`` and ``scores.png``.

    ``attributes.csv`` has one row per result and attribute. The sheet shows six subjects, all
    results and two prompts.

    Args:
        folder: Folder to write.
        results: Rows of the table.
        photos: Photo of each subject.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(
        format_markdown(results) + "\n![sheet](sheet.png)\n\n![scores](scores.png)\n"
    )
    _write_csv_files(folder, results)
    subjects = range(min(6, len(photos)))
    columns = [("photo", list(photos))] + [
        (f"{result.name} · {p + 1}", [result.images[s][p] for s in subjects])
        for result in results
        if result.images
        for p in range(min(2, len(result.images[0])))
    ]
    titles = [title for title, _ in columns]
    grid = [[images[s] for _, images in columns] for s in subjects]
    draw_contact_sheet(titles, grid).save(folder / "sheet.png")
    _plot_scores(results).savefig(folder / "scores.png", dpi=120)
    plt.close("all")


def _write_csv_files(folder: Path, results: Sequence[SubjectResult]) -> None:
    header = [
        "name",
        "identity",
        "identity_standard_error",
        "prompt_accuracy",
        "prompt_accuracy_standard_error",
        "seconds",
    ]
    rows = [
        [
            result.name,
            *list_score_cells(result.identity),
            *list_score_cells(result.prompt_accuracy),
            result.seconds,
        ]
        for result in results
    ]
    write_csv(folder / "results.csv", header, rows)
    attribute_rows = [
        [result.name, attribute, result.attribute_accuracy[attribute]]
        for result in results
        for attribute in sorted(result.attribute_accuracy)
    ]
    write_csv(folder / "attributes.csv", ["name", "attribute", "accuracy"], attribute_rows)


def draw_contact_sheet(
    column_titles: Sequence[str],
    grid: Sequence[Sequence[Image.Image]],
    cell_size: int = 128,
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Draw images in a grid with titles, on white.

    Args:
        column_titles: Titles above the columns, wrapped to their width.
        grid: Images, row by row; each is resized to a square.
        cell_size: Side of each image in pixels.
        row_labels: Labels on the left of the rows; none: no label column.

    Returns:
        The sheet.
    """
    font = ImageFont.load_default(size=14)
    gap, max_text_width = 4, cell_size - 8
    title_lines = [_wrap_text(title, font, max_text_width) for title in column_titles]
    header_height = 10 + 17 * max(len(lines) for lines in title_lines)
    label_width = gap + (cell_size if row_labels else 0)
    width = label_width + len(column_titles) * (cell_size + gap)
    height = header_height + len(grid) * (cell_size + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def draw_text(position: tuple[int, int], lines: Sequence[str]) -> None:
        draw.multiline_text(position, "\n".join(lines), fill="#222222", font=font, spacing=2)

    for x, lines in enumerate(title_lines):
        draw_text((label_width + x * (cell_size + gap) + 2, 4), lines)
    for y, label in enumerate(row_labels):
        position = (gap + 2, header_height + y * (cell_size + gap) + 4)
        draw_text(position, _wrap_text(label, font, max_text_width))
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
    for result in results:
        identity, prompt_accuracy = result.identity, result.prompt_accuracy
        if prompt_accuracy is None:
            axes.axvline(identity.mean, alpha=0.4)
            continue
        axes.errorbar(
            identity.mean,
            prompt_accuracy.mean,
            xerr=identity.standard_error,
            yerr=prompt_accuracy.standard_error,
            fmt="o",
            capsize=2,
        )
        position = (identity.mean, prompt_accuracy.mean)
        axes.annotate(result.name, position, fontsize=7, xytext=(5, 4), textcoords="offset points")
    axes.set_xlabel("identity (0: another subject, 1: another real photo)")
    axes.set_ylabel("prompt accuracy")
    axes.grid(alpha=0.3)
    return figure
