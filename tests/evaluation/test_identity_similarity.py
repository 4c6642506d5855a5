"""The identity score of ``IdentitySimilarity``, computed by hand from mean colors."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from hyperlora.encoders.attribute_classifier import LATENT_BACKBONE, AttributeClassifier
from hyperlora.encoders.identity_similarity import IdentitySimilarity, scale_identity_cosine
from hyperlora.errors import ModelLoadError
from tests.evaluation.color_classifier import make_color_classifier, paint


def save_classifier(folder: Path, identity_scale: tuple[float, float] | None) -> None:
    sizes = {"channels": 4, "base_channels": 1}
    AttributeClassifier(
        LATENT_BACKBONE, 4, {"hat": ["a"]}, options=sizes, identity_scale=identity_scale
    ).save_pretrained(folder)


def test_scale_identity_cosine_maps_means_to_0_and_1() -> None:
    cosines = torch.tensor([[0.2, 0.7], [0.45, -0.3]])
    scores = scale_identity_cosine(cosines, 0.2, 0.7)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0], [0.5, -1.0]]))


def test_identity_similarity_averages_cosines_to_the_photos() -> None:
    similarity = IdentitySimilarity(make_color_classifier(), 0.2, 0.6)
    photos = paint((1, 0, 0), (0, 0.5, 0), (0.6, 0, 0.8), size=4)
    images = paint((0.3, 0.4, 0), (0, 0, 0.9))
    scores = similarity(photos, images)
    cosines = [fmean([0.6, 0.8, 0.36]), fmean([0, 0, 0.8])]
    assert scores.tolist() == pytest.approx([(cosine - 0.2) / 0.4 for cosine in cosines])
    assert not scores.requires_grad


def test_identity_similarity_has_size_and_device_of_its_classifier() -> None:
    similarity = IdentitySimilarity(make_color_classifier(), 0.2, 0.6)
    assert similarity.image_size == 2
    assert similarity.to("meta") is similarity
    assert {p.device.type for p in similarity.classifier.parameters()} == {"meta"}


def test_identity_similarity_loads_classifier_with_scale(tmp_path: Path) -> None:
    save_classifier(tmp_path, (0.25, 0.875))
    similarity: Any = IdentitySimilarity.from_pretrained(tmp_path)
    assert (similarity.different_subject_mean, similarity.same_subject_mean) == (0.25, 0.875)
    assert similarity.classifier.attributes == {"hat": ("a",)}


def test_identity_similarity_refuses_classifier_without_scale(tmp_path: Path) -> None:
    save_classifier(tmp_path, None)
    with pytest.raises(ModelLoadError, match="has no identity scale"):
        IdentitySimilarity.from_pretrained(tmp_path)
