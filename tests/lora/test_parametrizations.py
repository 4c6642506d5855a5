"""LoHa and LoKr against PEFT's own modules; normalized rows and back."""

from collections.abc import Sequence

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer, canonicalize_rows
from hyperlora.lora.parametrizations import (
    PARAMETRIZATIONS,
    LohaParametrization,
    LokrParametrization,
    Parametrization,
    make_parametrization,
)
from hyperlora.lora.weights import LoraWeights

SIZES = ((24, 40), (32, 16), (20, 12))
CONV = TargetModule("unet.conv", 8 * 9, 12, (3, 3))


def make_tiny_layout(rank: int, conv: bool = False) -> LoraLayout:
    targets = [TargetModule(f"unet.layers.{i}", *size) for i, size in enumerate(SIZES)]
    return LoraLayout((*targets, CONV) if conv else tuple(targets), rank, "tiny")


def make_codes(parametrization: Parametrization, num_loras: int, seed: int = 0) -> Tensor:
    size = len(parametrization.init_codes(torch.Generator().manual_seed(0)))
    return torch.randn(num_loras, size, generator=torch.Generator().manual_seed(seed)) * 0.3


def make_peft_model(config: PeftConfig) -> PeftModel:
    torch.manual_seed(0)
    network = nn.Module()
    network.layers = nn.ModuleList(nn.Linear(*size) for size in SIZES)
    network.forward = lambda x: x  # only its layers are used
    return peft.get_peft_model(network, config)


def set_peft_codes(
    model: PeftModel,
    parametrization: LohaParametrization | LokrParametrization,
    codes: Tensor,
    names: Sequence[str],
) -> list[Tensor]:
    """Copy one code into PEFT's modules; returns their ΔW."""
    remaining, deltas = codes.clone(), []
    for i, target in enumerate(parametrization.target_layout.targets):
        module = model.base_model.model.layers[i]
        for name, shape in zip(names, parametrization.get_factor_shapes(target), strict=True):
            parameter = getattr(module, name)["default"]
            assert tuple(parameter.shape) == shape
            parameter.data = remaining[: parameter.numel()].view(shape)
            remaining = remaining[parameter.numel() :]
        deltas.append(module.get_delta_weight("default"))
    assert len(remaining) == 0
    return deltas


CASES = {
    "loha": (
        peft.LoHaConfig(r=2, alpha=2, target_modules=["0", "1", "2"]),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ),
    "lokr": (
        peft.LoKrConfig(r=2, alpha=2, decompose_factor=4, target_modules=["0", "1", "2"]),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_parametrization_equals_peft(kind: str) -> None:
    config, names = CASES[kind]
    parametrization = make_parametrization(kind, make_tiny_layout(4), inner_rank=2)
    codes = make_codes(parametrization, 3)
    model = make_peft_model(config)
    for i, lora in enumerate(parametrization(codes)):
        peft_deltas = set_peft_codes(model, parametrization, codes[i], names)
        for delta, peft_delta in zip(lora.get_delta_weights(), peft_deltas, strict=True):
            assert torch.allclose(delta, peft_delta, atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_resize_equals_peft_conversion_to_lora(kind: str) -> None:
    config, names = CASES[kind]
    parametrization = make_parametrization(kind, make_tiny_layout(4), inner_rank=2)
    codes = make_codes(parametrization, 1)
    model = make_peft_model(config)
    set_peft_codes(model, parametrization, codes[0], names)
    _, state = convert_to_lora(model, rank=3)
    for i, delta in enumerate(parametrization(codes).resize(3)[0].get_delta_weights()):
        key = f"base_model.model.layers.{i}.lora_%s.weight"
        assert torch.allclose(delta, state[key % "B"] @ state[key % "A"], atol=1e-5)


def test_lokr_of_convolutions_equals_peft_kronecker_product() -> None:
    from peft.tuners.lokr.layer import make_kron

    parametrization = make_parametrization("lokr", LoraLayout((CONV,), 4, "tiny"), inner_rank=2)
    codes = make_codes(parametrization, 1)
    shapes = parametrization.get_factor_shapes(CONV)
    pieces = codes[0].split([rows * columns for rows, columns in shapes])
    w1, a2, b2 = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
    w2 = (a2 @ b2).view(a2.shape[0], -1, 3, 3)
    assert torch.allclose(
        parametrization(codes).get_delta_weights()[0][0], make_kron(w1, w2).flatten(1), atol=1e-6
    )


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_init_codes_give_zero_delta_with_gradients(kind: str) -> None:
    parametrization = make_parametrization(kind, make_tiny_layout(4, conv=True), a=6, b=5)
    init_codes = parametrization.init_codes(torch.Generator().manual_seed(3))
    assert torch.equal(init_codes, parametrization.init_codes(torch.Generator().manual_seed(3)))
    codes = init_codes[None].expand(2, -1).clone().requires_grad_()
    weights = parametrization(codes)
    assert weights.batch_shape == (2,) and float(weights.compute_delta_norms().abs().max()) == 0
    sum(d.sum() for d in weights.get_delta_weights()).backward()
    assert float(codes.grad.abs().sum()) > 0
    if kind in ("loha", "lokr"):
        lora = parametrization(make_codes(parametrization, 2))
        for resized_delta, delta in zip(
            lora.resize(4).get_delta_weights(), lora.get_delta_weights(), strict=True
        ):
            assert torch.allclose(resized_delta, delta, atol=1e-5), (
                "the default inner rank loses nothing"
            )


def test_make_parametrization_names_the_known_kinds() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'dora'.*lora, lidb, loha, lokr"):
        make_parametrization("dora", make_tiny_layout(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_denormalize_inverts_normalize(seed: int, num_rows: int, canonical: bool) -> None:
    layout = make_tiny_layout(2)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, layout.numel, generator=generator) * 3 + 1
    normalizer = LoraNormalizer.fit(layout, rows.split(2), canonical=canonical)
    restored = normalizer.denormalize(normalizer.normalize(rows))
    restored_deltas = LoraWeights.unflatten(layout, restored).get_delta_weights()
    deltas = LoraWeights.unflatten(layout, rows).get_delta_weights()
    for restored_delta, delta in zip(restored_deltas, deltas, strict=True):
        assert torch.allclose(restored_delta, delta, rtol=1e-3, atol=1e-3)
    if not canonical:
        assert torch.allclose(restored, rows, atol=1e-4)
    expected = canonicalize_rows(layout, rows) if canonical else rows
    assert torch.allclose(normalizer.mean, expected.mean(0), atol=1e-5)
    assert torch.allclose(normalizer.std, expected.std(0, correction=0), atol=1e-4)


def test_canonicalize_rows_is_equal_for_equal_deltas() -> None:
    torch.manual_seed(0)
    layout = make_tiny_layout(2)
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    rotation = torch.linalg.qr(torch.randn(2, 2))[0]
    rotated = LoraWeights(
        layout, tuple(rotation.mT @ d for d in lora.down), tuple(u @ rotation for u in lora.up)
    )
    rows = [canonicalize_rows(layout, weights.flatten()) for weights in (lora, rotated)]
    assert torch.allclose(*rows, atol=1e-5)
