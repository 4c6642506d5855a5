"""Scores against their definitions, computed by hand or by loops over pairs."""

from itertools import permutations, product
from math import cos, radians
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import AttributePrediction
from hyperlora.evaluation.metrics import (
    IdentityScale,
    Score,
    compute_attribute_accuracy,
    compute_max_train_cosine,
    compute_prompt_accuracy,
    compute_sample_diversity,
)


def test_max_train_cosine_is_that_of_the_nearest() -> None:
    train_rows = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 1, -5]])
    rows = torch.tensor([[3.0, 4, 0], [-2, -4, 4]])
    cosines = compute_max_train_cosine(rows, train_rows)
    assert cosines.tolist() == pytest.approx([4 / 5, -2 / 6])
    assert compute_max_train_cosine(train_rows * 7, train_rows).tolist() == pytest.approx([1] * 3)


def test_sample_diversity_is_one_minus_mean_cosine_of_pairs() -> None:
    samples = torch.tensor([[[2.0, 0], [0, 3], [1, 1]], [[3, 4], [6, 8], [-3, -4]]])
    root = 0.5**0.5  # cosines of the pairs: 0, root, root and 1, -1, -1
    expected = 1 - fmean([0, root, root, 1, -1, -1])
    assert compute_sample_diversity(samples) == pytest.approx(expected)
    # two samples: cosines 0 and 1
    assert compute_sample_diversity(samples[:, :2]) == pytest.approx(1 - fmean([0, 1]))
    assert compute_sample_diversity(samples[:, 2:]) == 0


@pytest.mark.parametrize("values", [[1.0, 2, 6], [0.25, -0.75], [3.5]])
def test_score_has_mean_and_standard_error(values: list[float]) -> None:
    score = Score.from_samples(torch.tensor(values))
    standard_error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    assert score.mean == pytest.approx(fmean(values))
    assert score.standard_error == pytest.approx(standard_error)
    assert score.per_subject == tuple(values)


def test_score_prints_mean_and_standard_error() -> None:
    assert str(Score.from_samples(torch.tensor([1.0, 2, 6]))) == "3.000 ± 1.528"


def test_paired_difference_is_score_minus_baseline_of_each_subject() -> None:
    score = Score.from_samples(torch.tensor([1.0, 2, 6]))
    difference = score.compute_paired_difference(Score.from_samples(torch.tensor([0.5, 2, 4])))
    assert difference.per_subject == (0.5, 0, 2)
    assert difference.mean == pytest.approx(2.5 / 3)
    assert difference.standard_error == pytest.approx(stdev([0.5, 0, 2]) / 3**0.5)


def embed_angles(degrees: list[list[float]]) -> Tensor:
    """Make unit vectors in the plane, whose cosines are those of the differences of angles."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)


def average_cosines(pairs: list[tuple[float, float]]) -> float:
    return fmean(cos(radians(a - b)) for a, b in pairs)


@pytest.mark.parametrize(
    "degrees", [[[0, 30], [80, 90], [150, 210]], [[0, 10, 40], [70, 110, 120]]]
)
def test_identity_scale_averages_pairs_of_photos(degrees: list[list[float]]) -> None:
    scale = IdentityScale.from_embeddings(embed_angles(degrees))
    same = [pair for views in degrees for pair in permutations(views, 2)]
    different = [pair for views in permutations(degrees, 2) for pair in product(*views)]
    assert scale.same_cosine == pytest.approx(average_cosines(same))
    assert scale.different_cosine == pytest.approx(average_cosines(different))
    assert torch.equal(scale.real_embeddings, embed_angles(degrees))


def test_identity_scale_of_one_subject_or_one_view() -> None:
    one_subject = IdentityScale.from_embeddings(embed_angles([[10, 70]]))
    assert (one_subject.different_cosine, one_subject.same_cosine) == (0, pytest.approx(0.5))
    one_view = IdentityScale.from_embeddings(embed_angles([[0], [60]]))
    assert (one_view.different_cosine, one_view.same_cosine) == (pytest.approx(0.5), 1)


def test_identity_score_is_mean_cosine_on_the_scale() -> None:
    real, generated = [[0, 30], [80, 90], [150, 210]], [[5, 20, 50], [85, 180, 0], [-60, 160, 20]]
    scale = IdentityScale(embed_angles(real), different_cosine=0.25, same_cosine=0.75)
    scores = scale.compute_score(embed_angles(generated))
    expected = [
        (average_cosines(list(product(images, photos))) - 0.25) / 0.5
        for images, photos in zip(generated, real, strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


HATS, GLASSES = ["none", "cap", "beret"], ["thick", "none"]
TRUTHS = [{"hat": "beret", "glasses": "none"}, {"hat": "cap"}, {"glasses": "thick", "hat": "none"}]


@pytest.fixture(scope="module")
def classifier() -> Any:
    return SimpleNamespace(attributes={"hat": HATS, "glasses": GLASSES})


@pytest.fixture(scope="module")
def prediction() -> AttributePrediction:
    """Hats: beret, none, none. Glasses: none, thick, none."""
    logits = {
        "hat": torch.tensor([[-3.0, 0, 2], [-1, -2, -3], [5, 4, 1]]),
        "glasses": torch.tensor([[0.1, 0.2], [3, -3], [-4, -2]]),
    }
    return AttributePrediction(logits, torch.zeros(3, 0), torch.zeros(3, 1))


def test_prompt_accuracy_is_fraction_of_attributes_per_image(
    classifier: Any, prediction: AttributePrediction
) -> None:
    accuracy = compute_prompt_accuracy(classifier, prediction, TRUTHS)
    assert accuracy.tolist() == [1, 0, 0.5] and accuracy.dtype == torch.float32


def test_attribute_accuracy_is_fraction_of_images_per_attribute(
    classifier: Any, prediction: AttributePrediction
) -> None:
    accuracy = compute_attribute_accuracy(classifier, prediction, TRUTHS)
    assert accuracy == {"hat": pytest.approx(2 / 3), "glasses": 0.5}
