"""Random degradation of training images."""

import torch
from torch import Tensor
from torch.nn import functional as F


def apply_random_degradation(images: Tensor) -> Tensor:
    """Blur about a third of the images and add noise to all of them.

    The blur is a resize to one random size (0.5 to 0.9 of the side) and back. The standard
    deviation of the noise is uniform in [0, 0.04] for each image.

    Args:
        images: [batch, 3, h, w] in [0, 1].

    Returns:
        Degraded images of the same shape and range.
    """
    n, _, h, w = images.shape
    scale = float(torch.empty(1).uniform_(0.5, 0.9))
    downsampled = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    blurred = F.interpolate(downsampled, (h, w), mode="bilinear")  # [batch, 3, h, w]
    blur_mask = torch.rand(n, 1, 1, 1, device=images.device) < 0.35
    noise = torch.randn_like(images) * torch.rand(n, 1, 1, 1, device=images.device) * 0.04
    return (torch.where(blur_mask, blurred, images) + noise).clamp(0, 1)
