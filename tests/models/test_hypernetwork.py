"""Hypernetworks and the parametrisations they write."""

import pytest
import torch

from hyperlora.features import ImageFeatures
from hyperlora.lora.heads import LiDB, LowRankBasisHead
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 24, 40),
        TargetModule("unet.b", 6, 8),
        TargetModule("unet.c", 9 * 4, 16, (3, 3)),
    ),
    rank=2,
    base="tiny",
)
HEADS = [
    ("basis", {"size": 5}, 1),
    ("basis", {"size": 5, "per_rank": True}, 1),
    ("lidb", {"a": 10, "b": 7, "seed": 3}, 1),
    ("lidb", {"a": 10, "b": 7}, 4),
]


def network(head, options, iterations):
    torch.manual_seed(0)
    return Hypernetwork(
        LAYOUT, 12, width=16, num_heads=2, head=head, head_options=options, iterations=iterations
    )


def features(batch=3, views=2, tokens=5):
    return ImageFeatures(torch.randn(batch, views, tokens, 12))


@pytest.mark.parametrize(("head", "options", "iterations"), HEADS)
def test_zero_at_start_but_gradients_reach_the_head(head, options, iterations):
    model = network(head, options, iterations)
    weights = model(features())
    assert weights.batch == (3,) and weights.layout == LAYOUT
    assert weights.norms().max() == 0
    sum((d - 1).square().sum() for d in weights.delta()).backward()
    sites = len(LAYOUT.targets)
    assert model.code_proj.grad[sites:].abs().sum() > 0, "the up codes must be able to leave zero"


@pytest.mark.parametrize(("head", "options", "iterations"), HEADS)
def test_subjects_do_not_mix_and_views_matter(head, options, iterations):
    model = network(head, options, iterations)
    torch.nn.init.normal_(model.code_proj, std=0.3)
    torch.nn.init.normal_(model.init_codes, std=0.3)
    seen = features()
    together = model(seen).flatten()
    alone = model(ImageFeatures(seen.tokens[1:2])).flatten()
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    swapped = ImageFeatures(seen.tokens.flip(1))
    assert torch.allclose(model(swapped).flatten(), together, atol=1e-5), "photos are a set"
    one = model(ImageFeatures(seen.tokens[:, :1])).flatten()
    assert not torch.allclose(one, together, atol=1e-4)


def test_a_basis_mixed_per_rank_holds_the_whole_mix_and_more():
    torch.manual_seed(0)
    whole, split = (
        LowRankBasisHead(LAYOUT, 5),
        LowRankBasisHead(LAYOUT, 5, coefficients_per_rank=True),
    )
    split.load_state_dict(whole.state_dict())
    down, up = torch.randn(2, 4, 3, 5)
    same = split(*(code.repeat_interleave(2, -1) for code in (down, up)))
    torch.testing.assert_close(same.flatten(), whole(down, up).flatten())
    codes = torch.zeros(1, 3, 10)
    codes[..., 4 * 2 + 1] = 1
    (factor, *_) = split(codes, codes).up
    torch.testing.assert_close(factor[0, :, 1], whole.up_basis[0][4].unflatten(-1, (40, 2))[:, 1])
    assert not factor[0, :, 0].any(), (
        "the other vector of the direction has a coefficient of its own"
    )


def test_iterations_refine_the_same_guess():
    once, four = network("lidb", {"a": 10, "b": 7}, 1), network("lidb", {"a": 10, "b": 7}, 4)
    for model in (once, four):
        torch.nn.init.normal_(model.code_proj, std=0.3)
    seen = features()
    assert once.predict_codes(seen).shape == four.predict_codes(seen).shape == (3, 6, 20)
    assert not torch.allclose(once.predict_codes(seen), four.predict_codes(seen))


def test_lidb_is_the_papers_product_with_orthonormal_fixed_factors():
    lidb = LiDB(LAYOUT, a=10, b=7, seed=3)
    assert not list(lidb.parameters()) and not lidb.state_dict(), (
        "rebuilt from the seed, never stored"
    )
    assert torch.equal(lidb.a0, LiDB(LAYOUT, a=10, b=7, seed=3).a0)
    assert not torch.equal(lidb.a0, LiDB(LAYOUT, a=10, b=7, seed=4).a0)
    assert torch.allclose(lidb.a0.mT @ lidb.a0, torch.eye(10), atol=1e-5)
    assert torch.allclose(lidb.b0 @ lidb.b0.mT, torch.eye(7), atol=1e-5)
    down, up = torch.randn(3, 20), torch.randn(3, 20)
    weights = lidb(down, up)
    a_train, b_train = up[0].view(10, 2), down[0, :14].view(2, 7)
    assert torch.allclose(weights.delta()[0], lidb.a0 @ a_train @ b_train @ lidb.b0, atol=1e-5)
    assert isinstance(weights, LoraWeights)


def test_lidb_of_the_paper_has_about_30_thousand_numbers_for_stable_diffusion():
    sites = tuple(TargetModule(f"unet.{i}", 768, 320) for i in range(128 + 48))
    lidb = LiDB(LoraLayout(sites, 1, "sd"), a=100, b=50)
    assert 25_000 < len(sites) * (100 + 50) < 35_000
    assert lidb.init_codes().shape == (2 * len(sites), 100)
