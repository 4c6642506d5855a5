"""Swapping the sides of pairs, sample by sample."""

from dataclasses import replace

import torch

from hyperlora.features import ImageFeatures
from hyperlora.training.batches import PairBatch
from hyperlora.training.modules.edit_targets import swap_features, swap_labels, swap_sides

MASK = torch.tensor([True, False, True])


def test_swap_sides_swaps_the_masked_samples_of_any_shape() -> None:
    for shape in ((3,), (3, 3), (3, 2, 4, 3)):
        before, after = torch.randn(2, *shape)
        first, second = swap_sides(before, after, MASK)
        for i, is_swapped in enumerate(MASK.tolist()):
            assert torch.equal(first[i], after[i] if is_swapped else before[i])
            assert torch.equal(second[i], before[i] if is_swapped else after[i])


def test_swap_features_swaps_tokens() -> None:
    before, after = torch.randn(2, 3, 3, 2, 5)
    first, second = swap_features(ImageFeatures(before), ImageFeatures(after), MASK)
    assert torch.equal(first.tokens[1], before[1]) and torch.equal(first.tokens[2], after[2])
    assert torch.equal(second.tokens[1], after[1]) and torch.equal(second.tokens[2], before[2])


def test_swap_labels_needs_both_sides() -> None:
    batch = PairBatch(
        ["", "", ""],
        labels_before={"hat": torch.tensor([1, 2, 3]), "hair": torch.tensor([7, 7, 7])},
        labels_after={"hat": torch.tensor([4, 5, 6]), "hair": torch.tensor([8, 8, 8])},
    )
    before, after = swap_labels(batch, MASK)
    assert before is not None and after is not None
    assert before["hat"].tolist() == [4, 2, 6] and after["hat"].tolist() == [1, 5, 3]
    assert before["hair"].tolist() == [8, 7, 8] and after["hair"].tolist() == [7, 8, 7]
    for side in ("labels_before", "labels_after"):
        assert swap_labels(replace(batch, **{side: None}), MASK) == (None, None)
