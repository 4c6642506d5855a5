"""The whole audit of a build: scores, findings, page."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_builder.audit.checks import Finding, examine, gains, write_findings
from data_builder.audit.report import best_median_worst, write_page
from data_builder.audit.scoring import draw_rows, likeness
from data_builder.build.chunk_store import Chunks, require_whole
from data_builder.build.plan import read_plan
from data_builder.build.trainer import open_base
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.encoders.attribute_classifier import Reader

PAGE = Path("audit") / "index.html"


@dataclass(frozen=True)
class Audit:
    """``threshold`` of the score, ``sample`` rows that are drawn for it (None: all), ``pictures`` on the page of each
    of best, median and worst (0: none)."""

    evaluator: Path | None = None
    threshold: float = 0.0
    sample: int | None = None
    pictures: int = 4
    steps: int = 12


def audit(build: Path, settings: Audit, partial: bool = False) -> list[Finding]:
    """Examine a build's finished chunks and write ``audit/findings.jsonl`` and ``audit/index.html``.

    With an evaluator the score is the identity it reads in pictures drawn with each LoRA; without one it is how much of
    the denoising loss the LoRA removes on its subject's photos (held-out ones where the plan keeps any). Raises
    ``BadRequest`` for an unfinished build (unless ``partial``).
    """
    plan = read_plan(build)
    require_whole(Chunks(plan, build), partial)
    dataset = LoraDataset(build)
    fine = [i for i in range(len(dataset)) if bool(dataset[i].isfinite().all())]
    scores, drawn, what = gains(dataset), [], "share of the denoising loss that the LoRA removes"
    if settings.evaluator is not None:
        rows = _spread(fine, settings.sample)
        drawn = draw_rows(plan, dataset, open_base(plan.recipe), rows, steps=settings.steps)
        scores, what = likeness(drawn, Reader.from_pretrained(settings.evaluator)), "identity"
    groups = best_median_worst({i: scores[i] for i in scores if i in set(fine)}, settings.pictures)
    shown = list(dict.fromkeys(i for rows in groups.values() for i in rows)) if settings.pictures else []
    if settings.evaluator is None and shown:
        drawn = draw_rows(plan, dataset, open_base(plan.recipe), shown, steps=settings.steps)
    findings = examine(dataset, scores, settings.threshold)
    write_page(build / PAGE, build.resolve().name, findings, scores, what, [d for d in drawn if d.row in set(shown)])
    write_findings(findings, build)
    return findings


def _spread(rows: list[int], most: int | None) -> list[int]:
    """``most`` of ``rows``, a random but fixed choice, in order."""
    if most is None or most >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]
    return [rows[i] for i in sorted(order.tolist())]
