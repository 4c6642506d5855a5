"""LoRAs compared as numbers: whether samples are copies of training LoRAs, and how much they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import Reader, Reading


def nearest(rows: Tensor, training: Tensor) -> Tensor:
    """The cosine of each of ``rows`` [n, P] to the nearest of ``training`` [m, P], both less their mean, [n]: 1 is a
    copy. A model that has memorised makes LoRAs nearer to its training set than held-out LoRAs are (2506.07998)."""
    return (F.normalize(rows, dim=-1) @ F.normalize(training, dim=-1).mT).amax(-1)


def spread(samples: Tensor) -> float:
    """1 - the mean cosine of different ones of ``samples`` [n, s, P] of the same subject, less their mean."""
    unit = F.normalize(samples, dim=-1)
    s = samples.shape[1]
    cosines = (unit @ unit.mT)[:, ~torch.eye(s, dtype=torch.bool)]
    return 1 - float(cosines.mean()) if s > 1 else 0.0


@dataclass(frozen=True)
class Score:
    """A mean over subjects and its standard error; ``each`` subject's own."""

    mean: float
    error: float
    each: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, per_subject: Tensor) -> "Score":
        n = len(per_subject)
        error = float(per_subject.std() / n**0.5) if n > 1 else 0.0
        return cls(float(per_subject.mean()), error, tuple(per_subject.tolist()))

    def above(self, other: "Score") -> "Score":
        """The difference, subject by subject: its error is far below either score's, since most of that is people."""
        return Score.of(torch.tensor(self.each) - torch.tensor(other.each))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class IdentityScale:
    """What 0 and 1 mean: cosines of real portraits of different people and of the same person."""

    real: Tensor  # [subjects, views, width]
    different: float
    same: float

    @classmethod
    def of(cls, identity: Tensor) -> "IdentityScale":
        """``identity`` [subjects, views >= 2, width] of unit length, of real photos.

        With one view per subject ``same`` cannot be measured and is 1 (said in the report).
        """
        subjects, views, _ = identity.shape
        flat = identity.flatten(0, 1)
        cosine = (flat @ flat.mT).unflatten(0, (subjects, views)).unflatten(-1, (subjects, views))
        own = torch.eye(subjects, dtype=torch.bool)
        pairs = cosine.movedim(2, 1)  # [subjects, subjects, views, views]
        same = pairs[own][:, ~torch.eye(views, dtype=torch.bool)]
        different = float(pairs[~own].mean()) if subjects > 1 else 0.0
        return cls(identity, different, float(same.mean()) if views > 1 else 1.0)

    def score(self, generated: Tensor) -> Tensor:
        """I = (cos(generated, real of the same person) - different) / (same - different), per subject.

        ``generated`` [subjects, images, width]; 0 is anyone, 1 as good as another real portrait.
        """
        cosine = torch.einsum("siw,svw->siv", generated, self.real).mean((1, 2))
        return (cosine - self.different) / (self.same - self.different)


def prompt_score(reader: Reader, reading: Reading, truths: Sequence[Mapping[str, str]]) -> Tensor:
    """P per image [n]: the fraction of the prompted attributes that ``reader`` reads back."""
    rights = []
    for i, truth in enumerate(truths):
        right = [int(reading.logits[k][i].argmax()) == reader.attributes[k].index(v) for k, v in truth.items()]
        rights.append(sum(right) / len(right))
    return torch.tensor(rights)


def attribute_scores(reader: Reader, reading: Reading, truths: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """For each prompted attribute, the fraction of the images prompted with it where ``reader`` reads it back."""
    found: dict[str, list[bool]] = {}
    for i, truth in enumerate(truths):
        for name, value in truth.items():
            right = int(reading.logits[name][i].argmax()) == reader.attributes[name].index(value)
            found.setdefault(name, []).append(right)
    return {name: sum(rights) / len(rights) for name, rights in found.items()}
