"""What is wrong with rows of a build: not finite, odd norm, duplicates, no likeness of their subject."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
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
    """One row: its norm ‖ΔW‖ and score (None where they cannot be told), and what is wrong with it."""

    subject: str
    repetition: int
    norm: float | None
    score: float | None
    flags: tuple[str, ...] = ()


def audit_rows(
    dataset: LoraDataset, scores: Mapping[int, float], threshold: float, batch_size: int = 64
) -> list[Finding]:
    """Every row of ``dataset``. ``scores`` by row say how well it reproduces its subject; below ``threshold`` (or not
    a number) it is flagged."""
    finite_masks, norms, row_hashes, sketches = [], [], [], []
    projection = torch.randn(dataset.layout.numel, 32, generator=torch.Generator().manual_seed(0))
    batches = dataset.iter_batches(batch_size)
    for rows in track(batches, "looking at rows", "rows", len(dataset), batch_size):
        row_hashes += [
            hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in rows
        ]
        is_finite = rows.isfinite().all(-1)
        finite_rows = torch.where(is_finite[:, None], rows.float(), torch.zeros(()))
        finite_masks.append(is_finite)
        norms.append(
            LoraWeights.unflatten(dataset.layout, finite_rows)
            .compute_delta_norms()
            .square()
            .sum(-1)
            .sqrt()
        )
        sketches.append(finite_rows @ projection)
    valid_mask, all_norms = torch.cat(finite_masks), torch.cat(norms)
    flags: list[list[str]] = [[] if ok else ["not finite"] for ok in valid_mask.tolist()]
    for i in _find_outliers(all_norms, valid_mask):
        flags[i].append(
            f"norm {float(all_norms[i]):.3g}, {float(all_norms[valid_mask].median()):.3g} is usual"
        )
    names = [f"{r.subject}" + (f"#{r.repetition}" if r.repetition else "") for r in dataset.records]
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
            r.subject,
            r.repetition,
            float(all_norms[i]) if valid_mask[i] else None,
            _replace_nan(scores.get(i)),
            tuple(flags[i]),
        )
        for i, r in enumerate(dataset.records)
    ]


def compute_loss_reductions(dataset: LoraDataset) -> dict[int, float]:
    """1 - loss / loss at the start on each row's fixed draws (held-out photos where there are any), from the table."""
    losses = {i: (r.initial_loss, r.best_loss) for i, r in enumerate(dataset.records)}
    return {
        i: 1 - after / before
        for i, (before, after) in losses.items()
        if before and after is not None
    }


def write_findings(findings: Iterable[Finding], build: Path) -> None:
    """Undone by ``read_findings``."""
    lines = (json.dumps(asdict(finding)) + "\n" for finding in findings)
    write_bytes("".join(lines).encode(), build / FINDINGS_PATH)


def read_findings(build: Path) -> list[Finding]:
    """Empty where no audit was made."""
    file = build / FINDINGS_PATH
    lines = file.read_text().splitlines() if file.is_file() else []
    return [
        Finding(**{**(row := json.loads(line)), "flags": tuple(row["flags"])}) for line in lines
    ]


def _find_outliers(norms: Tensor, valid_mask: Tensor) -> list[int]:
    """Rows whose log norm is far from the median, in units of the spread (at least 5 %)."""
    if not valid_mask.any():
        return []
    log_norms = norms.clamp_min(1e-12).log()
    median = log_norms[valid_mask].median()
    spread = max(1.4826 * float((log_norms[valid_mask] - median).abs().median()), 0.05)
    return [
        int(i)
        for i in torch.nonzero(
            valid_mask & ((log_norms - median).abs() > OUTLIER_SIGMA * spread)
        ).flatten()
    ]


def _find_exact_duplicates(row_hashes: list[bytes]) -> list[tuple[int, int]]:
    first_rows: dict[bytes, int] = {}
    return [
        (i, first_row)
        for i, digest in enumerate(row_hashes)
        if (first_row := first_rows.setdefault(digest, i)) != i
    ]


def _find_shared_photos(dataset: LoraDataset) -> list[tuple[int, int]]:
    """Rows that share a photo with an earlier row of another subject."""
    first_rows: dict[str, int] = {}
    shared: dict[int, int] = {}
    for i, record in enumerate(dataset.records):
        for image in record.reference_sha256:
            first_row = first_rows.setdefault(image, i)
            if dataset.records[first_row].subject != record.subject:
                shared.setdefault(i, first_row)
    return sorted(shared.items())


def _find_near_duplicates(
    sketches: Tensor, valid_mask: Tensor, block_size: int = 1024
) -> list[tuple[int, int]]:
    """Pairs (row, earlier row) whose random projections, less their median, point the same way."""
    if int(valid_mask.sum()) < 3:
        return []
    directions = torch.nn.functional.normalize(
        sketches - sketches[valid_mask].median(0).values, dim=-1
    )
    directions = torch.where(valid_mask[:, None], directions, torch.zeros(()))
    duplicates: dict[int, int] = {}
    for block_start in range(0, len(directions), block_size):
        cosine = directions[block_start : block_start + block_size] @ directions.T
        for i, j in torch.nonzero(cosine > DUPLICATE_COSINE).tolist():
            if j < block_start + i:
                duplicates.setdefault(block_start + i, j)
    return sorted(duplicates.items())


def _replace_nan(value: float | None) -> float | None:
    return value if value is not None and value == value else None
