"""Crops of faces against those of HyperLoRA's authors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora.encoders.face_crops import (
    crop_for_arcface,
    crop_for_clip,
    pad_with_gray,
    remove_background,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "hyperlora-crops"


def read_golden(name: str) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_crops_equal_those_of_the_authors(number: int) -> None:
    photo = Image.open(GOLDEN / f"{number}-photo.png").convert("RGB")
    landmarks = np.array(json.loads((GOLDEN / f"{number}-landmarks106.json").read_text()))
    crops = {
        "clip-background-removed": crop_for_clip(remove_background(photo, landmarks), landmarks),
        "clip-whole": crop_for_clip(photo, landmarks),
        "arcface-input": crop_for_arcface(photo, landmarks),
    }
    for name, crop in crops.items():
        np.testing.assert_array_equal(np.asarray(crop), read_golden(f"{number}-{name}"), name)


def test_pad_with_gray_keeps_the_photo_in_the_middle() -> None:
    photo = Image.new("RGB", (30, 50), "red")
    padded = pad_with_gray(photo, 0.2)
    assert padded.size == (50, 70) and padded.getpixel((0, 0)) == (127, 127, 127)
    assert padded.crop((10, 10, 40, 60)).tobytes() == photo.tobytes()
