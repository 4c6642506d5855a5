"""Views of photos: inside the photo, different from it, and the same for the same seed."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from hyperlora.data.images import to_tensor
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.augmentation import (
    AugmentationConfig,
    blur_background,
    blur_face,
    compute_random_box,
    crop_face,
    crop_target,
    make_reference_view,
    occlude_image,
)

SIDES = st.integers(8, 400)


def make_photo(width: int = 60, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@given(
    st.tuples(SIDES, SIDES),
    st.tuples(SIDES, SIDES),
    st.floats(0.1, 1),
    st.tuples(*[st.floats(0, 1)] * 4) | st.none(),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_box_lies_in_the_image_and_keeps_the_face(
    image_size: tuple[int, int],
    size: tuple[int, int],
    min_scale: float,
    corners: tuple[float, ...] | None,
    center: bool,
    seed: int,
) -> None:
    face_box = None
    if corners is not None:
        (left, right), (top, bottom) = sorted(corners[:2]), sorted(corners[2:])
        face_box = tuple(v * image_size[i % 2] for i, v in enumerate((left, top, right, bottom)))
    rng = np.random.default_rng(seed)
    left, top, right, bottom = compute_random_box(
        image_size, size, rng, min_scale, face_box, center
    )
    assert 0 <= left < right <= image_size[0]
    assert 0 <= top < bottom <= image_size[1]
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=1e-4)
    largest = min(image_size[0] / size[0], image_size[1] / size[1]) * size[0]
    assert right - left >= min_scale * largest * (1 - 1e-6)
    if face_box is not None:
        widest, highest = largest, largest * size[1] / size[0]
        assume(face_box[2] - face_box[0] <= widest and face_box[3] - face_box[1] <= highest)
        assert left <= face_box[0] + 1e-3
        assert right >= face_box[2] - 1e-3
        assert top <= face_box[1] + 1e-3
        assert bottom >= face_box[3] - 1e-3


@given(st.integers(0, 10**6), st.booleans())
def test_reference_view_repeats_by_seed_and_differs_from_the_photo(
    seed: int, has_face: bool
) -> None:
    photo, config = make_photo(), AugmentationConfig()
    face_box = (10.0, 5.0, 30.0, 28.0) if has_face else None
    views = [
        make_reference_view(photo, 24, np.random.default_rng(seed), config, face_box)
        for _ in range(2)
    ]
    assert views[0].size == (24, 24)
    assert views[0].tobytes() == views[1].tobytes()
    other = make_reference_view(photo, 24, np.random.default_rng(seed + 1), config, face_box)
    assert other.tobytes() != views[0].tobytes()
    assert (to_tensor(views[0], 24) - to_tensor(photo, 24)).abs().mean() > 0.01


def test_view_without_changes_is_the_photo() -> None:
    config = AugmentationConfig(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert not config.changes_images
    view = make_reference_view(make_photo(32, 32), 32, np.random.default_rng(0), config)
    assert view.tobytes() == make_photo(32, 32).tobytes()


@pytest.mark.parametrize(
    "options",
    [{"flip_prob": 1.5}, {"min_crop_scale": 0.0}, {"hue_jitter": 0.7}, {"face_blur_prob": -0.1}],
)
def test_augmentation_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        AugmentationConfig(**options)


def test_crops_of_a_target_are_numbered() -> None:
    photo = make_photo()
    crops = [crop_target(photo, (24, 16), k, "anna/1.png", 0.6) for k in range(4)]
    again = [crop_target(photo, (24, 16), k, "anna/1.png", 0.6) for k in range(4)]
    assert [c.tobytes() for c in crops] == [c.tobytes() for c in again]
    assert len({c.tobytes() for c in crops}) == 4
    assert all(crop.size == (24, 16) for crop in crops)
    other = crop_target(photo, (24, 16), 1, "anna/2.png", 0.6)
    assert other.tobytes() != crops[1].tobytes()
    square = crop_target(photo, (20, 20), 0, "anna/1.png", 0.6)
    assert (to_tensor(square, 20) == to_tensor(photo, 20)).all()  # as without augmentation


def test_first_crop_moves_only_as_far_as_the_face_needs() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 80:90] = 255  # right of the middle square, 30 to 70
    crop = crop_target(Image.fromarray(pixels), (40, 40), 0, "", 0.5, (80, 5, 90, 30))
    columns = np.asarray(crop)[20, :, 0].nonzero()[0]
    assert (columns.min(), columns.max()) == (30, 39)


def test_blurs_leave_the_other_part_as_it_is() -> None:
    photo, box = make_photo(90, 90), (30.0, 30.0, 60.0, 60.0)
    background, face = blur_background(photo, box, 4.0), blur_face(photo, box, 4.0)
    original = np.asarray(photo).astype(int)
    corner, middle = (slice(0, 8), slice(0, 8)), (slice(42, 48), slice(42, 48))
    for blurred, changed, kept in ((background, corner, middle), (face, middle, corner)):
        difference = np.abs(np.asarray(blurred).astype(int) - original)
        assert difference[kept].max() <= 1
        assert difference[changed].mean() > 20


@pytest.mark.parametrize("angle", [0.0, 90.0, -90.0])
def test_crop_face_turns_the_square_upright(angle: float) -> None:
    """The crop equals a rotation of the whole photo about the center, seen from the library."""
    photo = make_photo(64, 64).resize((16, 16), Image.Resampling.BOX).resize((64, 64))
    crop = crop_face(photo, (32, 32), 32, angle, 32)
    expected = photo.rotate(-angle).crop((16, 16, 48, 48))
    difference = np.asarray(crop).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 12


def test_crop_face_repeats_the_edge_outside_of_the_photo() -> None:
    photo = Image.new("RGB", (30, 30), (200, 10, 10))
    assert np.asarray(crop_face(photo, (0, 0), 28, 20, 16)).min(axis=(0, 1))[0] >= 198


@given(st.integers(0, 10**6), st.integers(10, 90), st.integers(10, 90))
def test_occlude_image_covers_one_gray_rectangle(seed: int, height: int, width: int) -> None:
    image = torch.zeros(3, height, width)
    occluded = occlude_image(image, np.random.default_rng(seed))
    assert not image.any()
    covered = occluded[0] == 0.5
    assert torch.equal(occluded, covered * torch.full((3, 1, 1), 0.5))
    num_rows, num_columns = int(covered.any(1).sum()), int(covered.any(0).sum())
    assert int(covered.sum()) == num_rows * num_columns, "a rectangle"
    assert int(0.3 * height) <= num_rows <= 0.6 * height
    assert int(0.3 * width) <= num_columns <= 0.6 * width
