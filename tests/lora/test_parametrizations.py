"""LoHa and LoKr as parametrisations, against PEFT's own modules; rows scaled and back."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer, canonicalize_rows
from hyperlora.lora.parametrizations import PARAMETRIZATIONS, make_parametrization
from hyperlora.lora.weights import LoraWeights

SIZES = ((24, 40), (32, 16), (20, 12))
CONV = TargetModule("unet.conv", 8 * 9, 12, (3, 3))


def layout(rank, conv=False):
    sites = [TargetModule(f"unet.layers.{i}", *size) for i, size in enumerate(SIZES)]
    return LoraLayout((*sites, CONV) if conv else tuple(sites), rank, "tiny")


def codes_of(made, k, seed=0):
    size = len(made.start(torch.Generator().manual_seed(0)))
    return torch.randn(k, size, generator=torch.Generator().manual_seed(seed)) * 0.3


def in_peft(config):
    torch.manual_seed(0)
    net = nn.Module()
    net.layers = nn.ModuleList(nn.Linear(*size) for size in SIZES)
    net.forward = lambda x: x  # only its layers are asked
    return peft.get_peft_model(net, config)


def filled(model, made, codes, names):
    """PEFT's modules with the numbers of one code, and their ΔW."""
    pieces, deltas = codes.clone(), []
    for i, site in enumerate(made.sites.sites):
        module = model.base_model.model.layers[i]
        for name, shape in zip(names, made.shapes(site), strict=True):
            parameter = getattr(module, name)["default"]
            assert tuple(parameter.shape) == shape
            parameter.data = pieces[: parameter.numel()].view(shape)
            pieces = pieces[parameter.numel() :]
        deltas.append(module.get_delta_weight("default"))
    assert len(pieces) == 0
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
def test_equals_the_modules_of_peft(kind):
    config, names = CASES[kind]
    made = make_parametrization(kind, layout(4), inner_rank=2)
    codes = codes_of(made, 3)
    model = in_peft(config)
    for i, lora in enumerate(made(codes)):
        for mine, theirs in zip(lora.delta(), filled(model, made, codes[i], names), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_as_plain_lora_equals_peft_conversion(kind):
    config, names = CASES[kind]
    made = make_parametrization(kind, layout(4), inner_rank=2)
    codes = codes_of(made, 1)
    model = in_peft(config)
    filled(model, made, codes[0], names)
    _, state = convert_to_lora(model, rank=3)
    for i, mine in enumerate(made(codes).resize(3)[0].get_delta_weights()):
        key = f"base_model.model.layers.{i}.lora_%s.weight"
        assert torch.allclose(mine, state[key % "B"] @ state[key % "A"], atol=1e-5)


def test_lokr_of_convolutions_is_pefts_kronecker_product():
    from peft.tuners.lokr.layer import make_kron

    made = make_parametrization("lokr", LoraLayout((CONV,), 4, "tiny"), inner_rank=2)
    codes = codes_of(made, 1)
    (w1, a2, b2) = (shape for shape in made.get_factor_shapes(CONV))
    pieces = [
        p.view(s)
        for p, s in zip(codes[0].split([a * b for a, b in (w1, a2, b2)]), (w1, a2, b2), strict=True)
    ]
    w2 = (pieces[1] @ pieces[2]).view(a2[0], -1, 3, 3)
    assert torch.allclose(
        made(codes).get_delta_weights()[0][0], make_kron(pieces[0], w2).flatten(1), atol=1e-6
    )


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_starts_at_nothing_and_can_leave_it(kind):
    made = make_parametrization(kind, layout(4, conv=True), a=6, b=5)
    start = made.init_codes(torch.Generator().manual_seed(3))
    assert torch.equal(start, made.init_codes(torch.Generator().manual_seed(3)))
    codes = start[None].expand(2, -1).clone().requires_grad_()
    weights = made(codes)
    assert weights.batch_shape == (2,) and float(weights.compute_delta_norms().abs().max()) == 0
    sum(d.sum() for d in weights.get_delta_weights()).backward()
    assert float(codes.grad.abs().sum()) > 0
    if kind in ("loha", "lokr"):
        small = made(codes_of(made, 2)).resize(4)
        for mine, whole in zip(
            small.get_delta_weights(), made(codes_of(made, 2)).get_delta_weights(), strict=True
        ):
            assert torch.allclose(mine, whole, atol=1e-5), "the default inner rank loses nothing"


def test_an_unknown_space_is_named():
    with pytest.raises(InvalidArgumentError, match=r"'dora'.*lora, lidb, loha, lokr"):
        make_parametrization("dora", layout(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_scaled_rows_come_back(seed, n, balanced):
    where = layout(2)
    rows = torch.randn(n, where.numel, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    scale = LoraNormalizer.fit(where, rows.split(2), canonical=balanced)
    back = scale.denormalize(scale.normalize(rows))
    mine, theirs = (LoraWeights.unflatten(where, r).get_delta_weights() for r in (back, rows))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
    if not balanced:
        assert torch.allclose(back, rows, atol=1e-4)
    expected = canonicalize_rows(where, rows) if balanced else rows
    assert torch.allclose(scale.mean, expected.mean(0), atol=1e-5)
    assert torch.allclose(scale.std, expected.std(0, correction=0), atol=1e-4)


def test_balanced_rows_do_not_depend_on_how_a_lora_is_written():
    torch.manual_seed(0)
    where = layout(2)
    lora = LoraWeights.unflatten(where, torch.randn(where.numel))
    turn = torch.linalg.qr(torch.randn(2, 2))[0]
    other = LoraWeights(
        where, tuple(turn.mT @ d for d in lora.down), tuple(u @ turn for u in lora.up)
    )
    rows = [canonicalize_rows(where, w.flatten()) for w in (lora, other)]
    assert torch.allclose(*rows, atol=1e-5)
