"""Images without a face, for a face detector: random backgrounds, and portraits without a face."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_builder.avatars.landmarks import Landmarks

_MAX_SHAPES = 12
"""Upper bound (exclusive) of the number of shapes on a background."""


def generate_background(rng: np.random.Generator, size: int) -> Image.Image:
    """Generate a plain color, noise, tiles or a gradient, often with shapes on it.

    Args:
        rng: Random numbers.
        size: Side in pixels.

    Returns:
        The image, [size, size].
    """
    num_cells = int(rng.choice([1, 1, 2, 4, 8, size]))
    cells = Image.fromarray(rng.integers(0, 256, (num_cells, num_cells, 3), np.uint8))
    resampling = Image.Resampling.NEAREST if rng.random() < 0.5 else Image.Resampling.BILINEAR
    canvas = cells.resize((size, size), resampling)
    if rng.random() < 0.1:
        # black, as insightface pads images that are not square
        canvas.paste("black", (0, 0, size, size))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(_MAX_SHAPES)) if rng.random() < 0.6 else 0):
        x, y = rng.uniform(0, size, 2)
        w, h = size * rng.uniform(0.02, 0.5, 2)
        draw_shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        draw_shape((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=_sample_color(rng))
    return canvas


def remove_face(portrait: Image.Image, face: Landmarks, rng: np.random.Generator) -> Image.Image:
    """Cover the face of a portrait, blur it, or shuffle the portrait's tiles.

    Args:
        portrait: Portrait with a face.
        face: Its landmarks.
        rng: Random numbers, which choose the way.

    Returns:
        A new image of the same size (a multiple of 4 where tiles are shuffled).
    """
    match int(rng.integers(4)):
        case 0 | 1:
            return _cover_face(portrait, face, rng)
        case 2:
            return portrait.filter(ImageFilter.GaussianBlur(portrait.width / 8))
        case _:
            return _shuffle_tiles(portrait, rng)


def _cover_face(portrait: Image.Image, face: Landmarks, rng: np.random.Generator) -> Image.Image:
    """Draw an ellipse or a rectangle over the face, mostly in the color of the chin."""
    covered = portrait.copy()
    draw = ImageDraw.Draw(covered)
    chin = int(face.box[0] + face.box[2]) // 2, int(face.box[3]) - 2
    draw_shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    fill = portrait.getpixel(chin) if rng.random() < 0.6 else _sample_color(rng)
    draw_shape(tuple(face.box), fill=fill)
    return covered


def _shuffle_tiles(portrait: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut a portrait into 4 x 4 tiles and put them in random order."""
    side = portrait.width // 4
    pixels = np.asarray(portrait)[: 4 * side, : 4 * side]  # [4 * side, 4 * side, 3]
    grid = pixels.reshape(4, side, 4, side, 3).swapaxes(1, 2)  # [4, 4, side, side, 3]
    shuffled = grid.reshape(16, side, side, 3)[rng.permutation(16)]
    shuffled_grid = shuffled.reshape(4, 4, side, side, 3).swapaxes(1, 2)  # [4, side, 4, side, 3]
    return Image.fromarray(np.ascontiguousarray(shuffled_grid).reshape(4 * side, 4 * side, 3))


def _sample_color(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(value) for value in rng.integers(0, 256, 3))
    return r, g, b
