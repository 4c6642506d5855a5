"""What one subject is fitted to: its photos as latents under their captions, some perhaps kept back to measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.build.plan import PlannedLora, Recipe
from data_builder.sources.crops import compute_center_box, crop_image, jitter_box
from data_builder.sources.sources import Source
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidImageError
from hyperlora.finetuning.examples import TrainingExamples


@dataclass(frozen=True)
class SubjectData:
    """``train_examples`` and ``val_examples`` of one subject (a leading axis of 1); ``convert_to_tensor`` [n, 3, h, w] in [0, 1] of the
    photos that are learned, ``photo_hashes`` the SHA-256 of all."""

    train_examples: TrainingExamples
    val_examples: TrainingExamples
    pixels: Tensor
    photo_hashes: tuple[str, ...]


def load_subject(
    row: PlannedLora, source: Source, base: DiffusionBase, recipe: Recipe
) -> SubjectData:
    """Raises ``InvalidImageError`` if a photo cannot be read any more, or is another than the plan saw."""
    photos = [_read_photo(photo, source) for photo in row.photos]
    images = [image for image, _ in photos]
    num_val = recipe.num_val_photos if len(images) > recipe.num_val_photos else 0
    train_indices = list(range(len(images) - num_val))
    rng = np.random.default_rng([row.seed, 1])
    train_images, captions = list[Image.Image](), list[Photo]()
    for i in train_indices:
        crop_box = row.photos[i].crop_box or compute_center_box(images[i])
        crop_boxes = [crop_box, *(jitter_box(crop_box, rng) for _ in range(recipe.num_crops - 1))]
        crops = [crop_image(images[i], s, base.resolution) for s in crop_boxes]
        train_images += crops + (
            [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in crops] if recipe.flip else []
        )
        captions += [row.photos[i]] * (len(train_images) - len(captions))
    uncropped_views = [
        crop_image(im, p.crop_box or compute_center_box(im), base.resolution)
        for im, p in zip(images, row.photos, strict=True)
    ]
    train_examples = val_examples = _make_examples(base, train_images, captions, recipe)
    if num_val or len(train_images) > len(train_indices):
        val_indices = range(len(images) - num_val, len(images)) if num_val else train_indices
        val_examples = _make_examples(
            base,
            [uncropped_views[i] for i in val_indices],
            [row.photos[i] for i in val_indices],
            recipe,
        )
    pixels = torch.stack([to_tensor(uncropped_views[i], base.resolution) for i in train_indices])
    return SubjectData(train_examples, val_examples, pixels, tuple(digest for _, digest in photos))


def sample_class_latents(
    base: DiffusionBase, recipe: Recipe, num_inference_steps: int = 20, batch_size: int = 16
) -> Tensor:
    """What the base draws of the class [n, c, h, w], under the recipe's templates in turn, by seeds 0, 1, ..."""
    prompts = make_class_prompts(recipe)
    latents = []
    for batch_start in range(0, recipe.num_class_images, batch_size):
        seeds = range(batch_start, min(batch_start + batch_size, recipe.num_class_images))
        images = generate_images(
            base, [prompts[s] for s in seeds], seeds=seeds, num_inference_steps=num_inference_steps
        )
        latents.append(
            base.encode_images(torch.stack([to_tensor(d, base.resolution) for d in images]))
        )
    return torch.cat(latents)


def make_class_examples(base: DiffusionBase, recipe: Recipe, latents: Tensor) -> TrainingExamples:
    return TrainingExamples(
        latents[None], _add_subject_dim(base.encode_prompts(make_class_prompts(recipe)))
    )


def make_class_prompts(recipe: Recipe) -> list[str]:
    return [
        recipe.prompt_templates[i % len(recipe.prompt_templates)].format(recipe.class_noun)
        for i in range(recipe.num_class_images)
    ]


def _read_photo(photo: Photo, source: Source) -> tuple[Image.Image, str]:
    image, digest = source.read_photo(photo.ref)
    if photo.sha256 and digest != photo.sha256:
        raise InvalidImageError(
            f"the photo {photo.ref!r} is another than when the plan was made: put it back, or plan again"
        )
    return image, digest


def _make_examples(
    base: DiffusionBase, images: Sequence[Image.Image], photos: Sequence[Photo], recipe: Recipe
) -> TrainingExamples:
    """Each picture under its own caption, or under every template."""
    captions = [[p.caption] if p.caption else list(recipe.prompt_templates) for p in photos]
    prompts = [text.replace("{}", recipe.identifier) for group in captions for text in group]
    latents = base.encode_images(torch.stack([to_tensor(p, base.resolution) for p in images]))
    image_indices = torch.tensor(
        [i for i, group in enumerate(captions) for _ in group], device=latents.device
    )
    return TrainingExamples(
        latents[image_indices][None], _add_subject_dim(base.encode_prompts(prompts))
    )


def _add_subject_dim(conditions: dict[str, Any]) -> dict[str, Any]:
    """With a leading axis of one subject."""
    return {
        k: _add_subject_dim(v) if isinstance(v, dict) else v[None] for k, v in conditions.items()
    }
