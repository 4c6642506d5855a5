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

FINDINGS: Final = Path("audit") / "findings.jsonl"
ODD: Final = 6.0
"""Robust standard deviations of log ‖ΔW‖ beyond which a row is an outlier."""
ALIKE: Final = 0.9999
"""Cosine of two rows' deviations from the median above which they count as the same LoRA."""


@dataclass(frozen=True)
class Finding:
    """One row: its norm ‖ΔW‖ and score (None where they cannot be told), and what is wrong with it."""

    subject: str
    view: int
    norm: float | None
    score: float | None
    flags: tuple[str, ...] = ()


def examine(dataset: LoraDataset, scores: Mapping[int, float], threshold: float, batch: int = 64) -> list[Finding]:
    """Every row of ``dataset``. ``scores`` by row say how well it reproduces its subject; below ``threshold`` (or not
    a number) it is flagged."""
    finite, norms, digests, sketches = [], [], [], []
    project = torch.randn(dataset.layout.numel, 32, generator=torch.Generator().manual_seed(0))
    batches = dataset.batches(batch)
    for rows in track(batches, "looking at rows", "rows", len(dataset), batch):
        digests += [hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in rows]
        fine = rows.isfinite().all(-1)
        clean = torch.where(fine[:, None], rows.float(), torch.zeros(()))
        finite.append(fine)
        norms.append(LoraWeights.unflatten(dataset.layout, clean).norms().square().sum(-1).sqrt())
        sketches.append(clean @ project)
    good, norm = torch.cat(finite), torch.cat(norms)
    flags: list[list[str]] = [[] if ok else ["not finite"] for ok in good.tolist()]
    for i in _odd(norm, good):
        flags[i].append(f"norm {float(norm[i]):.3g}, {float(norm[good].median()):.3g} is usual")
    names = [f"{r.subject}" + (f"#{r.view}" if r.view else "") for r in dataset.records]
    for i, first in _repeated(digests):
        flags[i].append(f"the same row as {names[first]}")
    for i, first in _alike(torch.cat(sketches), good):
        if digests[i] != digests[first]:
            flags[i].append(f"almost the same LoRA as {names[first]}")
    for i, first in _same_photos(dataset):
        flags[i].append(f"the same photo as {names[first]}")
    for i, score in scores.items():
        if not score >= threshold:
            flags[i].append(f"score {score:.3f}, at least {threshold:g} expected")
    return [
        Finding(r.subject, r.view, float(norm[i]) if good[i] else None, _number(scores.get(i)), tuple(flags[i]))
        for i, r in enumerate(dataset.records)
    ]


def gains(dataset: LoraDataset) -> dict[int, float]:
    """1 - loss / loss at the start on each row's fixed draws (held-out photos where there are any), from the table."""
    found = {i: (r.before, r.after) for i, r in enumerate(dataset.records)}
    return {i: 1 - after / before for i, (before, after) in found.items() if before and after is not None}


def write_findings(findings: Iterable[Finding], build: Path) -> None:
    """Undone by ``read_findings``."""
    lines = (json.dumps(asdict(finding)) + "\n" for finding in findings)
    write_bytes("".join(lines).encode(), build / FINDINGS)


def read_findings(build: Path) -> list[Finding]:
    """Empty where no audit was made."""
    file = build / FINDINGS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [Finding(**{**(row := json.loads(line)), "flags": tuple(row["flags"])}) for line in lines]


def _odd(norm: Tensor, good: Tensor) -> list[int]:
    """Rows whose log norm is far from the median, in units of the spread (at least 5 %)."""
    if not good.any():
        return []
    logs = norm.clamp_min(1e-12).log()
    middle = logs[good].median()
    spread = max(1.4826 * float((logs[good] - middle).abs().median()), 0.05)
    return [int(i) for i in torch.nonzero(good & ((logs - middle).abs() > ODD * spread)).flatten()]


def _repeated(digests: list[bytes]) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    return [(i, place) for i, digest in enumerate(digests) if (place := first.setdefault(digest, i)) != i]


def _same_photos(dataset: LoraDataset) -> list[tuple[int, int]]:
    """Rows that share a photo with an earlier row of another subject."""
    first: dict[str, int] = {}
    found: dict[int, int] = {}
    for i, record in enumerate(dataset.records):
        for image in record.images:
            place = first.setdefault(image, i)
            if dataset.records[place].subject != record.subject:
                found.setdefault(i, place)
    return sorted(found.items())


def _alike(sketches: Tensor, good: Tensor, block: int = 1024) -> list[tuple[int, int]]:
    """Pairs (row, earlier row) whose random projections, less their median, point the same way."""
    if int(good.sum()) < 3:
        return []
    turned = torch.nn.functional.normalize(sketches - sketches[good].median(0).values, dim=-1)
    turned = torch.where(good[:, None], turned, torch.zeros(()))
    found: dict[int, int] = {}
    for first in range(0, len(turned), block):
        cosine = turned[first : first + block] @ turned.T
        for i, j in torch.nonzero(cosine > ALIKE).tolist():
            if j < first + i:
                found.setdefault(first + i, j)
    return sorted(found.items())


def _number(value: float | None) -> float | None:
    return value if value is not None and value == value else None
