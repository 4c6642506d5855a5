"""The audit as one page: numbers, what was flagged, and pictures of the best, median and worst rows."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_builder.audit.checks import Finding
from data_builder.audit.scoring import Drawn
from hyperlora.lora.io.safetensors_file import write_bytes

_STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:60em;padding:0 1em;color:#222;background:#fff}"
    "img{height:128px;margin:2px;border-radius:4px}figure{display:inline-block;margin:.5em}td,th{padding:.2em .8em;"
    "text-align:left;border-bottom:1px solid #ddd}figcaption{font-size:13px}"
)


def best_median_worst(scores: Mapping[int, float], n: int) -> dict[str, list[int]]:
    """``n`` rows of each, by score, best first."""
    order = sorted(scores, key=lambda i: -scores[i])
    middle = max(0, (len(order) - n) // 2)
    return {"best": order[:n], "median": order[middle : middle + n], "worst": order[-n:]}


def write_page(
    path: Path, title: str, findings: Sequence[Finding], scores: Mapping[int, float], what: str, drawn: Sequence[Drawn]
) -> None:
    """``path`` (HTML, pictures inside): ``what`` names the score, ``drawn`` are the rows that can be shown."""
    flagged = [f for f in findings if f.flags]
    values = sorted(scores.values())
    parts = [f"<h1>{html.escape(title)}</h1><p>{len(findings)} LoRAs, {len(flagged)} flagged.</p>"]
    if values:
        quartiles = [values[min(len(values) - 1, len(values) * q // 4)] for q in range(5)]
        cells = "".join(f"<td>{v:.3f}</td>" for v in quartiles)
        heads = "".join(f"<th>{name}</th>" for name in ("lowest", "25 %", "median", "75 %", "highest"))
        parts.append(f"<h2>{html.escape(what)}</h2><table><tr>{heads}</tr><tr>{cells}</tr></table>")
    shown = {d.row: d for d in drawn}
    n = max(1, len(drawn) // 3)
    for name, rows in best_median_worst({i: scores[i] for i in shown if i in scores}, n).items():
        figures = "".join(_figure(shown[i], findings[i], scores[i]) for i in rows)
        parts.append(f"<h2>{name}</h2>{figures}")
    lines = "".join(
        f"<tr><td>{html.escape(f.subject)}</td><td>{f.view}</td><td>{html.escape('; '.join(f.flags))}</td></tr>"
        for f in flagged
    )
    parts.append(f"<h2>flagged</h2><table><tr><th>subject</th><th>view</th><th>why</th></tr>{lines}</table>")
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    write_bytes((page + "".join(parts)).encode(), path)


def _figure(drawn: Drawn, finding: Finding, score: float) -> str:
    pictures = [p for p in (drawn.photo, *drawn.pictures) if p is not None]
    images = "".join(f'<img alt="" src="data:image/png;base64,{_encoded(p)}">' for p in pictures)
    return f"<figure>{images}<figcaption>{html.escape(finding.subject)}: {score:.3f}</figcaption></figure>"


def _encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
