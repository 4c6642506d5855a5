"""Merging several LoRAs into one: exactly, or at a lower rank by the methods that PEFT knows.

concat      ΔW = Σ_i w_i ΔW_i, exact; the ranks add up
svd         the nearest of that sum at one rank (Eckart and Young)
linear      up = Σ_i √|w_i| up_i, down = Σ_i sign(w_i) √|w_i| down_i; cross terms appear (PEFT)
ties        2306.01708: prune, elect signs, average; on ΔW, then SVD
dare        2311.03099: drop at random, rescale; on ΔW, then SVD
dare_ties   both
magnitude   prune by magnitude; on ΔW, then SVD
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from hyperlora.compute import fork_rng
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.factors import compute_low_rank_factors, pad_factors
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.seeds import validate_seed

MERGE_METHODS: Final = ("concat", "svd", "linear", "ties", "dare", "dare_ties", "magnitude")
_MAX_DENSITY: Final = 1 - 1e-7  # at 1, PEFT warns and prunes nothing


def merge(
    loras: Sequence[LoraWeights],
    weights: Sequence[float] | None = None,
    method: str = "concat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoraWeights:
    """Merge LoRAs into one, over all targets that any of them has.

    Args:
        loras: LoRAs without batch axis, of one base; targets and ranks may differ.
        weights: The factor of each ΔW, by default 1.
        method: One of ``MERGE_METHODS``.
        rank: The rank of the result. By default the largest of the inputs, for ``concat`` their
            sum.
        density: The fraction, in (0, 1], of the numbers of ΔW that pruning methods keep.
        seed: Seed of the random pruning of ``dare`` and ``dare_ties``.

    Returns:
        One LoRA.

    Raises:
        InvalidArgumentError: An argument is out of range or the method is unknown.
        LayoutMismatchError: The LoRAs are for different bases.
    """
    if method not in MERGE_METHODS:
        raise InvalidArgumentError(
            f"unknown merge method {method!r}; known: {', '.join(MERGE_METHODS)}"
        )
    if not 0 < density <= 1:
        raise InvalidArgumentError(f"density above 0 and at most 1 expected, got {density}")
    validate_seed(seed)
    weights = validate_weights(weights, len(loras))
    if rank is not None:
        _merge_layouts(loras).check_rank(rank)
    if method in ("concat", "svd"):
        merged = _add_loras([lora * weight for lora, weight in zip(loras, weights, strict=True)])
        if method == "svd" and rank is None:
            rank = max(lora.layout.rank for lora in loras)
        return merged if rank is None else merged.resize(rank)
    stacked = pad_and_stack(loras)
    if method == "linear":
        merged = _merge_linear(stacked, torch.tensor(weights, device=stacked.device))
        return merged if rank is None else merged.resize(rank)
    prune_fn = _make_prune_fn(method, torch.tensor(weights), density)
    return _merge_pruned_deltas(stacked, prune_fn, rank or stacked.layout.rank, seed)


def pad_and_stack(loras: Sequence[LoraWeights]) -> LoraWeights:
    """Stack LoRAs that may differ in targets and rank.

    Returns:
        A batch over all targets at the largest rank; ΔW is zero where a LoRA lacks a target.

    Raises:
        InvalidArgumentError: A LoRA has a batch axis.
        LayoutMismatchError: The LoRAs are for different bases.
    """
    layout = _merge_layouts(loras)
    factors_by_target = [_map_factors(lora) for lora in loras]
    downs, ups = [], []
    for target in layout.targets:
        factors = [
            pad_factors(*lora_factors[target.name], layout.rank)
            if target.name in lora_factors
            else _make_zero_factors(target, layout.rank, loras[0].down[0])
            for lora_factors in factors_by_target
        ]
        downs.append(torch.stack([down for down, _ in factors]))  # [loras, r, in]
        ups.append(torch.stack([up for _, up in factors]))  # [loras, out, r]
    return LoraWeights(layout, tuple(downs), tuple(ups))


def compute_relative_error(approximation: LoraWeights, exact: LoraWeights) -> float:
    """Compute ‖ΔŴ - ΔW‖ / ‖ΔW‖ over all targets together, in float64.

    Args:
        approximation: The LoRA of ΔŴ.
        exact: The LoRA of ΔW.

    Returns:
        The relative error; if ΔW = 0, the absolute one (0 for two zeros).
    """
    # ΔŴ and ΔW nearly cancel: in float32, rounding alone would be up to 1e-3 of ‖ΔW‖
    exact, approximation = exact.apply(Tensor.double), approximation.apply(Tensor.double)
    error_norm = _add_loras([approximation, -exact]).compute_delta_norms().square().sum().sqrt()
    exact_norm = exact.compute_delta_norms().square().sum().sqrt()
    return float(error_norm / exact_norm) if exact_norm > 0 else float(error_norm)


def compare_deltas(reference: LoraWeights, estimate: LoraWeights) -> tuple[Tensor, Tensor]:
    """Compute relative error and cosine of ΔŴ against ΔW, over all targets together.

    ‖ΔW - ΔŴ‖² = ‖ΔW‖² + ‖ΔŴ‖² - 2 ⟨ΔW, ΔŴ⟩

    Args:
        reference: LoRAs of ΔW, of batch shape [*batch].
        estimate: LoRAs of ΔŴ, of the same layout and batch shape.

    Returns:
        ‖ΔW - ΔŴ‖ / ‖ΔW‖ and cos(ΔW, ΔŴ), [*batch] each. The error is inf or NaN where ΔW = 0.
    """
    squared_reference = _compute_delta_dot(reference, reference)  # [*B]
    squared_estimate = _compute_delta_dot(estimate, estimate)  # [*B]
    dot = _compute_delta_dot(reference, estimate)  # [*B]
    # negative by rounding where ΔŴ ≈ ΔW; in float32 relative errors below 1e-3 are lost in it
    squared_error = (squared_reference + squared_estimate - 2 * dot).clamp(min=0)  # [*B]
    # cos = 0, not NaN, where ΔW = 0 or ΔŴ = 0
    norm_product = (squared_reference * squared_estimate).sqrt().clamp(min=1e-12)  # [*B]
    return (squared_error / squared_reference).sqrt(), dot / norm_product


def _compute_delta_dot(a: LoraWeights, b: LoraWeights) -> Tensor:
    """⟨ΔW_a, ΔW_b⟩ = Σ tr(up_aᵀ up_b · down_b down_aᵀ), without forming ΔW; [*batch]."""
    dots = torch.zeros(a.batch_shape, device=a.device)
    for down_a, up_a, down_b, up_b in zip(a.down, a.up, b.down, b.up, strict=True):
        up_products = up_a.mT @ up_b  # [*B, r_a, r_b]
        down_products = down_a @ down_b.mT  # [*B, r_a, r_b]
        # tr(P Qᵀ) = Σ_ij P_ij Q_ij
        dots = dots + (up_products * down_products).sum((-2, -1))
    return dots


def validate_weights(weights: Sequence[float] | None, num_loras: int) -> list[float]:
    """Check the weights of LoRAs.

    Args:
        weights: One finite number per LoRA, or None for 1 each.
        num_loras: The number of LoRAs, at least 1.

    Returns:
        The weights as floats.

    Raises:
        InvalidArgumentError: There is no LoRA, the number of weights is wrong, or a weight is
            NaN or infinite.
    """
    if num_loras == 0:
        raise InvalidArgumentError("at least one LoRA expected, none given")
    validated = [1.0] * num_loras if weights is None else [float(weight) for weight in weights]
    if len(validated) != num_loras:
        raise InvalidArgumentError(f"{num_loras} LoRAs need as many weights, got {len(validated)}")
    if non_finite := [weight for weight in validated if not abs(weight) < float("inf")]:
        raise InvalidArgumentError(f"LoRA weights must be finite numbers, got {non_finite[0]}")
    return validated


def _merge_layouts(loras: Sequence[LoraWeights]) -> LoraLayout:
    """The targets of all LoRAs at their largest rank."""
    targets: dict[str, TargetModule] = {}
    base = UNKNOWN_BASE
    for lora in loras:
        if lora.batch_shape:
            raise InvalidArgumentError(
                f"single LoRAs expected, got a batch of {list(lora.batch_shape)}: index it first"
            )
        lora.layout.check_base(base)
        if base == UNKNOWN_BASE:  # which fits every base, so the first known one decides
            base = lora.layout.base
        for target in lora.layout.targets:
            known_target = targets.setdefault(target.name, target)
            if _get_matrix_shape(known_target) != _get_matrix_shape(target):
                raise LayoutMismatchError(
                    f"target {target.name} is {known_target.shape_text} in a LoRA and "
                    f"{target.shape_text} in another, so they are for different bases: "
                    f"combine LoRAs of one base"
                )
    return LoraLayout(tuple(targets.values()), max(lora.layout.rank for lora in loras), base)


def _get_matrix_shape(target: TargetModule) -> tuple[int, int, tuple[int, int]]:
    """The shape of ΔW; a 1x1 convolution is the Linear layer that other programs have there."""
    return target.in_features, target.out_features, target.kernel_size or (1, 1)


def _map_factors(lora: LoraWeights) -> dict[str, tuple[Tensor, Tensor]]:
    """``down`` and ``up`` by the name of the target."""
    names = [target.name for target in lora.layout.targets]
    return dict(zip(names, zip(lora.down, lora.up, strict=True), strict=True))


def _make_zero_factors(target: TargetModule, rank: int, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` of ΔW = 0, of the dtype and device of ``reference``."""
    down = reference.new_zeros(rank, target.in_features)  # [r, in]
    up = reference.new_zeros(target.out_features, rank)  # [out, r]
    return down, up


def _add_loras(loras: Sequence[LoraWeights]) -> LoraWeights:
    """Σ_i ΔW_i = [up_1 up_2 …] [down_1; down_2; …]; the ranks add up."""
    layout = _merge_layouts(loras).with_rank(sum(lora.layout.rank for lora in loras))
    factors_by_target = [_map_factors(lora) for lora in loras]
    downs, ups = [], []
    for target in layout.targets:
        name = target.name
        present = [factors[name] for factors in factors_by_target if name in factors]
        reference, _ = present[0]  # at least one LoRA has the target
        factors = [
            lora_factors[name]
            if name in lora_factors
            else _make_zero_factors(target, lora.layout.rank, reference)
            for lora_factors, lora in zip(factors_by_target, loras, strict=True)
        ]
        downs.append(torch.cat([down for down, _ in factors], 0))  # [Σ_i r_i, in]
        ups.append(torch.cat([up for _, up in factors], 1))  # [out, Σ_i r_i]
    return LoraWeights(layout, tuple(downs), tuple(ups))


def _merge_linear(stacked: LoraWeights, weights: Tensor) -> LoraWeights:
    """Add the factors, each times √|w|; the sign of w goes to ``down``."""
    root = weights.abs().sqrt()[:, None, None]  # [loras, 1, 1]
    sign = weights.sign()[:, None, None]  # [loras, 1, 1]
    # up down = Σ_i w_i ΔW_i + Σ_{i≠j} sign(w_j) √|w_i w_j| up_i down_j, the cross terms
    down = tuple((d * root * sign).sum(0) for d in stacked.down)  # [r, in]
    up = tuple((u * root).sum(0) for u in stacked.up)  # [out, r]
    return LoraWeights(stacked.layout, down, up)


def _make_prune_fn(
    method: str, weights: Tensor, density: float
) -> Callable[[list[Tensor]], Tensor]:
    """PEFT's function that prunes and adds the ΔW of one target."""
    from peft.utils import merge_utils

    fns: dict[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {
        # keep the largest; per number, average those with the sign of the unweighted sum
        "ties": merge_utils.ties,
        # keep each with probability density and divide it by density: the expectation stays
        "dare": merge_utils.dare_linear,
        # prune like dare, then elect and average like ties
        "dare_ties": merge_utils.dare_ties,
        # keep the largest, add
        "magnitude": merge_utils.magnitude_prune,
    }
    return lambda deltas: fns[method](deltas, weights, min(density, _MAX_DENSITY))


def _merge_pruned_deltas(
    stacked: LoraWeights, prune_fn: Callable[[list[Tensor]], Tensor], rank: int, seed: int
) -> LoraWeights:
    """Prune and add target by target, since all ΔW of a large base do not fit into memory."""
    downs, ups = [], []
    # dare draws from the global generator of the CPU, whose state is put back afterwards; on the
    # CPU also where the LoRAs are elsewhere, so that a seed gives the same LoRA everywhere
    with fork_rng(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)  # and no card's
        for down, up in zip(stacked.down, stacked.up, strict=True):
            deltas = list((up @ down).cpu())  # [out, in] per LoRA
            merged_delta = prune_fn(deltas).to(stacked.device)  # [out, in]
            merged_up, merged_down = compute_low_rank_factors(merged_delta, rank)
            downs.append(merged_down)  # [r, in], with the new rank r
            ups.append(merged_up)  # [out, r]
    return LoraWeights(stacked.layout.with_rank(rank), tuple(downs), tuple(ups))
