"""The whole audit of a build: scores, findings, page."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_builder.audit.checks import Finding, audit_rows, compute_loss_reductions, write_findings
from data_builder.audit.report import select_best_median_worst, write_html_report
from data_builder.audit.scoring import compute_identity_scores, render_rows
from data_builder.build.chunk_store import ChunkStore, check_complete
from data_builder.build.plan import read_plan
from data_builder.build.trainer import load_recipe_base
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.encoders.attribute_classifier import AttributeClassifier

REPORT_PATH = Path("audit") / "index.html"


@dataclass(frozen=True)
class AuditConfig:
    """``threshold`` of the score, ``num_scored_rows`` rows that are drawn for it (None: all), ``rows_per_group`` on the page of each
    of best, median and worst (0: none)."""

    evaluator: Path | None = None
    threshold: float = 0.0
    num_scored_rows: int | None = None
    rows_per_group: int = 4
    num_inference_steps: int = 12


def run_audit(build: Path, config: AuditConfig, partial: bool = False) -> list[Finding]:
    """Examine a build's finished chunks and write ``run_audit/findings.jsonl`` and ``run_audit/index.html``.

    With an evaluator the score is the identity it reads in pictures drawn with each LoRA; without one it is how much of
    the denoising loss the LoRA removes on its subject's photos (held-out ones where the plan keeps any). Raises
    ``InvalidArgumentError`` for an unfinished build (unless ``partial``).
    """
    plan = read_plan(build)
    check_complete(ChunkStore(plan, build), partial)
    dataset = LoraDataset(build)
    finite_indices = [i for i in range(len(dataset)) if bool(dataset[i].isfinite().all())]
    scores, row_images, score_name = (
        compute_loss_reductions(dataset),
        [],
        "share of the denoising loss that the LoRA removes",
    )
    if config.evaluator is not None:
        rows = _sample_rows(finite_indices, config.num_scored_rows)
        row_images = render_rows(
            plan,
            dataset,
            load_recipe_base(plan.recipe),
            rows,
            num_inference_steps=config.num_inference_steps,
        )
        scores, score_name = (
            compute_identity_scores(
                row_images, AttributeClassifier.from_pretrained(config.evaluator)
            ),
            "identity",
        )
    groups = select_best_median_worst(
        {i: scores[i] for i in scores if i in set(finite_indices)}, config.rows_per_group
    )
    shown_rows = (
        list(dict.fromkeys(i for rows in groups.values() for i in rows))
        if config.rows_per_group
        else []
    )
    if config.evaluator is None and shown_rows:
        row_images = render_rows(
            plan,
            dataset,
            load_recipe_base(plan.recipe),
            shown_rows,
            num_inference_steps=config.num_inference_steps,
        )
    findings = audit_rows(dataset, scores, config.threshold)
    write_html_report(
        build / REPORT_PATH,
        build.resolve().name,
        findings,
        scores,
        score_name,
        [d for d in row_images if d.row in set(shown_rows)],
    )
    write_findings(findings, build)
    return findings


def _sample_rows(rows: list[int], num_rows: int | None) -> list[int]:
    """``num_rows`` of ``evaluate_suite``, a random but fixed choice, in order."""
    if num_rows is None or num_rows >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:num_rows]
    return [rows[i] for i in sorted(order.tolist())]
