"""Scores with standard errors: identity, prompt accuracy, and measures of LoRAs as vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import AttributeClassifier, AttributePrediction
from hyperlora.encoders.identity_similarity import scale_identity_cosine


def compute_max_train_cosine(rows: Tensor, train_rows: Tensor) -> Tensor:
    """Compute the cosine of each LoRA to the nearest training LoRA.

    A model that memorizes generates LoRAs nearer to its training set than held-out LoRAs are
    (2506.07998).

    Args:
        rows: Normalized LoRAs [n, P].
        train_rows: Normalized training LoRAs [m, P].

    Returns:
        Cosines [n]; 1 for a copy.
    """
    cosines = F.normalize(rows, dim=-1) @ F.normalize(train_rows, dim=-1).mT  # [n, m]
    return cosines.amax(-1)


def compute_sample_diversity(samples: Tensor) -> float:
    """Compute 1 - the mean cosine between different samples of a subject.

    Args:
        samples: Normalized LoRAs [n, s, P], s samples of n subjects.

    Returns:
        0 for equal samples, and for s = 1.
    """
    unit_rows = F.normalize(samples, dim=-1)
    num_samples = samples.shape[1]
    is_same_sample = torch.eye(num_samples, dtype=torch.bool, device=samples.device)
    cosines = (unit_rows @ unit_rows.mT)[:, ~is_same_sample]  # [n, s * (s - 1)]
    return 1 - float(cosines.mean()) if num_samples > 1 else 0.0


@dataclass(frozen=True)
class Score:
    """A mean over subjects with its standard error.

    Attributes:
        mean: Mean over subjects.
        standard_error: Standard error of the mean.
        per_subject: Value of each subject.
    """

    mean: float
    standard_error: float
    per_subject: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_samples(cls, per_subject: Tensor) -> "Score":
        """Compute mean and standard error of one value per subject [n]."""
        n = len(per_subject)
        standard_error = float(per_subject.std() / n**0.5) if n > 1 else 0.0
        return cls(float(per_subject.mean()), standard_error, tuple(per_subject.tolist()))

    def compute_paired_difference(self, baseline: "Score") -> "Score":
        """Compute the mean difference to a baseline, subject by subject.

        Its standard error is far below that of either score, since most variance is between
        subjects.
        """
        return Score.from_samples(
            torch.tensor(self.per_subject) - torch.tensor(baseline.per_subject)
        )

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class IdentityScale:
    """Scale of the identity score: cosines of real portraits of different subjects and of the same
    subject.

    Attributes:
        real_embeddings: Embeddings of real photos [subjects, views, width], of unit length.
        different_cosine: Mean cosine of two subjects, which scores 0.
        same_cosine: Mean cosine of two photos of a subject, which scores 1.
    """

    real_embeddings: Tensor  # [subjects, views, width]
    different_cosine: float
    same_cosine: float

    @classmethod
    def from_embeddings(cls, embeddings: Tensor) -> "IdentityScale":
        """Measure the scale on real photos.

        Args:
            embeddings: Embeddings [subjects, views, width] of unit length. With one view per
                subject, ``same_cosine`` cannot be measured and is 1.

        Returns:
            The scale.
        """
        num_subjects, num_views, _ = embeddings.shape
        shape = (num_subjects, num_views)
        flat = embeddings.flatten(0, 1)  # [subjects * views, width]
        cosines = (flat @ flat.mT).unflatten(0, shape).unflatten(-1, shape)
        cosines = cosines.movedim(2, 1)  # [subjects, subjects, views, views]
        is_same_subject = torch.eye(num_subjects, dtype=torch.bool, device=embeddings.device)
        is_same_view = torch.eye(num_views, dtype=torch.bool, device=embeddings.device)
        same, different = cosines[is_same_subject][:, ~is_same_view], cosines[~is_same_subject]
        different_cosine = float(different.mean()) if num_subjects > 1 else 0.0
        same_cosine = float(same.mean()) if num_views > 1 else 1.0
        return cls(embeddings, different_cosine, same_cosine)

    def compute_score(self, generated_embeddings: Tensor) -> Tensor:
        """Compute the identity score of each subject.

        score = (cos(generated, real of the same subject) - different) / (same - different)

        Args:
            generated_embeddings: Embeddings of generated images [subjects, images, width].

        Returns:
            Scores [subjects]: 0 for another subject, 1 for another real photo of the subject.
        """
        cosines = torch.einsum("siw,svw->siv", generated_embeddings, self.real_embeddings)
        subject_cosines = cosines.mean((1, 2))  # [subjects]
        return scale_identity_cosine(subject_cosines, self.different_cosine, self.same_cosine)


def compute_prompt_accuracy(
    classifier: AttributeClassifier,
    prediction: AttributePrediction,
    truths: Sequence[Mapping[str, str]],
) -> Tensor:
    """Compute the fraction of the prompted attributes that the classifier recognizes in each image.

    Args:
        classifier: Classifier of attributes.
        prediction: Its prediction for n images.
        truths: Prompted classes of each image.

    Returns:
        Fractions [n].
    """
    accuracies = []
    for i, truth in enumerate(truths):
        correct = [_is_correct(classifier, prediction, i, *item) for item in truth.items()]
        accuracies.append(sum(correct) / len(correct))
    return torch.tensor(accuracies)


def compute_attribute_accuracy(
    classifier: AttributeClassifier,
    prediction: AttributePrediction,
    truths: Sequence[Mapping[str, str]],
) -> dict[str, float]:
    """Compute the accuracy of each prompted attribute over the images prompted with it.

    Args:
        classifier: Classifier of attributes.
        prediction: Its prediction for n images.
        truths: Prompted classes of each image.

    Returns:
        Accuracy by attribute.
    """
    correct_by_attribute: dict[str, list[bool]] = {}
    for i, truth in enumerate(truths):
        for attribute, value in truth.items():
            correct = correct_by_attribute.setdefault(attribute, [])
            correct.append(_is_correct(classifier, prediction, i, attribute, value))
    return {name: sum(correct) / len(correct) for name, correct in correct_by_attribute.items()}


def _is_correct(
    classifier: AttributeClassifier,
    prediction: AttributePrediction,
    image_index: int,
    attribute: str,
    value: str,
) -> bool:
    """Whether the most likely class of an attribute in an image is ``value``."""
    class_index = int(prediction.logits[attribute][image_index].argmax())
    return class_index == classifier.attributes[attribute].index(value)
