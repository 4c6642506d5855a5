"""Regions of an image in positions of the latents, by hand-computed areas."""

import pytest
import torch
from PIL import Image

from hyperlora.diffusion.regions import (
    MAX_ASPECT_ERROR,
    compute_region_masks,
    compute_region_windows,
)
from hyperlora.errors import InvalidArgumentError


def test_masks_are_the_covered_share_of_each_position() -> None:
    """Left 0.1 to 0.5 of five columns covers half of the first; top 0.25 to 0.875 of two rows."""
    box = (0.1, 0.25, 0.5, 0.875)
    rows, columns = torch.tensor([0.5, 0.75]), torch.tensor([0.5, 1.0, 0.5, 0.0, 0.0])
    masks = compute_region_masks([box, (0.0, 0.0, 1.0, 1.0)], (2, 5))
    torch.testing.assert_close(masks[0], rows[:, None] * columns)
    torch.testing.assert_close(masks[1], torch.ones(2, 5))


@pytest.mark.parametrize("positions", [3, 7, 96, 100])
def test_masks_of_boxes_never_exceed_1(positions: int) -> None:
    """Areas of float32 positions can, by rounding."""
    masks = compute_region_masks([(0.0, 0.0, 1.0, 1.0)], (positions, 2 * positions))
    assert masks.max() <= 1 and masks.min() > 0.999


def test_masks_of_images_and_tensors_are_means_of_their_pixels() -> None:
    pixels = torch.zeros(4, 8)
    pixels[0, :3] = 1.0
    expected = torch.zeros(2, 4)
    expected[0, 0], expected[0, 1] = 0.5, 0.25
    image = Image.fromarray((pixels * 255).byte().numpy())
    for mask in (pixels, image, image.convert("RGB")):
        torch.testing.assert_close(compute_region_masks([mask], (2, 4))[0], expected)
    gray = Image.new("L", (8, 4), 51)
    torch.testing.assert_close(compute_region_masks([gray], (2, 4)), torch.full((1, 2, 4), 0.2))


def test_mask_may_differ_a_little_in_aspect_ratio() -> None:
    width = 100
    height = int(width * (1 + MAX_ASPECT_ERROR))
    masks = compute_region_masks([torch.ones(height, width), torch.ones(98, 100)], (4, 4))
    assert torch.equal(masks, torch.ones(2, 4, 4))
    for size in ((103, 100), (97, 100)):
        with pytest.raises(InvalidArgumentError, match=f"mask 2 is 100x{size[0]}, .* ratio 4:4"):
            compute_region_masks([torch.ones(4, 4), torch.ones(size)], (4, 4))
    for mask in (torch.full((4, 4), 1.5), torch.full((4, 4), -0.5), torch.ones(1, 4, 4)):
        with pytest.raises(InvalidArgumentError, match="mask 1 must be"):
            compute_region_masks([mask], (4, 4))


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 4, 10)),
        ((0.2, 0.25, 0.8, 0.75), (1, 2, 2, 6)),
        ((0.5, 0.0, 0.52, 0.1), (0, 5, 1, 1)),  # thinner than half a position
        ((0.97, 0.96, 1.0, 1.0), (3, 9, 1, 1)),  # at the right and lower edge
    ],
)
def test_windows_are_rounded_and_never_empty(
    box: tuple[float, float, float, float], window: tuple[int, int, int, int]
) -> None:
    assert compute_region_windows([(0.0, 0.0, 0.5, 0.5), box], (4, 10))[1] == window


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0.0, 0.5, 1.0),
        (0.0, 0.5, 1.0, 0.5),
        (-0.1, 0.0, 1.0, 1.0),
        (0.0, -0.1, 1.0, 1.0),
        (0.0, 0.0, 1.1, 1.0),
        (0.0, 0.0, 1.0, 1.1),
        (0.0, 0.0, float("nan"), 1.0),
        (0.0, 0.0, 1.0),
    ],
)
def test_boxes_outside_of_the_image_are_refused(box: tuple[float, ...]) -> None:
    for function in (compute_region_masks, compute_region_windows):
        with pytest.raises(InvalidArgumentError, match="region 2 must be left < right"):
            function([(0.0, 0.0, 1.0, 1.0), box], (4, 4))  # type: ignore[list-item]


def test_windows_need_boxes() -> None:
    with pytest.raises(InvalidArgumentError, match="region 1 is a mask"):
        compute_region_windows([torch.ones(4, 4)], (4, 4))
