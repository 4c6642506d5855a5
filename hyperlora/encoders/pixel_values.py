"""Pixels as released encoders saw them in training, whatever image processors do today.

Each resize is that of the library that the authors ran: PIL for SigLIP2 and CLIP, floating-point
pixels for DINOv3. The image processors of transformers 5 differ from PIL by one or two levels.
"""

from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Statistics = tuple[float, float, float]
_HALF: Final[Statistics] = (0.5, 0.5, 0.5)
_IMAGENET_MEAN: Final[Statistics] = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final[Statistics] = (0.229, 0.224, 0.225)
_CLIP_MEAN: Final[Statistics] = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final[Statistics] = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_SIZE: Final = 384
DINOV3_SIZE: Final = 224
CLIP_SIZE: Final = 224


def crop_center_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side of an image to a size (bilinear), and cut the center square.

    Args:
        image: An RGB image of any size.
        size: Pixels per side.

    Returns:
        The square.
    """
    width, height = image.size
    scale = max(size / width, size / height)
    width, height = round(width * scale), round(height * scale)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def make_siglip_pixels(image: Image.Image, size: int = SIGLIP_SIZE) -> Tensor:
    """Resize an image to a square by PIL (bilinear) and normalize it to [-1, 1].

    Args:
        image: An RGB image, usually a square.
        size: Pixels per side.

    Returns:
        [3, size, size].
    """
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return _normalize(_to_tensor(resized), _HALF, _HALF)


def make_dinov3_pixels(image: Image.Image, size: int = DINOV3_SIZE) -> Tensor:
    """Resize floating-point pixels to a square (bilinear, antialiased), then normalize them.

    Args:
        image: An RGB image, usually a square.
        size: Pixels per side.

    Returns:
        [3, size, size].
    """
    pixels = _to_tensor(image)[None]  # [1, 3, h, w]
    resized = F.interpolate(
        pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return _normalize(resized[0], _IMAGENET_MEAN, _IMAGENET_STD)


def make_clip_pixels(image: Image.Image, size: int = CLIP_SIZE) -> Tensor:
    """Resize the shorter side by PIL (bicubic), cut the center square and normalize it.

    Args:
        image: An RGB image of any size.
        size: Pixels per side.

    Returns:
        [3, size, size].
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    square = resized.crop((left, top, left + size, top + size))
    return _normalize(_to_tensor(square), _CLIP_MEAN, _CLIP_STD)


def _to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to [3, h, w] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def _normalize(pixels: Tensor, mean: Statistics, std: Statistics) -> Tensor:
    """(pixels - mean) / std per channel."""
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
