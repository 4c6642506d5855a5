"""A smaller basis makes the same LoRAs where the codes never used the rest."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.basis_pruning import prune_basis
from hyperlora.models.hypernetwork import Hypernetwork

LAYOUT = LoraLayout(
    (TargetModule("unet.a", 24, 40), TargetModule("unet.b", 6, 8)), rank=2, base="tiny"
)


def network(used=3):
    """Its codes move in ``used`` dimensions only, around a start of their own."""
    torch.manual_seed(0)
    model = Hypernetwork(LAYOUT, 12, width=16, num_heads=2, head="basis", head_options={"size": 8})
    with torch.no_grad():
        few = torch.randn(4, 8, used) @ torch.randn(4, used, 16)
        model.code_proj.copy_(few * 0.3)
        model.init_codes[:2].normal_(std=0.5)
    return model


def seen(n=40):
    return ImageFeatures(torch.randn(n, 1, 5, 12))


@torch.no_grad()
def apart(one, other):
    pairs = zip(one.delta(), other.delta(), strict=True)
    error = sum((a - b).square().sum() for a, b in pairs)
    return float((error / sum(d.square().sum() for d in one.delta())).sqrt())


def test_unused_directions_cost_nothing():
    model = network()
    codes = model.predict_codes(seen())
    small = prune_basis(model, codes, 3)
    fresh = seen(5)
    assert apart(model(fresh), small(fresh)) < 1e-4
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert small.config["head_options"] == {"size": 3}


def test_the_best_directions_are_kept():
    model = network(used=8)
    codes = model.predict_codes(seen())
    fresh = seen(5)
    errors = [apart(model(fresh), prune_basis(model, codes, size)(fresh)) for size in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[0]


def test_what_cannot_shrink_is_refused():
    model = network()
    with pytest.raises(InvalidArgumentError, match=r"1 \.\.\. 8 directions; 9 asked for"):
        prune_basis(model, model.predict_codes(seen()), 9)
    other = Hypernetwork(
        LAYOUT, 12, width=16, num_heads=2, head="lidb", head_options={"a": 4, "b": 4}
    )
    with pytest.raises(InvalidArgumentError, match="only a learned basis"):
        prune_basis(other, other.predict_codes(seen()), 2)
    split = Hypernetwork(
        LAYOUT, 12, width=16, num_heads=2, head_options={"size": 8, "per_rank": True}
    )
    with pytest.raises(InvalidArgumentError, match="per rank"):
        prune_basis(split, split.predict_codes(seen()), 4)
