"""LoRAs compared as numbers: whether samples are copies of training LoRAs, and how much they differ."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
