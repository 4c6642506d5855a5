"""``merge`` against PEFT's ``add_weighted_adapter`` and against ΔW; blocks of a LoRA."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.blocks import scale_blocks, select_blocks
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, TargetModule
from hyperlora.lora.merge import (
    MERGE_METHODS,
    compare_deltas,
    compute_relative_error,
    merge,
    pad_and_stack,
    validate_weights,
)
from hyperlora.lora.weights import LoraWeights
from tests.mock_cuda import mock_cuda

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def make_lora(seed: int, rank: int = 2, prefix: str = "", base: str = "b") -> LoraWeights:
    layout = LoraLayout.from_module(
        TwoLayers(), "unet", lambda path: path.startswith(prefix), rank, base
    )
    return LoraWeights.unflatten(
        layout, torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
    )


def merge_with_peft(
    loras: list[LoraWeights], weights: list[float], peft_method: str, rank: int
) -> dict[str, Tensor]:
    """ΔW by path of PEFT's ``add_weighted_adapter``."""
    from peft import LoraConfig, get_peft_model

    names = [f"l{i}" for i in range(len(loras))]
    config = LoraConfig(
        r=loras[0].layout.rank, lora_alpha=loras[0].layout.rank, target_modules=["first", "second"]
    )
    model = get_peft_model(TwoLayers(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, lora in zip(names, loras, strict=True):
        for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
            layer = model.base_model.model.get_submodule(target.path)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = (
                down.clone(),
                up.clone(),
            )
    model.add_weighted_adapter(
        names, weights, "merged", combination_type=peft_method, svd_rank=rank, density=0.5
    )
    layers = {path: model.base_model.model.get_submodule(path) for path in ("first", "second")}
    return {path: layer.get_delta_weight("merged").detach() for path, layer in layers.items()}


@pytest.mark.parametrize(
    ("method", "peft_method"),
    [
        ("concat", "cat"),
        ("svd", "svd"),
        ("linear", "linear"),
        ("ties", "ties_svd"),
        ("magnitude", "magnitude_prune_svd"),
        ("dare", "dare_linear_svd"),
        ("dare_ties", "dare_ties_svd"),
    ],
)
def test_merge_equals_peft(method: str, peft_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT draws initial weights before it prunes, so the dropped numbers must not depend on them
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.arange(p.numel()) % 3 > 0).view(p.shape).to(p)
    )
    loras, weights = [make_lora(0), make_lora(1), make_lora(2)], [0.7, -0.4, 1.2]
    rank = None if method in ("concat", "linear") else 3
    merged = merge(loras, weights, method, rank=rank, density=0.5, seed=4)
    expected = merge_with_peft(loras, weights, peft_method, 3)
    for target, delta in zip(merged.layout.targets, merged.get_delta_weights(), strict=True):
        torch.testing.assert_close(delta, expected[target.path], **CLOSE)


@given(st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=4), st.integers(0, 99))
def test_merge_concat_is_the_weighted_sum_of_deltas(weights: list[float], seed: int) -> None:
    ranks = [1 + (seed + i) % 3 for i in range(len(weights))]
    loras = [
        make_lora(seed + i, rank, ("", "first", "second")[i % 3]) for i, rank in enumerate(ranks)
    ]
    merged = merge(loras, weights)
    assert merged.layout.rank == sum(ranks)
    for target, delta in zip(merged.layout.targets, merged.get_delta_weights(), strict=True):
        expected = torch.zeros(target.out_features, target.in_features)
        for lora, weight in zip(loras, weights, strict=True):
            for lora_target, lora_delta in zip(
                lora.layout.targets, lora.get_delta_weights(), strict=True
            ):
                expected += weight * lora_delta if lora_target == target else 0
        torch.testing.assert_close(delta, expected, **CLOSE)
    error = compute_relative_error(merged.resize(merged.layout.rank), merged)
    assert error < 1e-5
    assert compute_relative_error(merged * 0.9, merged) == pytest.approx(
        0.1 if merged.compute_delta_norms().sum() > 1e-12 else 0, abs=1e-5
    )


def test_pad_and_stack_keeps_every_delta() -> None:
    loras = [make_lora(0, 1, "first"), make_lora(1, 3), make_lora(2, 2, "second")]
    batch = pad_and_stack(loras)
    assert len(batch) == 3
    assert batch.layout.rank == 3
    for i, lora in enumerate(loras):
        assert compute_relative_error(batch[i], lora) < 1e-6


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_merge_of_one_lora_at_full_density_keeps_it(method: str) -> None:
    lora = make_lora(3)
    assert compute_relative_error(merge([lora], method=method, density=1.0), lora) < 1e-4


def test_scale_and_select_blocks_act_on_named_blocks() -> None:
    lora = make_lora(0)
    selected = select_blocks(lora, ["unet.second"])
    assert [target.path for target in selected.layout.targets] == ["second"]
    scaled = scale_blocks(lora, {"unet": 0.5, "unet.first": -1.0})
    paths = [target.path for target in lora.layout.targets]
    for path, factor in (("first", -1.0), ("second", 0.5)):
        index = paths.index(path)
        torch.testing.assert_close(
            scaled.get_delta_weights()[index], factor * lora.get_delta_weights()[index]
        )
    with pytest.raises(InvalidArgumentError, match=r"did you mean 'unet\.first'"):
        select_blocks(lora, ["unet.fist"])
    assert (
        select_blocks(lora, ["unet"]) == lora
        or compute_relative_error(select_blocks(lora, ["unet"]), lora) == 0
    )


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: merge([make_lora(0)], method="slerp"),
            InvalidArgumentError,
            "unknown merge method 'slerp'; known: concat, svd",
        ),
        (lambda: merge([]), InvalidArgumentError, "at least one LoRA expected"),
        (
            lambda: merge([make_lora(0)], [1.0, 2.0]),
            InvalidArgumentError,
            "1 LoRAs need as many weights, got 2",
        ),
        (
            lambda: merge([make_lora(0)], [float("inf")]),
            InvalidArgumentError,
            "finite numbers, got inf",
        ),
        (lambda: merge([make_lora(0)], density=0.0), InvalidArgumentError, "density above 0"),
        (lambda: merge([make_lora(0)], rank=0), InvalidArgumentError, "rank must be at least 1"),
        (
            lambda: merge([make_lora(0), make_lora(1, base="c")]),
            LayoutMismatchError,
            "for base 'c'",
        ),
        (
            lambda: merge([make_lora(0), LoraWeights.stack([make_lora(1)])]),
            InvalidArgumentError,
            "a batch of",
        ),
    ],
)
def test_merge_refuses_bad_arguments(
    call: Callable[[], Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_merge_takes_a_1x1_convolution_for_the_linear_layer_of_other_programs() -> None:
    name, generator = "unet.mid_block.attentions.0.proj_in", torch.Generator().manual_seed(3)
    loras = []
    for kernel_size in (None, (1, 1)):
        layout = LoraLayout((TargetModule(name, 7, 5, kernel_size),), 2, UNKNOWN_BASE)
        flat = torch.randn(layout.numel, generator=generator)
        loras.append(LoraWeights.unflatten(layout, flat))
    (first,), (second,) = (lora.get_delta_weights() for lora in loras)
    for method in ("concat", "ties"):
        merged = merge(loras, [2.0, -1.0], method)
        assert merged.layout.targets == loras[0].layout.targets
    (delta,) = merge(loras, [2.0, -1.0]).get_delta_weights()
    torch.testing.assert_close(delta, 2 * first - second)
    other = LoraLayout((TargetModule(name, 7, 5, (1, 7)),), 2, UNKNOWN_BASE)
    with pytest.raises(LayoutMismatchError, match=r"7→5 in a LoRA and 7→5 \(1x7 conv\)"):
        merge([loras[0], LoraWeights.zeros(other)])


def test_merge_of_unknown_and_named_bases_is_for_the_named_one() -> None:
    target = TargetModule("unet.mid_block.attentions.0.proj_in", 4, 4)
    loras = [
        LoraWeights.zeros(LoraLayout((target,), 2, base)) for base in (UNKNOWN_BASE, "org/base")
    ]
    assert merge(loras).layout.base == merge(loras[::-1]).layout.base == "org/base"
    loras[0].layout.check_compatible(loras[1].layout)
    other = LoraWeights.zeros(LoraLayout((target,), 2, "org/other"))
    with pytest.raises(LayoutMismatchError, match="for base 'org/other'"):
        merge([*loras, other])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_compare_deltas_equals_norms_of_explicit_deltas(batch: tuple[int, ...]) -> None:
    """‖ΔW - ΔŴ‖ / ‖ΔW‖ and the cosine, over all targets together."""
    layout = make_lora(0).layout
    generator = torch.Generator().manual_seed(2)
    reference = LoraWeights.unflatten(
        layout, torch.randn(*batch, layout.numel, generator=generator)
    )
    estimate = LoraWeights.unflatten(
        layout, reference.flatten() + torch.randn(*batch, layout.numel, generator=generator)
    )
    flat = [
        torch.cat([delta.flatten(-2) for delta in lora.get_delta_weights()], -1)
        for lora in (reference, estimate)
    ]
    error, cosine = compare_deltas(reference, estimate)
    expected = (flat[0] - flat[1]).norm(dim=-1) / flat[0].norm(dim=-1)
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(cosine, torch.cosine_similarity(*flat, dim=-1))
    assert error.shape == batch


def test_compare_deltas_of_equal_small_and_zero_loras() -> None:
    lora, zeros = make_lora(1), LoraWeights.zeros(make_lora(1).layout)
    error, cosine = compare_deltas(lora, lora.resize(2))
    assert float(error) < 3e-3 and float(cosine) == pytest.approx(1, abs=1e-5)
    error, cosine = compare_deltas(lora, -2.0 * lora)
    assert (float(error), float(cosine)) == pytest.approx((3, -1))
    small = 1e-3 * lora
    assert [float(x) for x in compare_deltas(small, 3.0 * small)] == pytest.approx([2, 1])
    assert [float(x) for x in compare_deltas(lora, zeros)] == pytest.approx([1, 0])
    assert float(compare_deltas(zeros, lora)[1]) == 0
    mixed = LoraWeights.stack([lora, zeros])
    assert compare_deltas(mixed, mixed)[1].tolist() == pytest.approx([1, 0], abs=1e-5)


def test_relative_error_is_absolute_only_for_zero() -> None:
    lora = make_lora(0)
    norm = float(torch.stack([d.norm() for d in lora.get_delta_weights()]).norm())
    zeros = LoraWeights.zeros(lora.layout)
    assert compute_relative_error(lora * 1.5, lora) == pytest.approx(0.5)
    assert compute_relative_error(lora, lora * 0.5) == pytest.approx(1)
    assert compute_relative_error(lora * 1.5e-3, lora * 1e-3) == pytest.approx(0.5)
    assert compute_relative_error(lora, zeros) == pytest.approx(norm)
    assert compute_relative_error(zeros, zeros) == 0
    assert compute_relative_error(lora * (1 + 2e-6), lora) == pytest.approx(2e-6, rel=0.1)


def test_merge_defaults_to_the_exact_sum() -> None:
    loras = [make_lora(0, 2), make_lora(1, 3)]
    merged = merge(loras)
    assert merged.layout.rank == 5
    deltas = zip(*(lora.get_delta_weights() for lora in loras), strict=True)
    for delta, pair in zip(merged.get_delta_weights(), deltas, strict=True):
        torch.testing.assert_close(delta, sum(pair), **CLOSE)


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_merged_rank_is_that_asked_for_or_the_largest(method: str, rank: int | None) -> None:
    """For concat the sum of ranks; a rank other than asked for is the nearest of that rank."""
    loras = [make_lora(0, 2), make_lora(1, 3)]
    merged = merge(loras, [0.7, -1.3], method, rank, density=0.9, seed=3)
    assert merged.layout.rank == (rank or (5 if method == "concat" else 3))
    full = merge(loras, [0.7, -1.3], method, 7, density=0.9, seed=3).resize(7)
    for delta, full_delta in zip(merged.get_delta_weights(), full.get_delta_weights(), strict=True):
        u, s, vh = torch.linalg.svd(full_delta, full_matrices=False)
        k = merged.layout.rank
        torch.testing.assert_close(delta, (u[:, :k] * s[:k]) @ vh[:k], atol=1e-4, rtol=1e-3)


def test_pruning_keeps_a_share_of_the_numbers() -> None:
    """Density 1/2 unless told otherwise, in magnitude and at random; seeds differ."""
    lora = make_lora(5, 7)
    (delta, _) = lora.get_delta_weights()
    kept = merge([lora], method="magnitude", rank=7).get_delta_weights()[0]
    num_kept = delta.numel() // 2
    threshold = delta.abs().flatten().sort(descending=True).values[num_kept - 1]
    expected = torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))
    # rank 7 of a 9 x 12 matrix is not exact, so the nearest of that rank
    u, s, vh = torch.linalg.svd(expected)
    torch.testing.assert_close(kept, (u[:, :7] * s[:7]) @ vh[:7], atol=1e-4, rtol=1e-3)
    dropped = [merge([lora], method="dare", seed=seed).flatten() for seed in (0, 0, 1)]
    assert torch.equal(dropped[0], merge([lora], method="dare").flatten())
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])


def test_random_pruning_leaves_all_generators_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seed_cards(seed: int) -> None:
        raise AssertionError("the generators of cards have no part in it")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_cards)
    lora = make_lora(0)
    torch.default_generator.manual_seed(11)
    expected = torch.rand(3)
    torch.default_generator.manual_seed(11)
    merge([lora], method="dare", seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_merge_keeps_precision_of_loras_and_zeros() -> None:
    """A target that only one LoRA has: zeros of the others have its dtype, stacked the first's."""
    loras = [make_lora(0, 2, "first").to("cpu", torch.float64)]
    loras.append(make_lora(1, 3, "second").to("cpu", torch.float64))
    for lora in (merge(loras), pad_and_stack(loras)):
        assert {t.dtype for t in (*lora.down, *lora.up)} == {torch.float64}
    mixed = pad_and_stack([loras[0], loras[1].to("cpu", torch.float32)])
    assert {t.dtype for t in (*mixed.down, *mixed.up)} == {torch.float64}


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_merge_stays_on_the_device_of_the_loras(method: str) -> None:
    loras = [make_lora(0, 2, "first"), make_lora(1, 3)]
    expected = merge(loras, [2.0, -1.0], method)
    with mock_cuda():
        merged = merge([lora.to("cuda") for lora in loras], [2.0, -1.0], method)
        assert merged.device.type == "cuda"
        assert compute_relative_error(merged.to("cpu"), expected) < 1e-4
        batch = LoraWeights.stack([loras[1], loras[1]]).to("cuda")
        error, cosine = compare_deltas(batch, batch)
        assert error.is_cuda and cosine.is_cuda


def test_boundaries_of_arguments() -> None:
    lora = make_lora(0)
    assert merge([lora], density=1.0, method="magnitude").layout.rank == 2
    assert merge([lora], rank=1).layout.rank == 1 and merge([lora], rank=9).layout.rank == 9
    for method in ("concat", "linear"):
        assert merge([lora], [0.0], method).compute_delta_norms().max() == 0
    assert validate_weights(None, 3) == [1.0] * 3 and validate_weights([2, -3], 2) == [2.0, -3.0]
    for options in ({"density": 1.01}, {"rank": 10}, {"seed": -1}, {"weights": [float("nan")]}):
        with pytest.raises(InvalidArgumentError):
            merge([lora], **options)
    for rank in (0, 10):
        with pytest.raises(InvalidArgumentError, match="rank"):
            merge([lora], method="svd", rank=rank)


def test_merge_takes_the_targets_of_all_loras_in_order() -> None:
    first, second = make_lora(0, 2, "first"), make_lora(1, 3, "second")
    for loras in ([first, second], [second, first]):
        expected = tuple(lora.layout.targets[0] for lora in loras)
        assert merge(loras).layout.targets == pad_and_stack(loras).layout.targets == expected
        assert pad_and_stack(loras).layout.rank == 3
    with pytest.raises(InvalidArgumentError, match=r"got a batch of \[1\]: index it first"):
        pad_and_stack([LoraWeights.stack([first])])
