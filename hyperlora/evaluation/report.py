"""Report of a subject evaluation: tables, a contact sheet, and a plot of identity and prompt
accuracy.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image

from hyperlora.data.contact_sheet import draw_contact_sheet
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
