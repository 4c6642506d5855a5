"""The network from pairs to LoRAs: zero at start, antisymmetric if wanted, and pairs do not mix."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.instruction_head import InstructionHeadConfig
from hyperlora.models.pair_hypernetwork import PairHypernetwork

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 24, 40),
        TargetModule("unet.block.attn2.to_k", 6, 10),
        TargetModule("unet.b", 6, 8),
    ),
    rank=2,
    base="tiny",
)
VOCABULARY = {
    "categories": {"hair": ["a bob", "a bun"], "eyes": ["closed"]},
    "color_axes": {"sky": ["black", "red", "blue"]},
}
UNDO_VOCABULARY = VOCABULARY | {"undo_template": "not {}"}
INSTRUCTION_HEAD = {
    "num_text_tokens": 4,
    "cross_attention_dim": 6,
    "hidden_size": 24,
    "vocabulary": VOCABULARY,
}
OPTIONS = [
    {"fusion": "concat"},
    {"fusion": "difference"},
    {"fusion": "both", "antisymmetric": True},
    {"head": "softmax", "head_options": {"size": 5}},
    {"head": "direct", "head_options": {}},
    {"instruction_head": INSTRUCTION_HEAD},
    {
        "fusion": "difference",
        "antisymmetric": True,
        "instruction_head": INSTRUCTION_HEAD | {"other_rank": 1},
    },
    {"instruction_head": INSTRUCTION_HEAD | {"vocabulary": UNDO_VOCABULARY}},
]


def make_network(**options) -> PairHypernetwork:
    torch.manual_seed(0)
    network = PairHypernetwork(
        LAYOUT, 12, **{"width": 16, "num_heads": 2, "head_options": {"size": 5}} | options
    )
    if network.text_substitution is not None:
        basis = network.instruction_head.set_text_embeddings(
            torch.randn(len(network.instruction_head.text_a), 4, 6)
        )
        network.text_substitution.set_base(torch.randn(4, 6), [torch.randn(10, 6)], basis)
    return network.eval()


def make_random_network(**options) -> PairHypernetwork:
    """As after some training: no parameter is zero."""
    network = make_network(**options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def make_pair(batch=3, pairs=1, tokens=5) -> tuple[ImageFeatures, ImageFeatures]:
    before = ImageFeatures(torch.randn(batch, pairs, tokens, 12))
    return before, ImageFeatures(torch.randn(batch, pairs, tokens, 12))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pair_hypernetwork_starts_at_zero_with_gradients(options) -> None:
    network = make_network(**options)
    weights = network(*make_pair())
    assert weights.batch_shape == (3,) and weights.layout == LAYOUT
    assert weights.compute_delta_norms().max() == 0
    sum((d - 1).square().sum() for d in weights.get_delta_weights()).backward()
    assert sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pair_hypernetwork_separates_the_batch_and_sees_the_order(options) -> None:
    network = make_random_network(**options)
    before, after = make_pair()
    batched = network(before, after).flatten()
    alone = network(ImageFeatures(before.tokens[1:2]), ImageFeatures(after.tokens[1:2])).flatten()
    torch.testing.assert_close(batched[1:2], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(network(after, before).flatten(), batched, atol=1e-3)


def test_antisymmetric_negates_deltas_of_swapped_pairs() -> None:
    network = make_random_network(fusion="both", antisymmetric=True)
    before, after = make_pair()
    forward, backward = network(before, after), network(after, before)
    deltas = zip(forward.get_delta_weights(), backward.get_delta_weights(), strict=True)
    for forward_delta, backward_delta in deltas:
        torch.testing.assert_close(forward_delta, -backward_delta, atol=1e-5, rtol=1e-4)
    assert forward.compute_delta_norms().min() > 0
    assert network(before, before).compute_delta_norms().max() < 1e-6


def test_antisymmetric_codes_are_halves_of_both_orders() -> None:
    network = make_random_network(antisymmetric=True)
    before, after = make_pair()
    codes = network.predict_codes(before, after)
    predict_codes = network.hypernetwork.predict_codes
    forward_down, forward_up = predict_codes(network.fuse_pair(before, after)).chunk(2, -2)
    backward_down, backward_up = predict_codes(network.fuse_pair(after, before)).chunk(2, -2)
    down, up = codes.chunk(2, -2)
    torch.testing.assert_close(down, (forward_down + backward_down) / 2)
    torch.testing.assert_close(up, (forward_up - backward_up) / 2)


def test_antisymmetric_excludes_text_projections() -> None:
    network = make_random_network(antisymmetric=True, instruction_head=INSTRUCTION_HEAD)
    before, after = make_pair()
    forward, backward = network(before, after), network(after, before)
    (text_index,) = network.text_substitution.target_indices
    deltas = zip(forward.get_delta_weights(), backward.get_delta_weights(), strict=True)
    for i, (forward_delta, backward_delta) in enumerate(deltas):
        is_negated = torch.allclose(forward_delta, -backward_delta, atol=1e-5, rtol=1e-4)
        assert is_negated == (i != text_index)
    assert network(before, before).compute_delta_norms().max() < 1e-6


def test_undo_template_subtracts_the_instruction_of_the_swapped_pair() -> None:
    network = make_random_network(
        instruction_head=INSTRUCTION_HEAD | {"vocabulary": UNDO_VOCABULARY, "text_rank": 4}
    )
    head = network.instruction_head
    texts = torch.randn(12, 4, 6)
    basis = head.set_text_embeddings(texts)
    head.rank = 4  # full rank: the factors are exact
    before, after = make_pair()
    a, b = network.predict_prompt_factors(before, after)

    def predict_weights(first: ImageFeatures, second: ImageFeatures) -> torch.Tensor:
        pair_logits = head.forward_logits(network.fuse_pair(first, second))
        unchanged_logits = head.forward_logits(network.fuse_pair(first, first))
        pair_weights = head.vocabulary.compute_prompt_weights(pair_logits)
        return pair_weights - head.vocabulary.compute_prompt_weights(unchanged_logits)

    forward, backward = predict_weights(before, after), predict_weights(after, before)
    assert forward.abs().max() > 0 and backward.abs().max() > 0
    prompts, undo_prompts = texts.split(6)
    expected = torch.einsum("np,ptw->ntw", forward, prompts)
    expected = expected - torch.einsum("np,ptw->ntw", backward, undo_prompts)
    torch.testing.assert_close(a @ b @ basis, expected, atol=1e-4, rtol=1e-4)


def test_set_text_embeddings_keeps_the_main_directions() -> None:
    """Of six directions, the three with most variance."""
    network = make_network(
        instruction_head=INSTRUCTION_HEAD | {"text_rank": 3, "text_basis_size": 3}
    )
    head = network.instruction_head
    low_rank_texts = torch.randn(6, 4, 3) @ torch.randn(3, 6)
    basis = head.set_text_embeddings(low_rank_texts + 1e-3 * torch.randn(6, 4, 6))
    stored_texts = head.text_a @ head.text_b @ basis
    torch.testing.assert_close(stored_texts, low_rank_texts, atol=0.02, rtol=0)


def test_predict_prompt_factors_pools_any_number_of_tokens() -> None:
    network = make_random_network(instruction_head=INSTRUCTION_HEAD | {"num_patches": 3})
    for tokens in (3, 7):
        a, b = network.predict_prompt_factors(*make_pair(tokens=tokens))
        assert a.shape == (3, 4, 2) and b.shape == (3, 2, 6)
    with pytest.raises(InvalidArgumentError, match="build it with instruction_head"):
        make_network().predict_prompt_factors(*make_pair())


@pytest.mark.parametrize("instruction_head", [None, INSTRUCTION_HEAD], ids=str)
def test_pair_hypernetwork_ignores_the_order_of_pairs(instruction_head) -> None:
    network = make_random_network(instruction_head=instruction_head)
    before, after = make_pair(pairs=3)
    flipped = [ImageFeatures(features.tokens.flip(1)) for features in (before, after)]
    torch.testing.assert_close(
        network(*flipped).flatten(), network(before, after).flatten(), atol=1e-5, rtol=1e-4
    )


def test_config_rebuilds_the_network() -> None:
    network = make_random_network(
        fusion="both", instruction_head=INSTRUCTION_HEAD | {"other_rank": 1, "noise_std": 0.3}
    )
    rebuilt = PairHypernetwork(LAYOUT, **network.config).eval()
    rebuilt.load_state_dict(network.state_dict())
    pair = make_pair()
    assert torch.equal(rebuilt(*pair).flatten(), network(*pair).flatten())
    config = InstructionHeadConfig.from_config(network.config["instruction_head"])
    assert config == network.instruction_head.config


def test_pair_hypernetwork_rejects_unknown_options() -> None:
    with pytest.raises(InvalidArgumentError, match="known: concat, difference, both"):
        make_network(fusion="sideways")
    with pytest.raises(InvalidArgumentError, match="softmax"):
        make_network(antisymmetric=True, head="softmax")
    with pytest.raises(InvalidArgumentError, match="known: lidb, basis, softmax, direct"):
        make_network(head="nonsense")


def test_softmax_head_mixes_its_basis() -> None:
    network = make_random_network(head="softmax")
    codes = network.predict_codes(*make_pair())
    down_codes, _ = codes.chunk(2, -2)
    down = network.hypernetwork.decode_codes(codes).down[0]
    mixing_weights = down_codes[..., 0, :].softmax(-1)
    head = network.hypernetwork.head
    mixed_basis = (mixing_weights @ head.down_basis[0]).unflatten(-1, (2, 24))
    torch.testing.assert_close(down, mixed_basis + head.down_bias[0])


@pytest.mark.parametrize(
    ("fusion", "indices"), [("concat", (0, 1)), ("difference", (2,)), ("both", (0, 1, 2))]
)
def test_fuse_pair_joins_the_images_token_by_token(fusion: str, indices: tuple[int, ...]) -> None:
    """[A, A'], A' - A, or [A, A', A' - A], along the width."""
    network = make_network(fusion=fusion)
    before, after = make_pair(pairs=2)
    parts = (before.tokens, after.tokens, after.tokens - before.tokens)
    expected = torch.cat([parts[i] for i in indices], 3)
    assert torch.equal(network.fuse_pair(before, after).tokens, expected)
    assert network.hypernetwork.config["feature_width"] == 12 * len(indices)


def test_default_config() -> None:
    network = PairHypernetwork(LAYOUT, 12)
    expected = Hypernetwork(LAYOUT, 24).config
    assert network.config == {
        **expected,
        "feature_width": 12,
        "fusion": "concat",
        "antisymmetric": False,
        "instruction_head": None,
    }
    assert network.layout is LAYOUT and network.hypernetwork.layout is LAYOUT
    assert network.text_substitution is None and network.instruction_head is None
    config = make_network(fusion="both", antisymmetric=True, iterations=2).config
    assert (config["fusion"], config["antisymmetric"], config["iterations"]) == ("both", True, 2)


@pytest.mark.parametrize("other_rank", [None, 1])
def test_instruction_head_takes_the_text_projections(other_rank: int | None) -> None:
    """The hypernetwork keeps the other targets; the text projection gets the offset's LoRA."""
    network = make_random_network(
        instruction_head=INSTRUCTION_HEAD | {"other_rank": other_rank, "text_basis_size": 5}
    )
    assert [t.name for t in network.hypernetwork.layout.targets] == ["unet.a", "unet.b"]
    assert network.hypernetwork.layout.rank == (other_rank or 2)
    assert network.text_substitution.get_buffer("weight0").shape == (10, 5)
    before, after = make_pair()
    weights = network(before, after)
    others = network.hypernetwork(network.fuse_pair(before, after)).get_delta_weights()
    a, b = network.predict_prompt_factors(before, after)
    pinv, weight = network.text_substitution.empty_text_pinv, network.text_substitution.weight0
    expected = (others[0], weight @ b.mT @ a.mT @ pinv, others[1])
    for delta, expected_delta in zip(weights.get_delta_weights(), expected, strict=True):
        torch.testing.assert_close(delta, expected_delta, atol=1e-4, rtol=1e-4)
    assert network.instruction_head.rank == 2


def test_instructions_are_what_the_pair_shows_beyond_no_edit() -> None:
    """decode(w(A, A') - w(A, A)); empty where nothing changes."""
    network = make_random_network(instruction_head=INSTRUCTION_HEAD)
    head = network.instruction_head
    torch.nn.init.normal_(head.classifier.weight, std=3)
    before, after = make_pair(batch=6)

    def compute_weights(first: ImageFeatures, second: ImageFeatures) -> torch.Tensor:
        tokens = torch.cat([first.tokens, second.tokens], -1)
        logits = head.forward_logits(ImageFeatures(tokens))
        return head.vocabulary.compute_prompt_weights(logits)

    weights = compute_weights(before, after) - compute_weights(before, before)
    assert network.predict_instructions(before, after) == head.vocabulary.decode(weights)
    assert any(network.predict_instructions(before, after))
    assert network.predict_instructions(before, before) == [""] * 6


def test_pixels_need_both_images() -> None:
    with pytest.raises(InvalidArgumentError, match="fusion 'concat' expected, got 'difference'"):
        make_network(fusion="difference", instruction_head=INSTRUCTION_HEAD | {"patch_pixels": 2})
    head = INSTRUCTION_HEAD | {"patch_pixels": 1, "num_patches": 5}
    assert make_network(instruction_head=head).instruction_head.color_pointer is not None
    assert make_network(antisymmetric=False, head="softmax").antisymmetric is False
