import torch
from torch import Tensor
from torch.nn import functional as F


def apply_random_degradation(images: Tensor) -> Tensor:
    """A third of the images blurred (down and up again), all with a little noise of random size."""
    n, _, h, w = images.shape
    scale = float(torch.empty(1).uniform_(0.5, 0.9))
    downsampled = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    blurred = F.interpolate(downsampled, (h, w), mode="bilinear")
    blur_mask = torch.rand(n, 1, 1, 1, device=images.device) < 0.35
    noise = torch.randn_like(images) * torch.rand(n, 1, 1, 1, device=images.device) * 0.04
    return (torch.where(blur_mask, blurred, images) + noise).clamp(0, 1)
