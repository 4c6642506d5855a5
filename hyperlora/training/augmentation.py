"""Views of photos, and random degradation of training images.

A subject with one photo is trained with two views of it: the reference is a random crop, perhaps
mirrored, in other colors and with a blurred background; the target is another crop in the photo's
own colors. So the network cannot copy the pixels of the reference.
"""

import hashlib
from dataclasses import dataclass, fields
from math import cos, radians, sin
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvF

from hyperlora.data.aspect_buckets import ImageSize
from hyperlora.errors import InvalidArgumentError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
_FACE_MARGIN: Final = 0.4
"""Room around a face that stays sharp where the background is blurred, in sides of its box."""


@dataclass(frozen=True)
class AugmentationConfig:
    """How a reference view differs from its photo, and how the crops of targets vary.

    Attributes:
        min_crop_scale: Least side of a random crop, relative to the largest in the photo.
        flip_prob: Probability that a reference is mirrored. Targets are not: a LoRA would learn
            mirrored faces.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        hue_jitter: Largest change of hue, in turns of the color circle.
        background_blur_prob: Probability that all but the face is blurred, where it is known.
        face_blur_prob: Probability that the face is blurred a little, as by a poor camera.
        all_references: Whether subjects with several photos get such references, too.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    min_crop_scale: float = 0.7
    flip_prob: float = 0.5
    color_jitter: float = 0.2
    hue_jitter: float = 0.02
    background_blur_prob: float = 0.3
    face_blur_prob: float = 0.1
    all_references: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise InvalidArgumentError(
                    f"augmentation.{field.name} is {value}, a number from 0 to 1 was expected"
                )
        if self.min_crop_scale < 0.1 or self.hue_jitter > 0.5:
            raise InvalidArgumentError(
                "augmentation.min_crop_scale must be at least 0.1, and hue_jitter at most 0.5"
            )

    @property
    def changes_images(self) -> bool:
        """Whether a view surely differs from its photo."""
        return self.min_crop_scale < 1 or self.color_jitter > 0


def make_reference_view(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    config: AugmentationConfig,
    face_box: Box | None = None,
) -> Image.Image:
    """Make a random view of a photo for the encoder.

    Args:
        image: The photo.
        size: Side of the view in pixels.
        rng: Random generator; the same state gives the same view.
        config: How far the view differs.
        face_box: The face, which the crop keeps; None if it is not known.

    Returns:
        The view.
    """
    if face_box is not None and rng.random() < config.background_blur_prob:
        image = blur_background(image, face_box, radius=max(image.size) * rng.uniform(0.01, 0.04))
    if face_box is not None and rng.random() < config.face_blur_prob:
        face_width = face_box[2] - face_box[0]
        image = blur_face(image, face_box, radius=face_width * rng.uniform(0.01, 0.03))
    box = compute_random_box(image.size, (size, size), rng, config.min_crop_scale, face_box)
    view = image.resize((size, size), Image.Resampling.BICUBIC, box)
    if rng.random() < config.flip_prob:
        view = ImageOps.mirror(view)
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * config.color_jitter
    view = tvF.adjust_brightness(view, float(brightness))
    view = tvF.adjust_contrast(view, float(contrast))
    view = tvF.adjust_saturation(view, float(saturation))
    if config.hue_jitter > 0:  # not in vain: the way to hues and back rounds
        view = tvF.adjust_hue(view, float(rng.uniform(-1, 1)) * config.hue_jitter)
    return view


def crop_target(
    image: Image.Image,
    size: ImageSize,
    crop_number: int,
    key: str,
    min_crop_scale: float,
    face_box: Box | None = None,
) -> Image.Image:
    """Crop and resize a photo to a target; the same arguments always give the same pixels.

    Args:
        image: The photo.
        size: Width and height of the target.
        crop_number: 0 for the largest crop in the middle, above for a random one.
        key: Name of the photo, which seeds random crops.
        min_crop_scale: Least side of a random crop, relative to the largest.
        face_box: The face, which the crop keeps; None if it is not known.

    Returns:
        The target.
    """
    if crop_number == 0 and face_box is None:
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    digest = hashlib.sha256(key.encode()).digest()
    rng = np.random.default_rng([int.from_bytes(digest[:8], "big"), crop_number])
    scale = 1.0 if crop_number == 0 else min_crop_scale
    box = compute_random_box(image.size, size, rng, scale, face_box, center=crop_number == 0)
    return image.resize(size, Image.Resampling.BICUBIC, box)


def compute_random_box(
    image_size: ImageSize,
    size: ImageSize,
    rng: np.random.Generator,
    min_scale: float,
    face_box: Box | None = None,
    center: bool = False,
) -> Box:
    """Compute a random crop with a given aspect ratio.

    Args:
        image_size: Width and height of the image.
        size: Width and height whose ratio the crop has.
        rng: Random generator.
        min_scale: Least side relative to that of the largest crop.
        face_box: The crop holds it, as far as it can; None for no such bound.
        center: Whether the crop is as near to the middle as the face allows.

    Returns:
        The crop, inside the image.
    """
    scale = min(image_size[0] / size[0], image_size[1] / size[1])
    sides = []
    for axis in (0, 1):
        face_side = face_box[axis + 2] - face_box[axis] if face_box else 0.0
        sides.append((scale * size[axis], face_side))
    # a crop smaller than the face would cut it
    least = max(min_scale, *(min(1.0, face / side) for side, face in sides))
    relative_side = rng.uniform(least, 1)
    starts = []
    for axis, (max_side, _) in enumerate(sides):
        side = max_side * relative_side
        low, high = 0.0, image_size[axis] - side
        if face_box is not None:
            face_low, face_high = face_box[axis + 2] - side, face_box[axis]
            low = min(max(low, face_low), high)
            high = max(min(high, face_high), low)
        middle = (image_size[axis] - side) / 2
        starts.append(min(max(middle, low), high) if center else rng.uniform(low, high))
    (left, top), (width, height) = starts, (side * relative_side for side, _ in sides)
    right, bottom = min(left + width, image_size[0]), min(top + height, image_size[1])
    return max(0.0, left), max(0.0, top), right, bottom


def blur_background(image: Image.Image, face_box: Box, radius: float) -> Image.Image:
    """Blur all but a face and the room around it.

    Args:
        image: The photo.
        face_box: The face.
        radius: Standard deviation of the blur in pixels.

    Returns:
        The blurred photo.
    """
    blurred = image.filter(ImageFilter.GaussianBlur(radius))
    mask = _make_face_mask(image.size, face_box, _FACE_MARGIN)
    return Image.composite(image, blurred, mask)


def blur_face(image: Image.Image, face_box: Box, radius: float) -> Image.Image:
    """Blur a face and leave the background as it is.

    Args:
        image: The photo.
        face_box: The face.
        radius: Standard deviation of the blur in pixels.

    Returns:
        The blurred photo.
    """
    blurred = image.filter(ImageFilter.GaussianBlur(radius))
    return Image.composite(blurred, image, _make_face_mask(image.size, face_box, 0.0))


def crop_face(
    image: Image.Image, center: tuple[float, float], side: float, angle: float, size: int
) -> Image.Image:
    """Crop the square in which a face is upright (``Face.compute_aligned_crop_box``).

    Args:
        image: The photo.
        center: x and y of its center in pixels.
        side: Its side in pixels.
        angle: Its angle in degrees, counter-clockwise.
        size: Side of the result in pixels.

    Returns:
        The face; the edge of the photo is repeated where the square leaves it.
    """
    padded = np.asarray(image)
    margin = int(np.ceil(side))  # the corners of a turned square reach 0.71 sides from its center
    padded = np.pad(padded, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    # one pixel of the result is ``step`` pixels of the photo; larger steps are averaged first
    warp_size = max(size, min(2048, int(side)))
    step = side / warp_size
    a, b = step * cos(radians(angle)), step * sin(radians(angle))
    x, y = center[0] + margin, center[1] + margin
    half = warp_size / 2
    affine = (a, b, x - (a + b) * half, -b, a, y - (a - b) * half)
    warped = Image.fromarray(padded).transform(
        (warp_size, warp_size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    return warped.resize((size, size), Image.Resampling.BICUBIC)


def _make_face_mask(image_size: ImageSize, face_box: Box, margin: float) -> Image.Image:
    """An ellipse around the face with soft edges: 255 inside, 0 outside."""
    left, top, right, bottom = face_box
    room = margin * max(right - left, bottom - top)
    mask = Image.new("L", image_size)
    ImageDraw.Draw(mask).ellipse((left - room, top - room, right + room, bottom + room), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(max(1.0, 0.1 * (right - left))))


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


def occlude_image(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Cover a random rectangle of an image with gray, as hands, masks and hats cover faces.

    Args:
        image: [3, h, w] in [0, 1].
        rng: Chooses the rectangle. Each side is 30 to 60 % of the image's.

    Returns:
        A copy, [3, h, w].
    """
    height, width = image.shape[-2:]
    box_height = int(height * rng.uniform(0.3, 0.6))
    box_width = int(width * rng.uniform(0.3, 0.6))
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    occluded = image.clone()
    occluded[:, top : top + box_height, left : left + box_width] = 0.5
    return occluded
