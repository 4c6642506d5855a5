"""A pruned basis gives the same LoRAs where the codes never used the pruned directions."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.basis_pruning import prune_basis
from hyperlora.models.hypernetwork import Hypernetwork

LAYOUT = LoraLayout(
    (TargetModule("unet.a", 24, 40), TargetModule("unet.b", 6, 8)), rank=2, base="tiny"
)


def make_network(code_rank: int = 3) -> Hypernetwork:
    """A network whose codes vary in ``code_rank`` dimensions only, around codes of their own."""
    torch.manual_seed(0)
    network = Hypernetwork(
        LAYOUT, 12, width=16, num_heads=2, head="basis", head_options={"size": 8}
    )
    with torch.no_grad():
        code_proj = torch.randn(4, 8, code_rank) @ torch.randn(4, code_rank, 16)
        network.code_proj.copy_(code_proj * 0.3)
        network.init_codes[:2].normal_(std=0.5)
    return network


def make_features(n: int = 40) -> ImageFeatures:
    return ImageFeatures(torch.randn(n, 1, 5, 12))


@torch.no_grad()
def relative_error(loras: LoraWeights, other_loras: LoraWeights) -> float:
    pairs = zip(loras.get_delta_weights(), other_loras.get_delta_weights(), strict=True)
    error = sum((a - b).square().sum() for a, b in pairs)
    return float((error / sum(d.square().sum() for d in loras.get_delta_weights())).sqrt())


def test_prune_basis_keeps_outputs_without_unused_directions() -> None:
    network = make_network()
    codes = network.predict_codes(make_features())
    pruned = prune_basis(network, codes, 3)
    features = make_features(5)
    assert relative_error(network(features), pruned(features)) < 1e-4
    num_pruned = sum(p.numel() for p in pruned.parameters())
    assert num_pruned < sum(p.numel() for p in network.parameters())
    assert pruned.config["head_options"] == {"size": 3}


def test_prune_basis_error_falls_with_the_basis_size() -> None:
    network = make_network(code_rank=8)
    codes = network.predict_codes(make_features())
    features = make_features(5)
    errors = [
        relative_error(network(features), prune_basis(network, codes, size)(features))
        for size in (2, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[0]


def test_prune_basis_rejects_other_heads_and_sizes() -> None:
    network = make_network()
    with pytest.raises(InvalidArgumentError, match=r"1 \.\.\. 8 directions; 9 asked for"):
        prune_basis(network, network.predict_codes(make_features()), 9)
    lidb_network = Hypernetwork(
        LAYOUT, 12, width=16, num_heads=2, head="lidb", head_options={"a": 4, "b": 4}
    )
    with pytest.raises(InvalidArgumentError, match="only a low-rank basis"):
        prune_basis(lidb_network, lidb_network.predict_codes(make_features()), 2)
    per_rank_network = Hypernetwork(
        LAYOUT,
        12,
        width=16,
        num_heads=2,
        head_options={"size": 8, "coefficients_per_rank": True},
    )
    with pytest.raises(InvalidArgumentError, match="per rank"):
        prune_basis(per_rank_network, per_rank_network.predict_codes(make_features()), 4)
