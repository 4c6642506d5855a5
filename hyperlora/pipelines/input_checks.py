"""Warnings about photos and before/after pairs of which no useful LoRA can be expected."""

from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.images import to_tensor
from hyperlora.encoders.ood_detector import OodDetector
from hyperlora.features import ImageFeatures

CHANGE_THRESHOLD: Final = 0.13
"""Images are duplicates if no block of 1/16 of a side changes by more than this, of 2.

Saving once (JPEG of quality 75 to 100, WEBP, AVIF) and resizing by 0.5 to 2 change 0.12 at
most; the least visible of 105 bundled edits and 320 drawn ones changes 0.15
(``benchmarks/robustness/pair_input_checks.py``).
"""
SIMILARITY_THRESHOLD: Final = 0.5
"""Images of a pair have a higher structural similarity.

99 % of 320 pairs of all edits do, and 28 % of pairs of two different avatars
(``benchmarks/robustness/pair_input_checks.py``).
"""
_PAIR_CHECK_SIZE: Final = 128
"""Pixels per side at which a pair is compared."""


def check_pair(before: Image.Image, after: Image.Image) -> list[str]:
    """Check whether a pair shows an edit.

    Args:
        before: The image before the edit.
        after: The image after it.

    Returns:
        A sentence for each reason to doubt it; empty if there is none.
    """
    before_pixels, after_pixels = (to_tensor(i, _PAIR_CHECK_SIZE) for i in (before, after))
    if is_near_duplicate(before_pixels, after_pixels):
        return [
            "no change found between the two images, apart from noise of saving or resizing: "
            "the LoRA will do nothing useful, so check which files these are"
        ]
    if compute_structural_similarity(before_pixels, after_pixels) < SIMILARITY_THRESHOLD:
        return ["the two images look unrelated: give the same image before and after an edit"]
    return []


def check_photos(
    ood_detector: OodDetector | None, features: ImageFeatures
) -> list[tuple[str, ...]]:
    """Check whether photos look like those of the model's training.

    Args:
        ood_detector: The model's detector; None finds nothing.
        features: Image features of several subjects, [batch, views, tokens, width].

    Returns:
        For each subject a tuple of one sentence if some of its photos do not; else an empty tuple.
    """
    if ood_detector is None:
        return [()] * len(features.tokens)
    return [
        _format_ood_warning(ood_detector.domain_name, int((~in_domain).sum()), len(in_domain))
        for in_domain in ood_detector.is_in_domain(features)
    ]


def _format_ood_warning(domain_name: str, num_unknown: int, num_photos: int) -> tuple[str, ...]:
    if not num_unknown:
        return ()
    if num_photos == 1:
        clause = "this photo does"
    elif num_unknown == num_photos:
        clause = "these photos do"
    else:
        clause = f"{num_unknown} of {num_photos} photos do"
    return (
        f"{clause} not look like the {domain_name} this model knows: "
        "the LoRA is the nearest it can make",
    )


def is_near_duplicate(before: Tensor, after: Tensor) -> bool:
    """Check whether two images show no visible change.

    Args:
        before: [3, size, size] in [0, 1].
        after: Likewise.

    Returns:
        Whether ``compute_change`` is below the threshold.
    """
    return compute_change(before, after) < CHANGE_THRESHOLD


def compute_change(before: Tensor, after: Tensor) -> float:
    """Compute the largest visible change between two images.

    A pixel changes as far as it leaves the range of the 3×3 pixels around it in the other image.
    Compression and resizing move edges and blur them, which stays within that range.

    Args:
        before: [3, size, size] in [0, 1].
        after: Likewise.

    Returns:
        The largest mean over a block of a 16×16 grid, in both directions together: 0 to 2.
    """
    images = torch.stack([before, after])  # [2, 3, size, size]
    highest = F.max_pool2d(images, 3, 1, 1)
    lowest = -F.max_pool2d(-images, 3, 1, 1)
    change = (images - highest.flip(0)).relu() + (lowest.flip(0) - images).relu()
    return float(F.adaptive_avg_pool2d(change.sum(0), 16).max())  # of [3, 16, 16]


def compute_structural_similarity(before: Tensor, after: Tensor) -> float:
    """Compute the similarity of two images by their edges or their luminance, at 32×32.

    Args:
        before: [3, size, size] in [0, 1].
        after: Likewise.

    Returns:
        The correlation of the edge maps, or the absolute correlation of the luminance (so that an
        inverted image counts as similar), whichever is larger.
    """
    thumbnails = F.interpolate(
        torch.stack([before, after]), (32, 32), mode="area"
    )  # [2, 3, 32, 32]
    luminance = thumbnails.mean(1).flatten(1)  # [2, 1024]
    # edges: the gradient magnitude, of the color channel that changes most
    grad_x = (thumbnails[..., 1:, :-1] - thumbnails[..., :-1, :-1]).abs().amax(1)  # [2, 31, 31]
    grad_y = (thumbnails[..., :-1, 1:] - thumbnails[..., :-1, :-1]).abs().amax(1)  # [2, 31, 31]
    edges = (grad_x.square() + grad_y.square()).sqrt().flatten(1)  # [2, 961]
    return max(_compute_correlation(edges), abs(_compute_correlation(luminance)))


def _compute_correlation(maps: Tensor) -> float:
    """Compute the Pearson correlation of the two rows of [2, n]."""
    centered = maps - maps.mean(1, keepdim=True)
    return float(F.cosine_similarity(centered[0], centered[1], dim=0))
