"""What one subject is fitted to: its photos as latents under their captions, some perhaps kept back to measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.build.plan import Planned, Recipe
from data_builder.sources.crops import centre, cut, varied
from data_builder.sources.sources import Source
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.text_to_image import render
from hyperlora.errors import BadImage
from hyperlora.finetuning.examples import Examples


@dataclass(frozen=True)
class Material:
    """``examples`` and ``measure`` of one subject (a leading axis of 1); ``pixels`` [n, 3, h, w] in [0, 1] of the
    photos that are learned, ``digests`` the SHA-256 of all."""

    examples: Examples
    measure: Examples
    pixels: Tensor
    digests: tuple[str, ...]


def material(row: Planned, source: Source, base: Base, recipe: Recipe) -> Material:
    """Raises ``BadImage`` if a photo cannot be read any more, or is another than the plan saw."""
    opened = [_read(photo, source) for photo in row.photos]
    images = [image for image, _ in opened]
    kept = recipe.held_out if len(images) > recipe.held_out else 0
    learned = list(range(len(images) - kept))
    rng = np.random.default_rng([row.seed, 1])
    pictures, captions = list[Image.Image](), list[Photo]()
    for i in learned:
        square = row.photos[i].square or centre(images[i])
        squares = [square, *(varied(square, rng) for _ in range(recipe.variants - 1))]
        found = [cut(images[i], s, base.resolution) for s in squares]
        pictures += found + ([p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in found] if recipe.flip else [])
        captions += [row.photos[i]] * (len(pictures) - len(captions))
    plain = [cut(im, p.square or centre(im), base.resolution) for im, p in zip(images, row.photos, strict=True)]
    examples = measure = _examples(base, pictures, captions, recipe)
    if kept or len(pictures) > len(learned):
        measured = range(len(images) - kept, len(images)) if kept else learned
        measure = _examples(base, [plain[i] for i in measured], [row.photos[i] for i in measured], recipe)
    pixels = torch.stack([to_tensor(plain[i], base.resolution) for i in learned])
    return Material(examples, measure, pixels, tuple(digest for _, digest in opened))


def class_latents(base: Base, recipe: Recipe, steps: int = 20, batch: int = 16) -> Tensor:
    """What the base draws of the class [n, c, h, w], under the recipe's templates in turn, by seeds 0, 1, ..."""
    prompts = class_prompts(recipe)
    parts = []
    for first in range(0, recipe.prior_images, batch):
        seeds = range(first, min(first + batch, recipe.prior_images))
        drawn = render(base, [prompts[s] for s in seeds], seeds=seeds, steps=steps)
        parts.append(base.encode_images(torch.stack([to_tensor(d, base.resolution) for d in drawn])))
    return torch.cat(parts)


def class_examples(base: Base, recipe: Recipe, latents: Tensor) -> Examples:
    return Examples(latents[None], _nested(base.encode_prompts(class_prompts(recipe))))


def class_prompts(recipe: Recipe) -> list[str]:
    return [recipe.templates[i % len(recipe.templates)].format(recipe.class_name) for i in range(recipe.prior_images)]


def _read(photo: Photo, source: Source) -> tuple[Image.Image, str]:
    image, digest = source.read(photo.ref)
    if photo.sha256 and digest != photo.sha256:
        raise BadImage(f"the photo {photo.ref!r} is another than when the plan was made: put it back, or plan again")
    return image, digest


def _examples(base: Base, pictures: Sequence[Image.Image], photos: Sequence[Photo], recipe: Recipe) -> Examples:
    """Each picture under its own caption, or under every template."""
    captions = [[p.caption] if p.caption else list(recipe.templates) for p in photos]
    prompts = [text.replace("{}", recipe.identifier) for group in captions for text in group]
    latents = base.encode_images(torch.stack([to_tensor(p, base.resolution) for p in pictures]))
    which = torch.tensor([i for i, group in enumerate(captions) for _ in group], device=latents.device)
    return Examples(latents[which][None], _nested(base.encode_prompts(prompts)))


def _nested(conditions: dict[str, Any]) -> dict[str, Any]:
    """With a leading axis of one subject."""
    return {k: _nested(v) if isinstance(v, dict) else v[None] for k, v in conditions.items()}
