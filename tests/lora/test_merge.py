"""Merging against PEFT's ``add_weighted_adapter`` and against ΔW itself; blocks of a LoRA."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.blocks import scale_blocks, select_blocks
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.merge import MERGE_METHODS, compute_relative_error, merge, pad_and_stack
from hyperlora.lora.weights import LoraWeights

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def lora(seed: int, rank: int = 2, sites: str = "", base: str = "b") -> LoraWeights:
    layout = LoraLayout.from_module(Two(), "unet", lambda path: path.startswith(sites), rank, base)
    return LoraWeights.unflatten(
        layout, torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
    )


def in_peft(
    loras: list[LoraWeights], weights: list[float], kind: str, rank: int
) -> dict[str, Tensor]:
    """ΔW by site of PEFT's ``add_weighted_adapter``."""
    from peft import LoraConfig, get_peft_model

    names = [f"l{i}" for i in range(len(loras))]
    config = LoraConfig(
        r=loras[0].layout.rank, lora_alpha=loras[0].layout.rank, target_modules=["first", "second"]
    )
    model = get_peft_model(Two(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, one in zip(names, loras, strict=True):
        for site, down, up in zip(one.layout.targets, one.down, one.up, strict=True):
            layer = model.base_model.model.get_submodule(site.path)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = (
                down.clone(),
                up.clone(),
            )
    model.add_weighted_adapter(
        names, weights, "made", combination_type=kind, svd_rank=rank, density=0.5
    )
    layers = {path: model.base_model.model.get_submodule(path) for path in ("first", "second")}
    return {path: layer.get_delta_weight("made").detach() for path, layer in layers.items()}


@pytest.mark.parametrize(
    ("how", "kind"),
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
def test_equals_peft(how: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT draws initial weights before it prunes: the same numbers must be dropped whatever was drawn before
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.arange(p.numel()) % 3 > 0).view(p.shape).to(p)
    )
    loras, weights = [lora(0), lora(1), lora(2)], [0.7, -0.4, 1.2]
    found = merge(
        loras, weights, how, rank=None if how in ("concat", "linear") else 3, density=0.5, seed=4
    )
    expected = in_peft(loras, weights, kind, 3)
    for site, delta in zip(found.layout.targets, found.get_delta_weights(), strict=True):
        torch.testing.assert_close(delta, expected[site.path], **CLOSE)


@given(st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=4), st.integers(0, 99))
def test_concat_is_the_weighted_sum_of_deltas(weights: list[float], seed: int) -> None:
    ranks = [1 + (seed + i) % 3 for i in range(len(weights))]
    loras = [lora(seed + i, rank, ("", "first", "second")[i % 3]) for i, rank in enumerate(ranks)]
    found = merge(loras, weights)
    assert found.layout.rank == sum(ranks)
    for site, delta in zip(found.layout.targets, found.get_delta_weights(), strict=True):
        expected = torch.zeros(site.out_features, site.in_features)
        for given_lora, weight in zip(loras, weights, strict=True):
            for theirs, change in zip(
                given_lora.layout.targets, given_lora.get_delta_weights(), strict=True
            ):
                expected += weight * change if theirs == site else 0
        torch.testing.assert_close(delta, expected, **CLOSE)
    exact = compute_relative_error(found.resize(found.layout.rank), found)
    assert exact < 1e-5
    assert compute_relative_error(found * 0.9, found) == pytest.approx(
        0.1 if found.compute_delta_norms().sum() > 1e-12 else 0, abs=1e-5
    )


def test_align_keeps_every_delta() -> None:
    loras = [lora(0, 1, "first"), lora(1, 3), lora(2, 2, "second")]
    batch = pad_and_stack(loras)
    assert len(batch) == 3
    assert batch.layout.rank == 3
    for i, one in enumerate(loras):
        assert compute_relative_error(batch[i], one) < 1e-6


@pytest.mark.parametrize("how", MERGE_METHODS)
def test_one_lora_merged_at_full_density_is_itself(how: str) -> None:
    one = lora(3)
    assert compute_relative_error(merge([one], method=how, density=1.0), one) < 1e-4


def test_blocks() -> None:
    one = lora(0)
    assert [s.path for s in select_blocks(one, ["unet.second"]).layout.targets] == ["second"]
    weighed = scale_blocks(one, {"unet": 0.5, "unet.first": -1.0})
    for path, factor in (("first", -1.0), ("second", 0.5)):
        there = [s.path for s in one.layout.targets].index(path)
        torch.testing.assert_close(
            weighed.get_delta_weights()[there], factor * one.get_delta_weights()[there]
        )
    with pytest.raises(InvalidArgumentError, match=r"did you mean 'unet\.first'"):
        select_blocks(one, ["unet.fist"])
    assert (
        select_blocks(one, ["unet"]) == one
        or compute_relative_error(select_blocks(one, ["unet"]), one) == 0
    )


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: merge([lora(0)], method="slerp"),
            InvalidArgumentError,
            "unknown way to merge 'slerp'; known: concat, svd",
        ),
        (lambda: merge([]), InvalidArgumentError, "at least one LoRA expected"),
        (
            lambda: merge([lora(0)], [1.0, 2.0]),
            InvalidArgumentError,
            "1 LoRAs need as many weights, got 2",
        ),
        (lambda: merge([lora(0)], [float("inf")]), InvalidArgumentError, "finite numbers, got inf"),
        (lambda: merge([lora(0)], density=0.0), InvalidArgumentError, "density above 0"),
        (lambda: merge([lora(0)], rank=0), InvalidArgumentError, "rank must be at least 1"),
        (lambda: merge([lora(0), lora(1, base="c")]), LayoutMismatchError, "for base 'c'"),
        (
            lambda: merge([lora(0), LoraWeights.stack([lora(1)])]),
            InvalidArgumentError,
            "a batch of",
        ),
    ],
)
def test_says_what_is_wrong(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
