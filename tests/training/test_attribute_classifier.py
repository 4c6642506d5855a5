"""Readers of latents, and what they tell a denoiser in training."""

import pytest
import torch

from hyperlora.encoders.attribute_classifier import AttributeClassifier, load_image_encoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.auxiliary_losses import (
    IGNORE_INDEX,
    AttributeLoss,
    compute_attribute_loss,
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    reader = AttributeClassifier(
        "latents",
        8,
        {"hair": ["long", "short"], "hat": ["none", "hat"]},
        options={"channels": 4, "inner": 8},
    )
    reader.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_reader_of_latents_comes_back_and_is_no_photo_encoder(folder):
    reading = AttributeClassifier.from_pretrained(folder)(torch.randn(3, 4, 8, 8))
    assert {k: v.shape for k, v in reading.logits.items()} == {"hair": (3, 2), "hat": (3, 2)}
    with pytest.raises(InvalidArgumentError, match="reads latents"):
        load_image_encoder(folder)


def test_what_cannot_be_seen_counts_nothing(folder):
    reading = AttributeClassifier.from_pretrained(folder)(torch.randn(2, 4, 8, 8))
    labels = {"hair": torch.tensor([0, IGNORE_INDEX]), "hat": torch.tensor([1, IGNORE_INDEX])}
    first, second = compute_attribute_loss(reading, labels)
    expected = sum(-reading.logits[k][0].log_softmax(-1)[v[0]] for k, v in labels.items())
    torch.testing.assert_close(first, expected)
    assert float(second) == 0


def test_descending_the_loss_makes_latents_that_are_read_as_labelled(folder):
    labels = {"hair": torch.tensor([0, 1]), "hat": torch.tensor([1, 0])}
    loss = AttributeLoss(folder, 0.5).make_aux_loss(labels).fn
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([latents], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(latents).sum().backward()
        optimizer.step()
    reading = AttributeClassifier.from_pretrained(folder)(latents)
    assert all(torch.equal(reading.logits[k].argmax(-1), v) for k, v in labels.items())


def test_a_reader_needs_labels(folder):
    assert AttributeLoss(None, 1.0).make_aux_loss(None) is None
    with pytest.raises(InvalidArgumentError, match="no labels"):
        AttributeLoss(folder, 1.0).make_aux_loss(None)
