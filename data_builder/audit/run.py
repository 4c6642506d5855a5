"""Audit of a build: scores, findings, report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from data_builder.audit.checks import Finding, audit_rows, compute_loss_reductions, write_findings
from data_builder.audit.report import select_best_median_worst, write_html_report
from data_builder.audit.scoring import RowImages, compute_identity_scores, render_rows
from data_builder.build.chunk_store import ChunkStore, check_complete
from data_builder.build.plan import read_plan
from data_builder.build.trainer import load_recipe_base
from hyperlora.compute import ComputeConfig
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.encoders.attribute_classifier import AttributeClassifier

REPORT_PATH: Final = Path("audit") / "index.html"


@dataclass(frozen=True)
class AuditConfig:
    """Settings of ``run_audit``.

    Attributes:
        evaluator: Folder of an attribute classifier; None: score rows by their loss.
        threshold: Score below which a row is flagged.
        num_scored_rows: Number of random rows to score with the evaluator; None: all.
        rows_per_group: Best, median and worst rows in the report, each; 0: none.
        num_inference_steps: Denoising steps of the images.
    """

    evaluator: Path | None = None
    threshold: float = 0.0
    num_scored_rows: int | None = None
    rows_per_group: int = 4
    num_inference_steps: int = 12


def run_audit(
    build: Path, config: AuditConfig, partial: bool = False, device: str = "auto"
) -> list[Finding]:
    """Audit the finished chunks of a build and write ``audit/findings.jsonl`` and
    ``audit/index.html``.

    With an evaluator, the score is the identity score of images generated with each LoRA. Without
    one, it is the share of the denoising loss on the subject's photos that the LoRA removes.

    Args:
        build: Folder of the build.
        config: Settings of the audit.
        partial: Whether pending chunks are allowed.
        device: As ``ComputeConfig`` takes it.

    Returns:
        One finding per row.

    Raises:
        InvalidArgumentError: If chunks are pending (unless ``partial``).
    """
    plan = read_plan(build)
    check_complete(ChunkStore(plan, build), partial)
    dataset = LoraDataset(build)
    finite_rows = [i for i in range(len(dataset)) if bool(dataset[i].isfinite().all())]

    def render(rows: list[int]) -> list[RowImages]:
        return render_rows(
            plan,
            dataset,
            load_recipe_base(plan.recipe, device),
            rows,
            num_inference_steps=config.num_inference_steps,
        )

    row_images: list[RowImages] = []
    if config.evaluator is not None:
        row_images = render(_sample_rows(finite_rows, config.num_scored_rows))
        classifier = AttributeClassifier.from_pretrained(config.evaluator)
        classifier.to(ComputeConfig(device=device).torch_device)
        scores, score_name = compute_identity_scores(row_images, classifier), "identity"
    else:
        scores = compute_loss_reductions(dataset)
        score_name = "share of the denoising loss that the LoRA removes"
    shown_rows: list[int] = []
    if config.rows_per_group:
        finite_scores = {i: score for i, score in scores.items() if i in set(finite_rows)}
        groups = select_best_median_worst(finite_scores, config.rows_per_group)
        shown_rows = list(dict.fromkeys(i for rows in groups.values() for i in rows))
    if config.evaluator is None and shown_rows:
        row_images = render(shown_rows)
    findings = audit_rows(dataset, scores, config.threshold)
    write_html_report(
        build / REPORT_PATH,
        build.resolve().name,
        findings,
        scores,
        score_name,
        [images for images in row_images if images.row in set(shown_rows)],
    )
    write_findings(findings, build)
    return findings


def _sample_rows(rows: list[int], num_rows: int | None) -> list[int]:
    """Sample ``num_rows`` of the rows, a random but fixed choice, in order."""
    if num_rows is None or num_rows >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:num_rows]
    return [rows[i] for i in sorted(order.tolist())]
