"""What to say about photos, or a before/after pair, before a LoRA is made of them: they look like nothing the model was
trained on; nothing changed; the two are not related."""

from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.images import to_tensor
from hyperlora.encoders.ood_detector import OodDetector
from hyperlora.features import ImageFeatures

CHANGE_THRESHOLD: Final = 0.05
"""No block of 1/16 of a side changes by more than this, of 1: what saving as JPEG again does stays below, the least
visible of 320 drawn edits is at twice that."""
SIMILARITY_THRESHOLD: Final = 0.5
"""Pictures of one pair are more alike than this: 99 % of 320 drawn pairs of all kinds are, of pictures of two
different avatars 28 % (``benchmarks/check_pair.py``)."""


def check_pair(before: Image.Image, after: Image.Image) -> list[str]:
    """One sentence for each reason why the LoRA of this pair may be of no use."""
    before_pixels, after_pixels = to_tensor(before, 128), to_tensor(after, 128)
    if is_near_duplicate(before_pixels, after_pixels):
        return ["no change found between the two pictures: the LoRA will do next to nothing"]
    if compute_structural_similarity(before_pixels, after_pixels) < SIMILARITY_THRESHOLD:
        return ["the two pictures look unrelated: give the same picture before and after an edit"]
    return []


def check_photos(
    ood_detector: OodDetector | None, features: ImageFeatures
) -> list[tuple[str, ...]]:
    """For each subject, one sentence if some of its photos look like nothing that the model was trained on."""
    if ood_detector is None:
        return [()] * len(features.tokens)
    return [
        _format_ood_warning(ood_detector.domain_name, int((~in_domain).sum()), len(in_domain))
        for in_domain in ood_detector.is_in_domain(features)
    ]


def _format_ood_warning(subjects: str, num_unknown: int, num_photos: int) -> tuple[str, ...]:
    if not num_unknown:
        return ()
    clause = (
        f"{num_unknown} of {num_photos} photos do"
        if num_unknown < num_photos
        else "this photo does"
        if num_photos == 1
        else "these photos do"
    )
    return (
        f"{clause} not look like the {subjects} this model knows: the LoRA is the nearest it can make",
    )


def is_near_duplicate(before: Tensor, after: Tensor) -> bool:
    """Both [3, size, size] in [0, 1]."""
    return bool(F.adaptive_avg_pool2d((before - after).abs(), 16).max() < CHANGE_THRESHOLD)


def compute_structural_similarity(before: Tensor, after: Tensor) -> float:
    """The correlation of their outlines or, if that is higher, of their light (also inverted), at 32×32."""
    thumbnails = F.interpolate(torch.stack([before, after]), (32, 32), mode="area")
    luminance = thumbnails.mean(1).flatten(1)
    grad_x = (thumbnails[..., 1:, :-1] - thumbnails[..., :-1, :-1]).abs().amax(1)
    grad_y = (thumbnails[..., :-1, 1:] - thumbnails[..., :-1, :-1]).abs().amax(1)
    edges = (grad_x.square() + grad_y.square()).sqrt().flatten(1)
    return max(_compute_correlation(edges), abs(_compute_correlation(luminance)))


def _compute_correlation(maps: Tensor) -> float:
    centered = maps - maps.mean(1, keepdim=True)
    return float(F.cosine_similarity(centered[0], centered[1], dim=0))
