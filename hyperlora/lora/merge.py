"""Several LoRAs into one: exactly, or at a lower rank by the methods PEFT knows."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

MERGE_METHODS: Final = ("concat", "svd", "linear", "ties", "dare", "dare_ties", "magnitude")
"""concat: exact, the ranks add. svd: the best approximation of the sum at one rank. linear: the factors are added, as
PEFT's ``linear`` does (cross terms appear). ties (2306.01708), dare and dare_ties (2311.03099) and magnitude pruning:
PEFT's functions on ΔW, then SVD."""


def merge(
    loras: Sequence[LoraWeights],
    weights: Sequence[float] | None = None,
    method: str = "concat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoraWeights:
    """Σ wᵢ ΔWᵢ, or what ``method`` (one of ``MERGE_METHODS``) makes of it, over all sites that any of ``measure_lora_throughput`` changes.

    ``rank`` of the result: by default the largest of the inputs', for ``concat`` their sum. ``density`` is the fraction
    of numbers that the pruning methods keep, ``seed`` decides which (dare). Raises ``InvalidArgumentError`` for an unknown method
    and ``LayoutMismatchError`` for LoRAs of different bases.
    """
    if method not in MERGE_METHODS:
        raise InvalidArgumentError(
            f"unknown way to merge {method!r}; known: {', '.join(MERGE_METHODS)}"
        )
    if not 0 < density <= 1:
        raise InvalidArgumentError(f"density above 0 and at most 1 expected, got {density}")
    if rank is not None and rank < 1:
        raise InvalidArgumentError(f"rank must be at least 1, got {rank}")
    weights = validate_weights(weights, len(loras))
    if method in ("concat", "svd"):
        merged_exact = _add_loras(
            [lora * weight for lora, weight in zip(loras, weights, strict=True)]
        )
        if method == "svd" or rank is not None:
            return merged_exact.resize(rank or max(lora.layout.rank for lora in loras))
        return merged_exact
    stacked = pad_and_stack(loras)
    weights_tensor = torch.tensor(weights)
    if method == "linear":
        merged = _merge_linear(stacked, weights_tensor)
        return merged.resize(rank) if rank is not None else merged
    return _merge_pruned_deltas(
        stacked, weights_tensor, method, rank or stacked.layout.rank, density, seed
    )


def pad_and_stack(loras: Sequence[LoraWeights]) -> LoraWeights:
    """One batch of LoRAs that differ in sites or rank: zeros where one has no site, zero-padded to the largest rank."""
    layout = _merge_layouts(loras)
    factors_by_target = [
        dict(zip(lora.layout.targets, zip(lora.down, lora.up, strict=True), strict=True))
        for lora in loras
    ]
    down, up = [], []
    for target in layout.targets:
        factors = [
            _pad_factors(lora[target], layout.rank)
            if target in lora
            else _make_zero_factors(target, layout.rank)
            for lora in factors_by_target
        ]
        down.append(torch.stack([d for d, _ in factors]))
        up.append(torch.stack([u for _, u in factors]))
    return LoraWeights(layout, tuple(down), tuple(up))


def compute_relative_error(approximation: LoraWeights, exact: LoraWeights) -> float:
    """‖ΔW - ΔŴ‖ / ‖ΔW‖ over all sites (in float64; 0 for two zeros)."""
    exact, approximation = exact.apply(Tensor.double), approximation.apply(Tensor.double)
    error_norm = _add_loras([approximation, -exact]).compute_delta_norms().square().sum().sqrt()
    exact_norm = exact.compute_delta_norms().square().sum().sqrt()
    return float(error_norm / exact_norm) if exact_norm > 0 else float(error_norm)


def compare_deltas(reference: LoraWeights, estimate: LoraWeights) -> tuple[Tensor, Tensor]:
    """‖ΔW - ΔŴ‖ / ‖ΔW‖ and the cosine of ΔW and ΔŴ, over all sites together, per LoRA [*batch]."""
    aa, bb, ab = (
        _compute_delta_dot(reference, reference),
        _compute_delta_dot(estimate, estimate),
        _compute_delta_dot(reference, estimate),
    )
    return ((aa + bb - 2 * ab).clamp(min=0) / aa).sqrt(), ab / (aa * bb).sqrt().clamp(min=1e-12)


def _compute_delta_dot(a: LoraWeights, b: LoraWeights) -> Tensor:
    """Σ ΔW ∘ ΔŴ = Σ tr(upᵀ ûp (dôwn downᵀ)), which needs no ΔW."""
    dots = torch.zeros(a.batch_shape, device=a.down[0].device)
    for down_a, up_a, down_b, up_b in zip(a.down, a.up, b.down, b.up, strict=True):
        dots = dots + ((up_a.mT @ up_b) * (down_a @ down_b.mT)).sum((-2, -1))
    return dots


def validate_weights(weights: Sequence[float] | None, num_loras: int) -> list[float]:
    """``num_loras`` finite weights, 1 each by default. Raises ``InvalidArgumentError`` for another number of them, NaN or infinity."""
    if num_loras == 0:
        raise InvalidArgumentError("at least one LoRA expected, none given")
    validated = [1.0] * num_loras if weights is None else [float(weight) for weight in weights]
    if len(validated) != num_loras:
        raise InvalidArgumentError(f"{num_loras} LoRAs need as many weights, got {len(validated)}")
    if non_finite := [weight for weight in validated if not abs(weight) < float("inf")]:
        raise InvalidArgumentError(f"LoRA weights must be finite numbers, got {non_finite[0]}")
    return validated


def _merge_layouts(loras: Sequence[LoraWeights]) -> LoraLayout:
    targets: dict[str, TargetModule] = {}
    base = UNKNOWN_BASE
    for lora in loras:
        if lora.batch_shape:
            raise InvalidArgumentError(
                f"single LoRAs expected, got a batch of {list(lora.batch_shape)}: index it first"
            )
        if base == UNKNOWN_BASE:
            base = lora.layout.base
        elif lora.layout.base != UNKNOWN_BASE:
            lora.layout.check_base(base)
        for target in lora.layout.targets:
            if targets.setdefault(target.name, target) != target:
                raise LayoutMismatchError(
                    f"site {target.name} has two shapes: the LoRAs are for different bases"
                )
    return LoraLayout(tuple(targets.values()), max(lora.layout.rank for lora in loras), base)


def _add_loras(loras: Sequence[LoraWeights]) -> LoraWeights:
    layout = _merge_layouts(loras).with_rank(sum(lora.layout.rank for lora in loras))
    factors_by_target = [
        dict(zip(lora.layout.targets, zip(lora.down, lora.up, strict=True), strict=True))
        for lora in loras
    ]
    down, up = [], []
    for target in layout.targets:
        factors = [lora.get(target) for lora in factors_by_target]
        reference = next(lora_factors[0] for lora_factors in factors if lora_factors is not None)
        padded_factors = [
            (lora_factors[0], lora_factors[1])
            if lora_factors is not None
            else _make_zero_factors(target, lora.layout.rank, reference)
            for lora_factors, lora in zip(factors, loras, strict=True)
        ]
        down.append(torch.cat([d for d, _ in padded_factors], 0))
        up.append(torch.cat([u for _, u in padded_factors], 1))
    return LoraWeights(layout, tuple(down), tuple(up))


def _pad_factors(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    num_pad = rank - len(factors[0])
    return F.pad(factors[0], (0, 0, 0, num_pad)), F.pad(factors[1], (0, num_pad))


def _make_zero_factors(
    target: TargetModule, rank: int, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    reference = torch.empty(0) if reference is None else reference
    return reference.new_zeros(rank, target.in_features), reference.new_zeros(
        target.out_features, rank
    )


def _merge_linear(stacked: LoraWeights, weights: Tensor) -> LoraWeights:
    root, sign = weights.abs().sqrt()[:, None, None], weights.sign()[:, None, None]
    down = tuple((d * root * sign).sum(0) for d in stacked.down)
    return LoraWeights(stacked.layout, down, tuple((u * root).sum(0) for u in stacked.up))


def _merge_pruned_deltas(
    stacked: LoraWeights, weights: Tensor, method: str, rank: int, density: float, seed: int
) -> LoraWeights:  # site by site, since ΔW of a large base does not fit into memory at once
    from peft.utils import merge_utils as peft

    merge_fns: dict[str, Callable[..., Tensor]] = {
        "ties": peft.ties,
        "dare": peft.dare_linear,
        "dare_ties": peft.dare_ties,
        "magnitude": peft.magnitude_prune,
    }
    factors = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for down, up in zip(stacked.down, stacked.up, strict=True):
            deltas = list(up @ down)
            merged_delta = merge_fns[method](
                deltas, weights, min(density, 1 - 1e-7)
            )  # at 1, PEFT warns and keeps all
            factors.append(_compute_svd_factors(merged_delta, rank))
    layout = stacked.layout.with_rank(rank)
    return LoraWeights(layout, tuple(d for d, _ in factors), tuple(u for _, u in factors))


def _compute_svd_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return _pad_factors((root[:, None] * vh[:rank], u[:, :rank] * root), rank)
