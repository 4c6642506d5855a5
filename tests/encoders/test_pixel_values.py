"""Pixels against PIL, torchvision and the image processors that keep the authors' arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hyperlora.encoders.pixel_values import (
    crop_center_square,
    make_clip_pixels,
    make_dinov3_pixels,
    make_siglip_pixels,
)

SIZES = [(640, 480), (333, 777), (1024, 1024), (1500, 1001), (97, 64), (225, 223), (5, 3)]


def make_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
def test_crop_center_square_equals_resize_and_center_crop(size: tuple[int, int]) -> None:
    image, (width, height) = make_image(*size), size
    scale = max(256 / width, 256 / height)
    resized = TF.resize(
        image,
        [round(height * scale), round(width * scale)],
        interpolation=InterpolationMode.BILINEAR,
    )
    expected = TF.center_crop(resized, [256, 256])
    assert np.array_equal(crop_center_square(image, 256), expected)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_those_of_the_processors(size: tuple[int, int]) -> None:
    image = make_image(*size)
    siglip = SiglipImageProcessorPil(
        size={"height": 384, "width": 384}, resample=Image.Resampling.BILINEAR
    )
    for make_pixels, processor, atol in (
        (make_siglip_pixels, siglip, 0),
        (make_clip_pixels, CLIPImageProcessorPil(), 0),
        (make_dinov3_pixels, DINOv3ViTImageProcessor(), 5e-6),
    ):
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(make_pixels(image), expected, rtol=0, atol=atol)
