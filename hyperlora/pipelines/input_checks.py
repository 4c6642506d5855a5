"""What to say about photos, or a before/after pair, before a LoRA is made of them: they look like nothing the model was
trained on; nothing changed; the two are not related."""

from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.images import to_tensor
from hyperlora.encoders.ood_detector import Domain
from hyperlora.features import ImageFeatures

UNCHANGED: Final = 0.05
"""No block of 1/16 of a side changes by more than this, of 1: what saving as JPEG again does stays below, the least
visible of 320 drawn edits is at twice that."""
UNRELATED: Final = 0.5
"""Pictures of one pair are more alike than this: 99 % of 320 drawn pairs of all kinds are, of pictures of two
different avatars 28 % (``benchmarks/doubts.py``)."""


def doubts(before: Image.Image, after: Image.Image) -> list[str]:
    """One sentence for each reason why the LoRA of this pair may be of no use."""
    a, b = to_tensor(before, 128), to_tensor(after, 128)
    if is_unchanged(a, b):
        return ["no change found between the two pictures: the LoRA will do next to nothing"]
    if likeness(a, b) < UNRELATED:
        return ["the two pictures look unrelated: give the same picture before and after an edit"]
    return []


def unknown(domain: Domain | None, features: ImageFeatures) -> list[tuple[str, ...]]:
    """For each subject, one sentence if some of its photos look like nothing that the model was trained on."""
    if domain is None:
        return [()] * len(features.tokens)
    return [_unknown(domain.subjects, int((~known).sum()), len(known)) for known in domain.known(features)]


def _unknown(subjects: str, odd: int, photos: int) -> tuple[str, ...]:
    if not odd:
        return ()
    which = f"{odd} of {photos} photos do" if odd < photos else "this photo does" if photos == 1 else "these photos do"
    return (f"{which} not look like the {subjects} this model knows: the LoRA is the nearest it can make",)


def is_unchanged(a: Tensor, b: Tensor) -> bool:
    """Both [3, size, size] in [0, 1]."""
    return bool(F.adaptive_avg_pool2d((a - b).abs(), 16).max() < UNCHANGED)


def likeness(a: Tensor, b: Tensor) -> float:
    """The correlation of their outlines or, if that is higher, of their light (also inverted), at 32×32."""
    small = F.interpolate(torch.stack([a, b]), (32, 32), mode="area")
    light = small.mean(1).flatten(1)
    across = (small[..., 1:, :-1] - small[..., :-1, :-1]).abs().amax(1)
    down = (small[..., :-1, 1:] - small[..., :-1, :-1]).abs().amax(1)
    outlines = (across.square() + down.square()).sqrt().flatten(1)
    return max(_correlation(outlines), abs(_correlation(light)))


def _correlation(two: Tensor) -> float:
    centred = two - two.mean(1, keepdim=True)
    return float(F.cosine_similarity(centred[0], centred[1], dim=0))
