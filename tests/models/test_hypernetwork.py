"""Hypernetworks and the heads that expand their codes."""

import pytest
import torch
from torch import Tensor

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
    ("basis", {"size": 5, "coefficients_per_rank": True}, 1),
    ("basis", {"size": 5, "share_by_shape": True}, 1),
    ("lidb", {"a": 10, "b": 7, "seed": 3}, 1),
    ("lidb", {"a": 10, "b": 7}, 4),
]


def make_network(head: str, head_options: dict[str, int | bool], iterations: int) -> Hypernetwork:
    torch.manual_seed(0)
    return Hypernetwork(
        LAYOUT,
        12,
        width=16,
        num_heads=2,
        head=head,
        head_options=head_options,
        iterations=iterations,
    )


def make_features(batch=3, views=2, tokens=5) -> ImageFeatures:
    return ImageFeatures(torch.randn(batch, views, tokens, 12))


@pytest.mark.parametrize(("head", "head_options", "iterations"), HEADS)
def test_hypernetwork_starts_at_zero_with_gradients(head, head_options, iterations) -> None:
    network = make_network(head, head_options, iterations)
    weights = network(make_features())
    assert weights.batch_shape == (3,) and weights.layout == LAYOUT
    assert weights.compute_delta_norms().max() == 0
    sum((d - 1).square().sum() for d in weights.get_delta_weights()).backward()
    num_targets = len(LAYOUT.targets)
    up_gradients = network.code_proj.grad[num_targets:]
    assert up_gradients.abs().sum() > 0, "the up codes must be able to leave zero"


@pytest.mark.parametrize(("head", "head_options", "iterations"), HEADS)
def test_hypernetwork_separates_subjects_and_uses_all_views(head, head_options, iterations) -> None:
    network = make_network(head, head_options, iterations)
    torch.nn.init.normal_(network.code_proj, std=0.3)
    torch.nn.init.normal_(network.init_codes, std=0.3)
    features = make_features()
    batched = network(features).flatten()
    alone = network(ImageFeatures(features.tokens[1:2])).flatten()
    assert torch.allclose(batched[1:2], alone, atol=1e-5)
    flipped = network(ImageFeatures(features.tokens.flip(1))).flatten()
    assert torch.allclose(flipped, batched, atol=1e-5), "photos are a set"
    one_view = network(ImageFeatures(features.tokens[:, :1])).flatten()
    assert not torch.allclose(one_view, batched, atol=1e-4)


def test_coefficients_per_rank_extend_the_low_rank_basis() -> None:
    torch.manual_seed(0)
    head = LowRankBasisHead(LAYOUT, 5)
    per_rank_head = LowRankBasisHead(LAYOUT, 5, coefficients_per_rank=True)
    per_rank_head.load_state_dict(head.state_dict())
    down, up = torch.randn(2, 4, 3, 5)
    same = per_rank_head(*(code.repeat_interleave(2, -1) for code in (down, up)))
    torch.testing.assert_close(same.flatten(), head(down, up).flatten())
    codes = torch.zeros(1, 3, 10)
    codes[..., 4 * 2 + 1] = 1
    (factor, *_) = per_rank_head(codes, codes).up
    torch.testing.assert_close(factor[0, :, 1], head.up_basis[0][4].unflatten(-1, (40, 2))[:, 1])
    assert not factor[0, :, 0].any(), "the direction's other vector has its own coefficient"


def test_shared_basis_equals_its_formula() -> None:
    """Targets of equal inputs or outputs mix the same directions, each from its own D_0."""
    targets = (
        TargetModule("unet.a", 24, 40),
        TargetModule("unet.b", 24, 16),
        TargetModule("unet.c", 36, 16),
        TargetModule("unet.d", 9 * 4, 40, (3, 3)),  # of no equal inputs: a convolution
        TargetModule("unet.e", 24, 40),
    )
    torch.manual_seed(0)
    head = LowRankBasisHead(LoraLayout(targets, 2, "tiny"), 5, share_by_shape=True)
    assert [d.shape for d in head.down_basis] == [(5, 48), (5, 72), (5, 72)]
    assert [u.shape for u in head.up_basis] == [(5, 80), (5, 32)]
    assert len(head.down_bias) == len(targets)
    down_codes, up_codes = torch.randn(2, 3, len(targets), 5)
    weights = head(down_codes, up_codes)
    groups = zip((0, 0, 1, 2, 0), (0, 1, 1, 0, 0), strict=True)
    for i, (down_group, up_group) in enumerate(groups):
        for sample in range(3):
            down, up = head.down_bias[i].clone(), torch.zeros(targets[i].out_features, 2)
            for k in range(5):
                down += down_codes[sample, i, k] * head.down_basis[down_group][k].view(2, -1)
                up += up_codes[sample, i, k] * head.up_basis[up_group][k].view(-1, 2)
            torch.testing.assert_close(weights.down[i][sample], down)
            torch.testing.assert_close(weights.up[i][sample], up)


def test_shared_basis_of_different_shapes_equals_the_unshared_one() -> None:
    torch.manual_seed(0)
    head = LowRankBasisHead(LAYOUT, 5)
    shared_head = LowRankBasisHead(LAYOUT, 5, share_by_shape=True)
    shared_head.load_state_dict(head.state_dict())
    down, up = torch.randn(2, 4, 3, 5)
    assert torch.equal(shared_head(down, up).flatten(), head(down, up).flatten())


def test_iterations_change_codes_of_the_same_shape() -> None:
    once = make_network("lidb", {"a": 10, "b": 7}, 1)
    four_times = make_network("lidb", {"a": 10, "b": 7}, 4)
    for network in (once, four_times):
        torch.nn.init.normal_(network.code_proj, std=0.3)
    features = make_features()
    codes, refined_codes = once.predict_codes(features), four_times.predict_codes(features)
    assert codes.shape == refined_codes.shape == (3, 6, 20)
    assert not torch.allclose(codes, refined_codes)


def test_lidb_multiplies_orthonormal_auxiliary_matrices() -> None:
    lidb = LiDB(LAYOUT, a=10, b=7, seed=3)
    assert not list(lidb.parameters()) and not lidb.state_dict(), "rebuilt from the seed"
    assert torch.equal(lidb.a0, LiDB(LAYOUT, a=10, b=7, seed=3).a0)
    assert not torch.equal(lidb.a0, LiDB(LAYOUT, a=10, b=7, seed=4).a0)
    assert torch.allclose(lidb.a0.mT @ lidb.a0, torch.eye(10), atol=1e-5)
    assert torch.allclose(lidb.b0 @ lidb.b0.mT, torch.eye(7), atol=1e-5)
    down, up = torch.randn(3, 20), torch.randn(3, 20)
    weights = lidb(down, up)
    a_train, b_train = up[0].view(10, 2), down[0, :14].view(2, 7)
    delta = weights.get_delta_weights()[0]
    assert torch.allclose(delta, lidb.a0 @ a_train @ b_train @ lidb.b0, atol=1e-5)
    assert isinstance(weights, LoraWeights)


def test_lidb_has_about_30_thousand_numbers_for_stable_diffusion() -> None:
    targets = tuple(TargetModule(f"unet.{i}", 768, 320) for i in range(128 + 48))
    lidb = LiDB(LoraLayout(targets, 1, "sd"), a=100, b=50)
    assert 25_000 < len(targets) * (100 + 50) < 35_000
    assert lidb.init_codes().shape == (2 * len(targets), 100)


def test_default_config() -> None:
    network = Hypernetwork(LAYOUT, 12)
    assert network.config == {
        "feature_width": 12,
        "width": 192,
        "depth": 2,
        "num_heads": 4,
        "iterations": 1,
        "head": "basis",
        "head_options": {},
    }
    assert len(network.decoder.layers) == 2 and network.iterations == 1
    assert network.decoder.layers[0].self_attn.num_heads == 4
    assert network.head.size == 48 and network.layout is LAYOUT
    assert float(network.queries.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert network.code_proj.shape == (6, 48, 192) and not network.code_proj.any()
    assert "code_embed" not in network.state_dict()
    options = {"a": 10, "b": 7, "seed": 3}
    other = Hypernetwork(LAYOUT, 12, 16, 1, 2, 3, "lidb", options)
    assert (other.head.a, other.head.b, other.head.seed) == (10, 7, 3)
    assert other.config["head_options"] == options and other.config["iterations"] == 3
    assert torch.equal(other.init_codes, other.head.init_codes())


def run_decoder(network: Hypernetwork, queries: Tensor, memory: Tensor) -> Tensor:
    """A pre-LN transformer decoder with GELU (2002.04745)."""
    h = queries
    for layer in network.decoder.layers:
        x = layer.norm1(h)
        h = h + layer.self_attn(x, x, x)[0]
        h = h + layer.multihead_attn(layer.norm2(h), memory, memory)[0]
        h = h + layer.linear2(torch.nn.functional.gelu(layer.linear1(layer.norm3(h))))
    return network.decoder.norm(h)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_codes_equal_their_formula(iterations: int) -> None:
    """θ_k = θ_(k-1) + P T(features, q + E θ_(k-1)), also while the network trains."""
    torch.manual_seed(1)
    network = Hypernetwork(LAYOUT, 12, 16, 2, 2, iterations, "basis", {"size": 5}).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = make_features()
    norm, linear = network.memory_proj
    memory = linear(norm(features.tokens.flatten(1, 2)))
    codes = torch.stack([network.init_codes] * 3)
    for _ in range(iterations):
        queries = torch.stack([network.queries] * 3)
        if iterations > 1:
            embeddings = [network.code_embed[m] @ codes[:, m].T for m in range(6)]
            queries = queries + torch.stack(embeddings).permute(2, 0, 1)
        h = run_decoder(network, queries, memory)
        codes = codes + torch.stack([h[:, m] @ network.code_proj[m].T for m in range(6)], 1)
    torch.testing.assert_close(network.predict_codes(features), codes, atol=1e-4, rtol=1e-3)
    weights = network(features)
    expected = network.head(codes[:, :3], codes[:, 3:])
    torch.testing.assert_close(weights.flatten(), expected.flatten(), atol=1e-3, rtol=1e-3)
    assert network.decoder.layers[1].linear1.out_features == 64


def test_memory_is_normalized_before_its_projection() -> None:
    network = make_network("basis", {"size": 5}, 1)
    torch.nn.init.normal_(network.code_proj)
    features = make_features()
    expected = network.predict_codes(features)
    scaled = network.predict_codes(ImageFeatures(20 * features.tokens + 3))
    torch.testing.assert_close(scaled, expected, atol=1e-3, rtol=1e-3)


def test_embedded_codes_of_variance_1_have_a_standard_deviation_of_a_tenth() -> None:
    torch.manual_seed(0)
    network = Hypernetwork(LAYOUT, 12, 64, 1, 2, 2, "basis", {"size": 100})
    embedded = torch.einsum("mdk,bmk->bmd", network.code_embed.detach(), torch.randn(9, 6, 100))
    assert float(embedded.std()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(("num_tokens", "is_fused"), [(1024, False), (1025, True)])
def test_attention_to_more_than_1024_tokens_is_fused(num_tokens: int, is_fused: bool) -> None:
    network = make_network("basis", {"size": 5}, 1)
    states: list[bool] = []
    network.decoder.register_forward_hook(
        lambda *_: states.append(torch.backends.cuda.flash_sdp_enabled())
    )
    network.predict_codes(make_features(batch=1, views=1, tokens=num_tokens))
    assert states == [is_fused]
