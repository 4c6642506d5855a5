"""The network from pairs to LoRAs: zero at start, antisymmetric where asked, and pairs do not mix."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
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
    "choices": {"hair": ["a bob", "a bun"], "eyes": ["closed"]},
    "mixtures": {"sky": ["black", "red", "blue"]},
}
WORDS = {"tokens": 4, "width": 6, "hidden": 24, "vocabulary": VOCABULARY}
SHAPES = [
    {"join": "concat"},
    {"join": "difference"},
    {"join": "both", "antisymmetric": True},
    {"head": "softmax", "head_options": {"size": 5}},
    {"head": "full", "head_options": {}},
    {"words": WORDS},
    {"join": "difference", "antisymmetric": True, "words": WORDS | {"rest": 1}},
    {"words": WORDS | {"vocabulary": VOCABULARY | {"back": "not {}"}}},
]


def network(**options):
    torch.manual_seed(0)
    made = PairHypernetwork(
        LAYOUT, 12, **{"width": 16, "heads": 2, "head_options": {"size": 5}} | options
    )
    if made.text_substitution is not None:
        basis = made.instruction_head.set_text_embeddings(
            torch.randn(len(made.instruction_head.text_a), 4, 6)
        )
        made.text_substitution.set_base(torch.randn(4, 6), [torch.randn(10, 6)], basis)
    return made.eval()


def stirred(**options):
    """As after some training: no part is zero."""
    model = network(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def pair(batch=3, pairs=1, tokens=5):
    return ImageFeatures(torch.randn(batch, pairs, tokens, 12)), ImageFeatures(
        torch.randn(batch, pairs, tokens, 12)
    )


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_zero_at_start_and_gradients_flow(options):
    model = network(**options)
    weights = model(*pair())
    assert weights.batch == (3,) and weights.layout == LAYOUT
    assert weights.norms().max() == 0
    sum((d - 1).square().sum() for d in weights.delta()).backward()
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_pairs_of_a_batch_do_not_mix_and_order_matters(options):
    model = stirred(**options)
    before, after = pair()
    together = model(before, after).flatten()
    alone = model(ImageFeatures(before.tokens[1:2]), ImageFeatures(after.tokens[1:2])).flatten()
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(after, before).flatten(), together, atol=1e-3)


def test_antisymmetric_by_construction():
    model = stirred(join="both", antisymmetric=True)
    before, after = pair()
    forward, backward = model(before, after), model(after, before)
    for one, other in zip(forward.delta(), backward.delta(), strict=True):
        torch.testing.assert_close(one, -other, atol=1e-5, rtol=1e-4)
    assert forward.norms().min() > 0
    assert model(before, before).norms().max() < 1e-6


def test_words_for_a_change_are_not_the_opposite_of_those_for_the_way_back():
    model = stirred(antisymmetric=True, words=WORDS)
    before, after = pair()
    forward, backward = model(before, after), model(after, before)
    (place,) = model.text_substitution.target_indices
    for i, (one, other) in enumerate(zip(forward.delta(), backward.delta(), strict=True)):
        assert torch.allclose(one, -other, atol=1e-5, rtol=1e-4) == (i != place)
    assert model(before, before).norms().max() < 1e-6


def test_with_words_for_the_way_back_the_negative_says_what_was_before():
    model = stirred(words=WORDS | {"vocabulary": VOCABULARY | {"back": "not {}"}, "text_rank": 4})
    texts = torch.randn(12, 4, 6)
    basis = model.instruction_head.set_text_embeddings(texts)
    model.instruction_head.rank = 4  # nothing is lost
    before, after = pair()
    a, b = model.predict_prompt_factors(before, after)
    (do, undo), (forward, backward) = (
        texts.split(6),
        (
            model.instruction_head.vocabulary.compute_prompt_weights(
                model.instruction_head.forward_logits(model.fuse_pair(one, other))
            )
            - model.instruction_head.vocabulary.compute_prompt_weights(
                model.instruction_head.forward_logits(model.fuse_pair(one, one))
            )
            for one, other in ((before, after), (after, before))
        ),
    )
    assert forward.abs().max() > 0 and backward.abs().max() > 0
    wanted = torch.einsum("np,ptw->ntw", forward, do) - torch.einsum("np,ptw->ntw", backward, undo)
    torch.testing.assert_close(a @ b @ basis, wanted, atol=1e-4, rtol=1e-4)


def test_texts_are_kept_in_a_common_basis():
    """Of six directions three, in which there is most to say."""
    model = network(words=WORDS | {"text_rank": 3, "text_basis": 3})
    said, whispered = torch.randn(6, 4, 3) @ torch.randn(3, 6), 1e-3 * torch.randn(6, 4, 6)
    basis = model.instruction_head.set_text_embeddings(said + whispered)
    kept = model.instruction_head.text_a @ model.instruction_head.text_b @ basis
    torch.testing.assert_close(kept, said, atol=0.02, rtol=0)


def test_words_come_from_pairs_of_any_number_of_tokens():
    model = stirred(words=WORDS | {"places": 3})
    for tokens in (3, 7):
        a, b = model.predict_prompt_factors(*pair(tokens=tokens))
        assert a.shape == (3, 4, 2) and b.shape == (3, 2, 6)
    with pytest.raises(InvalidArgumentError, match="build it with words"):
        network().predict_prompt_factors(*pair())


@pytest.mark.parametrize("words", [None, WORDS], ids=str)
def test_further_pairs_are_a_set(words):
    model = stirred(words=words)
    before, after = pair(pairs=3)
    turned = [ImageFeatures(x.tokens.flip(1)) for x in (before, after)]
    torch.testing.assert_close(
        model(*turned).flatten(), model(before, after).flatten(), atol=1e-5, rtol=1e-4
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidArgumentError, match="known: concat, difference, both"):
        network(join="sideways")
    with pytest.raises(InvalidArgumentError, match="softmax"):
        network(antisymmetric=True, head="softmax")
    with pytest.raises(InvalidArgumentError, match="known: lidb, basis, softmax, full"):
        network(head="nonsense")


def test_shares_of_a_softmax_basis_are_a_mix():
    model = stirred(head="softmax")
    codes = model.predict_codes(*pair())
    down, _ = codes.chunk(2, -2)
    first = model.hypernetwork.decode_codes(codes).down[0]
    shares = down[..., 0, :].softmax(-1)
    basis = model.hypernetwork.head
    expected = (shares @ basis.down_basis[0]).unflatten(-1, (2, 24)) + basis.down_bias[0]
    torch.testing.assert_close(first, expected)
