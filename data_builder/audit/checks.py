"""Checks of the rows of a build: not finite, outliers, duplicates, low score."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

FINDINGS_PATH: Final = Path("audit") / "findings.jsonl"
OUTLIER_SIGMA: Final = 6.0
"""Robust standard deviations of log ‖ΔW‖ beyond which a row is an outlier."""
DUPLICATE_COSINE: Final = 0.9999
"""Cosine of two rows' deviations from the median above which they count as the same LoRA."""


@dataclass(frozen=True)
class Finding:
    """Result of the audit for one row.

    Attributes:
        subject: Name of the subject.
        repetition: Number of the LoRA among those of the subject.
        norm: Frobenius norm ‖ΔW‖ over all targets; None if it is not finite.
        score: Score of the row; None if it has none.
        flags: Sentences on what is wrong.
    """

    subject: str
    repetition: int
    norm: float | None
    score: float | None
    flags: tuple[str, ...] = ()


def audit_rows(
    dataset: LoraDataset, scores: Mapping[int, float], threshold: float, batch_size: int = 64
) -> list[Finding]:
    """Check every row of a dataset.

    Args:
        dataset: Rows to check.
        scores: Score by row, where higher is better.
        threshold: Score below which (or if not a number) a row is flagged.
        batch_size: Rows per batch.

    Returns:
        One finding per row, in order.
    """
    finite_masks, norms, row_hashes, sketches = [], [], [], []
    projection = torch.randn(dataset.layout.numel, 32, generator=torch.Generator().manual_seed(0))
    batches = dataset.iter_batches(batch_size)
    for rows in track(batches, "checking rows", "rows", len(dataset), batch_size):
        row_hashes += [
            hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in rows
        ]
        is_finite = rows.isfinite().all(-1)  # [rows]
        finite_rows = torch.where(is_finite[:, None], rows.float(), torch.zeros(()))  # [rows, P]
        target_norms = LoraWeights.unflatten(dataset.layout, finite_rows).compute_delta_norms()
        finite_masks.append(is_finite)
        norms.append(target_norms.square().sum(-1).sqrt())  # ‖ΔW‖ over all targets
        sketches.append(finite_rows @ projection)  # [rows, 32]
    valid_mask, all_norms = torch.cat(finite_masks), torch.cat(norms)
    flags: list[list[str]] = [[] if ok else ["not finite"] for ok in valid_mask.tolist()]
    for i in _find_outliers(all_norms, valid_mask):
        flags[i].append(
            f"norm {float(all_norms[i]):.3g}, {float(all_norms[valid_mask].median()):.3g} is usual"
        )
    names = [
        f"{record.subject}#{record.repetition}" if record.repetition else record.subject
        for record in dataset.records
    ]
    for i, first_row in _find_exact_duplicates(row_hashes):
        flags[i].append(f"the same row as {names[first_row]}")
    for i, first_row in _find_near_duplicates(torch.cat(sketches), valid_mask):
        if row_hashes[i] != row_hashes[first_row]:
            flags[i].append(f"almost the same LoRA as {names[first_row]}")
    for i, first_row in _find_shared_photos(dataset):
        flags[i].append(f"the same photo as {names[first_row]}")
    for i, score in scores.items():
        if not score >= threshold:
            flags[i].append(f"score {score:.3f}, at least {threshold:g} expected")
    return [
        Finding(
            record.subject,
            record.repetition,
            float(all_norms[i]) if valid_mask[i] else None,
            _replace_nan(scores.get(i)),
            tuple(flags[i]),
        )
        for i, record in enumerate(dataset.records)
    ]


def compute_loss_reductions(dataset: LoraDataset) -> dict[int, float]:
    """Compute 1 - loss / initial loss by row, from the table of the dataset.

    The losses are of fixed timesteps and noise, on validation photos where the plan has any.
    """
    return {
        i: 1 - record.best_loss / record.initial_loss
        for i, record in enumerate(dataset.records)
        if record.initial_loss and record.best_loss is not None
    }


def write_findings(findings: Iterable[Finding], build: Path) -> None:
    """Write the findings into a build; undone by ``read_findings``.

    Args:
        findings: One finding per row.
        build: Folder of the build.
    """
    lines = (json.dumps(asdict(finding)) + "\n" for finding in findings)
    write_bytes("".join(lines).encode(), build / FINDINGS_PATH)


def read_findings(build: Path) -> list[Finding]:
    """Read the findings of the last audit of ``build``; empty without one.

    Raises:
        InvalidArgumentError: If the file is damaged.
    """
    file = build / FINDINGS_PATH
    if not file.is_file():
        return []
    try:
        entries = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return [Finding(**{**entry, "flags": tuple(entry["flags"])}) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{str(file)!r} is damaged, a finding on each line expected: audit the build again"
        ) from error


def _find_outliers(norms: Tensor, valid_mask: Tensor) -> list[int]:
    """Find rows whose log norm is far from the median, by a robust spread (at least 5 %)."""
    if not valid_mask.any():
        return []
    log_norms = norms.clamp_min(1e-12).log()
    median = log_norms[valid_mask].median()
    # 1.4826 · median absolute deviation estimates σ of a normal distribution
    spread = max(1.4826 * float((log_norms[valid_mask] - median).abs().median()), 0.05)
    is_outlier = valid_mask & ((log_norms - median).abs() > OUTLIER_SIGMA * spread)
    return [int(i) for i in torch.nonzero(is_outlier).flatten()]


def _find_exact_duplicates(row_hashes: list[bytes]) -> list[tuple[int, int]]:
    """Find pairs (row, first row) of equal bytes."""
    first_rows: dict[bytes, int] = {}
    return [
        (i, first_row)
        for i, digest in enumerate(row_hashes)
        if (first_row := first_rows.setdefault(digest, i)) != i
    ]


def _find_shared_photos(dataset: LoraDataset) -> list[tuple[int, int]]:
    """Find pairs (row, earlier row) of different subjects that share a photo."""
    first_rows: dict[str, int] = {}
    shared: dict[int, int] = {}
    for i, record in enumerate(dataset.records):
        for photo_hash in record.reference_sha256:
            first_row = first_rows.setdefault(photo_hash, i)
            if dataset.records[first_row].subject != record.subject:
                shared.setdefault(i, first_row)
    return sorted(shared.items())


def _find_near_duplicates(
    sketches: Tensor, valid_mask: Tensor, block_size: int = 1024
) -> list[tuple[int, int]]:
    """Find pairs (row, earlier row) whose deviations from the median are parallel.

    The deviations are compared as random projections [rows, 32], which preserve cosines
    approximately.
    """
    if int(valid_mask.sum()) < 3:
        return []
    deviations = sketches - sketches[valid_mask].median(0).values
    directions = torch.nn.functional.normalize(deviations, dim=-1)  # [rows, 32]
    directions = torch.where(valid_mask[:, None], directions, torch.zeros(()))
    duplicates: dict[int, int] = {}
    for block_start in range(0, len(directions), block_size):
        cosine = directions[block_start : block_start + block_size] @ directions.T  # [block, rows]
        for i, j in torch.nonzero(cosine > DUPLICATE_COSINE).tolist():
            if j < block_start + i:
                duplicates.setdefault(block_start + i, j)
    return sorted(duplicates.items())


def _replace_nan(value: float | None) -> float | None:
    """Return None for not a number."""
    return None if value is None or isnan(value) else value
