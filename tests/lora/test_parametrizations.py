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
    LidbParametrization,
    LohaParametrization,
    LokrParametrization,
    Parametrization,
    make_parametrization,
)
from hyperlora.lora.weights import LoraWeights
from tests.mock_cuda import mock_cuda

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


def split_codes(codes: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """One vector of codes as matrices."""
    pieces = codes.split([rows * columns for rows, columns in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def test_loha_equals_its_formula() -> None:
    """ΔW = (a1 b1) ∘ (a2 b2), of rank q², for any batch axes and for convolutions."""
    layout = LoraLayout((CONV, TargetModule("unet.a", 5, 7)), 4, "tiny")
    parametrization = LohaParametrization(layout, 3)
    assert parametrization.layout == layout.with_rank(9)
    shapes = [(12, 3), (3, 72), (12, 3), (3, 72), (7, 3), (3, 5), (7, 3), (3, 5)]
    codes = torch.randn(2, 4, sum(rows * columns for rows, columns in shapes))
    deltas = parametrization(codes).get_delta_weights()
    for i in range(2):
        for k in range(4):
            matrices = split_codes(codes[i, k], shapes)
            for target, (a1, b1, a2, b2) in enumerate((matrices[:4], matrices[4:])):
                expected = (a1 @ b1) * (a2 @ b2)
                torch.testing.assert_close(deltas[target][i, k], expected, atol=1e-4, rtol=1e-4)


def test_lokr_equals_torch_kron() -> None:
    """ΔW = w1 ⊗ (a2 b2); w1 is wide at one target, high at another and square at the third."""
    targets = (
        TargetModule("unet.wide", 20, 6),
        TargetModule("unet.high", 6, 20),
        TargetModule("unet.square", 16, 12),
    )
    parametrization = LokrParametrization(LoraLayout(targets, 9, "tiny"), 3)
    shapes = [parametrization.get_factor_shapes(target) for target in targets]
    assert shapes[0] == ((2, 4), (3, 3), (3, 5)) and shapes[1] == ((4, 2), (5, 3), (3, 3))
    assert shapes[2] == ((4, 4), (3, 3), (3, 4))
    assert parametrization.layout == parametrization.target_layout.with_rank(12)
    flat_shapes = [shape for group in shapes for shape in group]
    codes = torch.randn(2, sum(rows * columns for rows, columns in flat_shapes))
    weights = parametrization(codes[:, None]).apply(lambda t: t[:, 0])
    for i in range(2):
        matrices = split_codes(codes[i], flat_shapes)
        for target in range(3):
            w1, a2, b2 = matrices[3 * target : 3 * target + 3]
            delta = weights.get_delta_weights()[target][i]
            torch.testing.assert_close(delta, torch.kron(w1, a2 @ b2), atol=1e-5, rtol=1e-4)
            if target == 2:
                torch.testing.assert_close(weights.up[2][i], torch.kron(w1, a2))
    # of the two identities that of smaller rank: 6 at the first two targets
    for factors in (weights.up[0], weights.up[1], weights.down[0].mT, weights.down[1].mT):
        assert factors.flatten(0, 1).any(0).tolist() == [True] * 6 + [False] * 6


def test_factor_of_lokr_shapes_w1() -> None:
    target = TargetModule("unet.a", 64, 48)
    shapes = {
        factor: LokrParametrization(LoraLayout((target,), 1, ""), 1, factor).get_factor_shapes(
            target
        )[0]
        for factor in (2, 4, 8)
    }
    assert shapes == {2: (2, 2), 4: (4, 4), 8: (8, 8)}
    assert LokrParametrization(LoraLayout((target,), 1, ""), 1).factor == 4
    conv = LokrParametrization(LoraLayout((CONV,), 1, ""), 1).get_factor_shapes(CONV)
    assert conv == ((4, 4), (3, 1), (1, 18))  # of 8 channels, with the 9 numbers of a kernel in b2


@pytest.mark.parametrize(("kind", "zero_index"), [("loha", 3), ("lokr", 0)])
def test_init_codes_are_he_uniform(kind: str, zero_index: int) -> None:
    """Uniform in ± columns^-1/2, with one matrix of zeros; as PEFT's ``kaiming_uniform_(a=√5)``."""
    layout = LoraLayout((TargetModule("unet.a", 4096, 2048), TargetModule("unet.b", 64, 48)), 4, "")
    parametrization = make_parametrization(kind, layout, inner_rank=5)
    codes = parametrization.init_codes(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for target in layout.targets:
        for index, shape in enumerate(parametrization.get_factor_shapes(target)):
            size = shape[0] * shape[1]
            matrix, codes = codes[:size], codes[size:]
            expected = (2 * torch.rand(size, generator=generator) - 1) / shape[1] ** 0.5
            expected = torch.zeros(size) if index == zero_index else expected
            torch.testing.assert_close(matrix, expected)
    assert len(codes) == 0


@pytest.mark.parametrize("kind", ["lora", "lidb"])
def test_init_codes_of_factors_are_normal(kind: str) -> None:
    """``down`` of in^-1/2, or of b^-1/2 in LiDB's codes; ``up`` zero."""
    layout = LoraLayout((TargetModule("unet.a", 400, 30), TargetModule("unet.b", 25, 50)), 20, "")
    parametrization = make_parametrization(kind, layout, a=20, b=16)
    codes = parametrization.init_codes(torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    if kind == "lora":
        pieces = codes.split([8000, 600, 500, 1000])
        assert not pieces[1].any() and not pieces[3].any()
        for down, size in ((pieces[0], 400), (pieces[2], 25)):
            expected = torch.randn(len(down), generator=generator) / size**0.5
            torch.testing.assert_close(down, expected)
        assert torch.equal(parametrization(codes).flatten(), codes)
    else:
        down, up = codes.chunk(2)
        torch.testing.assert_close(down, torch.randn(800, generator=generator) / 4)
        assert not up.any() and len(up) == 800


def test_lidb_codes_are_those_of_its_head() -> None:
    parametrization = make_parametrization("lidb", make_tiny_layout(2), a=6, b=5)
    assert isinstance(parametrization, LidbParametrization)
    assert parametrization.layout == make_tiny_layout(2)
    codes = torch.randn(3, 2, 2 * 3 * 12)
    expected = parametrization.lidb(*codes.view(3, 2, 2, 3, 12).unbind(2))
    assert torch.equal(parametrization(codes).flatten(), expected.flatten())
    default = make_parametrization("lidb", make_tiny_layout(2)).lidb
    assert (default.a, default.b, default.seed) == (100, 50, 0)


def test_default_inner_ranks_fit_into_the_rank() -> None:
    """LoHa: √rank rounded down; LoKr: rank / 4 rounded down; both at least 1."""
    ranks = {
        kind: [make_parametrization(kind, make_tiny_layout(r)).inner_rank for r in (1, 3, 8, 9, 16)]
        for kind in ("loha", "lokr")
    }
    assert ranks == {"loha": [1, 1, 2, 3, 4], "lokr": [1, 1, 2, 2, 4]}
    assert make_parametrization("loha", make_tiny_layout(16), 2).inner_rank == 2
    assert make_parametrization("lokr", make_tiny_layout(16), 3).inner_rank == 3


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrizations_keep_the_device_of_codes(kind: str) -> None:
    parametrization = make_parametrization(kind, make_tiny_layout(4), a=6, b=5)
    codes = make_codes(parametrization, 2)
    expected = parametrization(codes).flatten()
    with mock_cuda(), torch.no_grad():
        if isinstance(parametrization, LidbParametrization):
            parametrization.lidb.to("cuda")
        flat = parametrization(codes.to("cuda")).flatten()
        assert flat.is_cuda
        torch.testing.assert_close(flat.cpu(), expected)
    if kind in ("loha", "lokr"):
        assert parametrization(codes.double()).flatten().dtype == torch.float64
