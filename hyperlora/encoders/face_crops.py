"""Crops of a face by its 106 landmarks, as HyperLoRA takes them (PIL throughout).

Sides and centers are in pixels of the photo. Landmarks are those of insightface's ``2d106det``.
"""

import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

GRAY: Final = (127, 127, 127)
"""What stands where the background was, and around a padded photo."""
CLIP_IMAGE_SIZE: Final = 224
"""Pixels per side of CLIP's images."""
_OUTLINE: Final = (
    *(1, *range(9, 17), *range(2, 9), 0),  # chin and cheeks
    *(*range(24, 17, -1), *range(32, 24, -1), 17),  # the other cheek
    *(101, *range(105, 101, -1), 50, 51, 49, 48, 43),  # brows
)
"""Landmarks around the face, in order."""
_OUTLINE_SCALE: Final = 0.8
"""Half a side of the square around the outline, in sides of its box."""
_FACE_SCALE: Final = 0.75
"""Half a side of CLIP's square, in sides of the landmarks' box."""
_FACE_RAISE: Final = 0.125
"""How far the center of that square lies above the box's, in halves of its side."""
_ARCFACE_SCALE: Final = 2.0
"""Half a side of ArcFace's cut, in halves of CLIP's square."""
_MASK_SIZE: Final = 512
_MASK_BLUR: Final = 15


def remove_background(photo: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Replace all but the face by gray, with a soft edge.

    Args:
        photo: RGB, of any size.
        landmarks: x and y, [106, 2].

    Returns:
        An RGB image of the photo's size.
    """
    outline = landmarks[list(_OUTLINE)]  # [points, 2]
    center = outline.mean(0)
    radius = _OUTLINE_SCALE * float(np.ptp(outline, axis=0).max())
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    box = _make_box(center, radius)
    face, face_mask = photo.crop(box), mask.crop(box)
    face_mask = face_mask.resize((_MASK_SIZE, _MASK_SIZE))
    face_mask = face_mask.filter(ImageFilter.GaussianBlur(_MASK_BLUR)).resize(face.size)
    canvas = Image.new("RGB", photo.size, GRAY)
    corner = center - radius
    canvas.paste(face, (int(corner[0]), int(corner[1])), face_mask)
    return canvas


def crop_for_clip(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Cut the square around the face; what lies outside of the image is black.

    Args:
        image: The photo, or what ``remove_background`` returns.
        landmarks: x and y, [106, 2].

    Returns:
        An RGB image of 224×224 pixels.
    """
    center, radius = _find_square(landmarks)
    return resize_for_clip(image.crop(_make_box(center, radius)))


def crop_for_arcface(photo: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Cut the wide square in which the face is detected again for its embedding.

    Args:
        photo: RGB, of any size.
        landmarks: x and y, [106, 2].

    Returns:
        An RGB image.
    """
    center, radius = _find_square(landmarks)
    return photo.crop(_make_box(center, _ARCFACE_SCALE * radius))


def crop_for_training(photo: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Cut the square around the face, moved and shrunk so that it lies inside of the photo.

    Args:
        photo: RGB, of any size.
        landmarks: x and y, [106, 2].

    Returns:
        A square RGB image.
    """
    center, radius = _find_square(landmarks)
    side = max(1, min(round(2 * radius), *photo.size))
    left, top = (
        min(max(0, round(float(middle) - side / 2)), length - side)
        for middle, length in zip(center, photo.size, strict=True)
    )
    return photo.crop((left, top, left + side, top + side))


def resize_for_clip(image: Image.Image) -> Image.Image:
    """Resize and crop as CLIP's processor does in PIL: shorter side 224, bicubic, then the center.

    Args:
        image: RGB, of any size.

    Returns:
        An RGB image of 224×224 pixels.
    """
    size, shorter_side = CLIP_IMAGE_SIZE, min(image.size)
    width, height = (int(size * side / shorter_side) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def pad_with_gray(photo: Image.Image, margin: float = 0.5) -> Image.Image:
    """Add a gray border, so that a detector finds a face that fills the photo.

    Args:
        photo: RGB, of any size.
        margin: Width of the border, in longer sides of the photo.

    Returns:
        The larger image.
    """
    border = round(max(photo.size) * margin)
    padded = Image.new("RGB", (photo.width + 2 * border, photo.height + 2 * border), GRAY)
    padded.paste(photo, (border, border))
    return padded


def _find_square(landmarks: np.ndarray) -> tuple[np.ndarray, float]:
    """Center [2] and half side of CLIP's square."""
    low, high = landmarks.min(0), landmarks.max(0)
    radius = _FACE_SCALE * float((high - low).max())
    center = (low + high) / 2
    return center - np.array([0.0, _FACE_RAISE * radius]), radius


def _make_box(center: Sequence[float] | np.ndarray, radius: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, rounded as PIL rounds them."""
    x, y = float(center[0]), float(center[1])
    return round(x - radius), round(y - radius), round(x + radius), round(y + radius)


def ignore_insightface_warnings() -> None:
    """Hide that insightface calls scikit-image by an old name."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"insightface\.")
