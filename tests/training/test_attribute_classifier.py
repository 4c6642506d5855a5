"""Classifiers of latents, their auxiliary loss, and the vocabulary file of their training."""

from pathlib import Path

import pytest
import torch

from hyperlora.encoders.attribute_classifier import AttributeClassifier, load_image_encoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.auxiliary_losses import (
    IGNORE_INDEX,
    AttributeLoss,
    compute_attribute_loss,
)
from hyperlora.training.modules.attribute_classifier import load_attributes


@pytest.fixture
def classifier_dir(tmp_path: Path) -> str:
    torch.manual_seed(0)
    classifier = AttributeClassifier(
        "latents",
        8,
        {"hair": ["long", "short"], "hat": ["none", "hat"]},
        options={"channels": 4, "base_channels": 8},
    )
    classifier.save_pretrained(tmp_path)
    return str(tmp_path)


def test_latent_classifier_is_saved_and_is_no_image_encoder(classifier_dir: str) -> None:
    prediction = AttributeClassifier.from_pretrained(classifier_dir)(torch.randn(3, 4, 8, 8))
    assert {k: v.shape for k, v in prediction.logits.items()} == {"hair": (3, 2), "hat": (3, 2)}
    with pytest.raises(InvalidArgumentError, match="classifies latents"):
        load_image_encoder(classifier_dir)


def test_attribute_loss_ignores_hidden_attributes(classifier_dir: str) -> None:
    prediction = AttributeClassifier.from_pretrained(classifier_dir)(torch.randn(2, 4, 8, 8))
    labels = {"hair": torch.tensor([0, IGNORE_INDEX]), "hat": torch.tensor([1, IGNORE_INDEX])}
    first, second = compute_attribute_loss(prediction, labels)
    expected = sum(-prediction.logits[k][0].log_softmax(-1)[v[0]] for k, v in labels.items())
    torch.testing.assert_close(first, expected)
    assert float(second) == 0


def test_attribute_loss_descent_reaches_the_labels(classifier_dir: str) -> None:
    labels = {"hair": torch.tensor([0, 1]), "hat": torch.tensor([1, 0])}
    aux_loss = AttributeLoss(classifier_dir, 0.5).make_aux_loss(labels)
    assert aux_loss is not None
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([latents], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        aux_loss.fn(latents).sum().backward()
        optimizer.step()
    prediction = AttributeClassifier.from_pretrained(classifier_dir)(latents)
    assert all(torch.equal(prediction.logits[k].argmax(-1), v) for k, v in labels.items())


def test_attribute_loss_needs_labels(classifier_dir: str) -> None:
    assert AttributeLoss(None, 1.0).make_aux_loss(None) is None
    with pytest.raises(InvalidArgumentError, match="no labels"):
        AttributeLoss(classifier_dir, 1.0).make_aux_loss(None)


def test_load_attributes_reads_a_mapping_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.yaml"
    path.write_text("hair: [long, short]\n")
    assert load_attributes(str(path)) == {"hair": ["long", "short"]}
    path.write_text("[hair]")
    with pytest.raises(InvalidArgumentError, match="a mapping of attributes"):
        load_attributes(str(path))
    with pytest.raises(InvalidArgumentError, match="no YAML file"):
        load_attributes(str(tmp_path / "missing.yaml"))
