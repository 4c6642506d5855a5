"""Report of an audit as one HTML page: score quartiles, images of best, median and worst rows,
flags.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_builder.audit.checks import Finding
from data_builder.audit.scoring import RowImages
from hyperlora.lora.io.safetensors_file import write_bytes

_CSS = (
    "body{font:15px system-ui;margin:2em auto;max-width:60em;padding:0 1em;"
    "color:#222;background:#fff}"
    "img{height:128px;margin:2px;border-radius:4px}figure{display:inline-block;margin:.5em}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
    "figcaption{font-size:13px}"
)


def select_best_median_worst(scores: Mapping[int, float], num_rows: int) -> dict[str, list[int]]:
    """Select the rows of best, median and worst score.

    Args:
        scores: Score by row.
        num_rows: Rows of each group.

    Returns:
        Rows by group, best first.
    """
    order = sorted(scores, key=lambda i: -scores[i])
    median_start = max(0, (len(order) - num_rows) // 2)
    return {
        "best": order[:num_rows],
        "median": order[median_start : median_start + num_rows],
        "worst": order[-num_rows:],
    }


def write_html_report(
    path: Path,
    title: str,
    findings: Sequence[Finding],
    scores: Mapping[int, float],
    score_name: str,
    row_images: Sequence[RowImages],
) -> None:
    """Write the report of an audit with embedded images.

    Args:
        path: File to write.
        title: Title of the page.
        findings: One finding per row.
        scores: Score by row.
        score_name: Name of the score.
        row_images: Images of the rows to show.
    """
    flagged = [f for f in findings if f.flags]
    values = sorted(scores.values())
    sections = [
        f"<h1>{html.escape(title)}</h1><p>{len(findings)} LoRAs, {len(flagged)} flagged.</p>"
    ]
    if values:
        quartiles = [values[min(len(values) - 1, len(values) * q // 4)] for q in range(5)]
        cells = "".join(f"<td>{v:.3f}</td>" for v in quartiles)
        header_cells = "".join(
            f"<th>{name}</th>" for name in ("lowest", "25 %", "median", "75 %", "highest")
        )
        sections.append(
            f"<h2>{html.escape(score_name)}</h2>"
            f"<table><tr>{header_cells}</tr><tr>{cells}</tr></table>"
        )
    images_by_row = {images.row: images for images in row_images}
    rows_per_group = max(1, len(row_images) // 3)
    shown_scores = {i: scores[i] for i in images_by_row if i in scores}
    for name, rows in select_best_median_worst(shown_scores, rows_per_group).items():
        figures = "".join(_format_figure(images_by_row[i], findings[i], scores[i]) for i in rows)
        sections.append(f"<h2>{name}</h2>{figures}")
    flagged_rows = "".join(
        f"<tr><td>{html.escape(finding.subject)}</td><td>{finding.repetition}</td>"
        f"<td>{html.escape('; '.join(finding.flags))}</td></tr>"
        for finding in flagged
    )
    sections.append(
        "<h2>flagged</h2><table><tr><th>subject</th><th>repetition</th><th>reason</th></tr>"
        f"{flagged_rows}</table>"
    )
    html_head = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_CSS}</style>"
    )
    write_bytes((html_head + "".join(sections)).encode(), path)


def _format_figure(row_images: RowImages, finding: Finding, score: float) -> str:
    """Format a photo and the images of a row as HTML."""
    shown_images = [image for image in (row_images.photo, *row_images.images) if image is not None]
    tags = "".join(
        f'<img alt="" src="data:image/png;base64,{_encode_base64(image)}">'
        for image in shown_images
    )
    caption = f"{html.escape(finding.subject)}: {score:.3f}"
    return f"<figure>{tags}<figcaption>{caption}</figcaption></figure>"


def _encode_base64(image: Image.Image) -> str:
    """Encode an image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
