"""Several LoRAs into one: exactly, or at a lower rank by the methods PEFT knows."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import BadRequest, LayoutMismatch
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, Site
from hyperlora.lora.weights import LoraWeights

METHODS: Final = ("concat", "svd", "linear", "ties", "dare", "dare_ties", "magnitude")
"""concat: exact, the ranks add. svd: the best approximation of the sum at one rank. linear: the factors are added, as
PEFT's ``linear`` does (cross terms appear). ties (2306.01708), dare and dare_ties (2311.03099) and magnitude pruning:
PEFT's functions on ΔW, then SVD."""


def merge(
    loras: Sequence[LoraWeights],
    weights: Sequence[float] | None = None,
    how: str = "concat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoraWeights:
    """Σ wᵢ ΔWᵢ, or what ``how`` (one of ``METHODS``) makes of it, over all sites that any of ``loras`` changes.

    ``rank`` of the result: by default the largest of the inputs', for ``concat`` their sum. ``density`` is the fraction
    of numbers that the pruning methods keep, ``seed`` decides which (dare). Raises ``BadRequest`` for an unknown method
    and ``LayoutMismatch`` for LoRAs of different bases.
    """
    if how not in METHODS:
        raise BadRequest(f"unknown way to merge {how!r}; known: {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise BadRequest(f"density above 0 and at most 1 expected, got {density}")
    if rank is not None and rank < 1:
        raise BadRequest(f"rank must be at least 1, got {rank}")
    weights = checked_weights(weights, len(loras))
    if how in ("concat", "svd"):
        summed = _sum([lora * w for lora, w in zip(loras, weights, strict=True)])
        if how == "svd" or rank is not None:
            return summed.resize(rank or max(lora.layout.rank for lora in loras))
        return summed
    aligned = align(loras)
    factors = torch.tensor(weights)
    if how == "linear":
        merged = _linear(aligned, factors)
        return merged.resize(rank) if rank is not None else merged
    return _pruned(aligned, factors, how, rank or aligned.layout.rank, density, seed)


def align(loras: Sequence[LoraWeights]) -> LoraWeights:
    """One batch of LoRAs that differ in sites or rank: zeros where one has no site, zero-padded to the largest rank."""
    layout = _union(loras)
    of = [dict(zip(lora.layout.sites, zip(lora.down, lora.up, strict=True), strict=True)) for lora in loras]
    down, up = [], []
    for site in layout.sites:
        pairs = [_padded(lora[site], layout.rank) if site in lora else _nothing(site, layout.rank) for lora in of]
        down.append(torch.stack([d for d, _ in pairs]))
        up.append(torch.stack([u for _, u in pairs]))
    return LoraWeights(layout, tuple(down), tuple(up))


def relative_error(approximation: LoraWeights, exact: LoraWeights) -> float:
    """‖ΔW - ΔŴ‖ / ‖ΔW‖ over all sites (in float64; 0 for two zeros)."""
    exact, approximation = exact.map(Tensor.double), approximation.map(Tensor.double)
    difference = _sum([approximation, -exact]).norms().square().sum().sqrt()
    size = exact.norms().square().sum().sqrt()
    return float(difference / size) if size > 0 else float(difference)


def apart(one: LoraWeights, other: LoraWeights) -> tuple[Tensor, Tensor]:
    """‖ΔW - ΔŴ‖ / ‖ΔW‖ and the cosine of ΔW and ΔŴ, over all sites together, per LoRA [*batch]."""
    aa, bb, ab = _dot(one, one), _dot(other, other), _dot(one, other)
    return ((aa + bb - 2 * ab).clamp(min=0) / aa).sqrt(), ab / (aa * bb).sqrt().clamp(min=1e-12)


def _dot(one: LoraWeights, other: LoraWeights) -> Tensor:
    """Σ ΔW ∘ ΔŴ = Σ tr(upᵀ ûp (dôwn downᵀ)), which needs no ΔW."""
    dots = torch.zeros(one.batch, device=one.down[0].device)
    for down, up, down2, up2 in zip(one.down, one.up, other.down, other.up, strict=True):
        dots = dots + ((up.mT @ up2) * (down @ down2.mT)).sum((-2, -1))
    return dots


def checked_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """``n`` finite weights, 1 each by default. Raises ``BadRequest`` for another number of them, NaN or infinity."""
    if n == 0:
        raise BadRequest("at least one LoRA expected, none given")
    found = [1.0] * n if weights is None else [float(w) for w in weights]
    if len(found) != n:
        raise BadRequest(f"{n} LoRAs need as many weights, got {len(found)}")
    if bad := [w for w in found if not abs(w) < float("inf")]:
        raise BadRequest(f"LoRA weights must be finite numbers, got {bad[0]}")
    return found


def _union(loras: Sequence[LoraWeights]) -> LoraLayout:
    sites: dict[str, Site] = {}
    base = UNKNOWN_BASE
    for lora in loras:
        if lora.batch:
            raise BadRequest(f"single LoRAs expected, got a batch of {list(lora.batch)}: index it first")
        if base == UNKNOWN_BASE:
            base = lora.layout.base
        elif lora.layout.base != UNKNOWN_BASE:
            lora.layout.require_base(base)
        for site in lora.layout.sites:
            if sites.setdefault(site.name, site) != site:
                raise LayoutMismatch(f"site {site.name} has two shapes: the LoRAs are for different bases")
    return LoraLayout(tuple(sites.values()), max(lora.layout.rank for lora in loras), base)


def _sum(loras: Sequence[LoraWeights]) -> LoraWeights:
    layout = _union(loras).with_rank(sum(lora.layout.rank for lora in loras))
    of = [dict(zip(lora.layout.sites, zip(lora.down, lora.up, strict=True), strict=True)) for lora in loras]
    down, up = [], []
    for site in layout.sites:
        pairs = [lora.get(site) for lora in of]
        like = next(pair[0] for pair in pairs if pair is not None)
        full = [
            (pair[0], pair[1]) if pair is not None else _nothing(site, lora.layout.rank, like)
            for pair, lora in zip(pairs, loras, strict=True)
        ]
        down.append(torch.cat([d for d, _ in full], 0))
        up.append(torch.cat([u for _, u in full], 1))
    return LoraWeights(layout, tuple(down), tuple(up))


def _padded(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(pair[0])
    return F.pad(pair[0], (0, 0, 0, missing)), F.pad(pair[1], (0, missing))


def _nothing(site: Site, rank: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    like = torch.empty(0) if like is None else like
    return like.new_zeros(rank, site.fan_in), like.new_zeros(site.fan_out, rank)


def _linear(aligned: LoraWeights, weights: Tensor) -> LoraWeights:
    root, sign = weights.abs().sqrt()[:, None, None], weights.sign()[:, None, None]
    down = tuple((d * root * sign).sum(0) for d in aligned.down)
    return LoraWeights(aligned.layout, down, tuple((u * root).sum(0) for u in aligned.up))


def _pruned(
    aligned: LoraWeights, weights: Tensor, how: str, rank: int, density: float, seed: int
) -> LoraWeights:  # site by site, since ΔW of a large base does not fit into memory at once
    from peft.utils import merge_utils as peft

    functions: dict[str, Callable[..., Tensor]] = {
        "ties": peft.ties,
        "dare": peft.dare_linear,
        "dare_ties": peft.dare_ties,
        "magnitude": peft.magnitude_prune,
    }
    pairs = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for down, up in zip(aligned.down, aligned.up, strict=True):
            deltas = list(up @ down)
            kept = functions[how](deltas, weights, min(density, 1 - 1e-7))  # at 1, PEFT warns and keeps all
            pairs.append(_factors(kept, rank))
    layout = aligned.layout.with_rank(rank)
    return LoraWeights(layout, tuple(d for d, _ in pairs), tuple(u for _, u in pairs))


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return _padded((root[:, None] * vh[:rank], u[:, :rank] * root), rank)
