"""Training data of a subject: latents of its photos under their captions, and validation photos."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.build.plan import PlannedLora, Recipe
from data_builder.sources.crops import compute_center_box, crop_image, jitter_box
from data_builder.sources.sources import Source
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidImageError
from hyperlora.finetuning.examples import TrainingExamples


@dataclass(frozen=True)
class SubjectData:
    """Training data of one subject.

    Attributes:
        train_examples: Examples to fit, with a leading axis of 1.
        val_examples: Examples to evaluate, with a leading axis of 1.
        pixels: Uncropped training photos [n, 3, h, w] in [0, 1].
        photo_hashes: SHA-256 of all photos.
    """

    train_examples: TrainingExamples
    val_examples: TrainingExamples
    pixels: Tensor
    photo_hashes: tuple[str, ...]


def load_subject(
    row: PlannedLora, source: Source, base: DiffusionBase, recipe: Recipe
) -> SubjectData:
    """Load the photos of a subject and encode them.

    Args:
        row: Planned LoRA of the subject.
        source: Source of the photos.
        base: Base model, which encodes photos and captions.
        recipe: Crops, captions and validation photos.

    Returns:
        Training data. Without validation photos, the uncropped training photos evaluate the LoRA.

    Raises:
        InvalidImageError: If a photo cannot be read any more, or has changed since it was planned.
    """
    photos = [_read_photo(photo, source) for photo in row.photos]
    images = [image for image, _ in photos]
    num_val = recipe.num_val_photos if len(images) > recipe.num_val_photos else 0
    train_indices = list(range(len(images) - num_val))
    rng = np.random.default_rng([row.seed, 1])
    train_images, captions = list[Image.Image](), list[Photo]()
    for i in train_indices:
        crop_box = row.photos[i].crop_box or compute_center_box(images[i])
        crop_boxes = [crop_box, *(jitter_box(crop_box, rng) for _ in range(recipe.num_crops - 1))]
        crops = [crop_image(images[i], box, base.resolution) for box in crop_boxes]
        if recipe.flip:
            crops += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
        train_images += crops
        captions += [row.photos[i]] * (len(train_images) - len(captions))
    uncropped_views = [
        crop_image(image, photo.crop_box or compute_center_box(image), base.resolution)
        for image, photo in zip(images, row.photos, strict=True)
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
    return SubjectData(train_examples, val_examples, pixels, tuple(sha256 for _, sha256 in photos))


def sample_class_latents(
    base: DiffusionBase, recipe: Recipe, num_inference_steps: int = 20, batch_size: int = 16
) -> Tensor:
    """Sample class images for prior preservation with the base model, with seeds 0, 1, ...

    Args:
        base: Base model.
        recipe: Number of images and templates, which alternate.
        num_inference_steps: Denoising steps.
        batch_size: Images per batch.

    Returns:
        Latents of the images [n, c, h, w].
    """
    prompts = make_class_prompts(recipe)
    latents = []
    for batch_start in range(0, recipe.num_class_images, batch_size):
        seeds = range(batch_start, min(batch_start + batch_size, recipe.num_class_images))
        images = generate_images(
            base,
            [prompts[seed] for seed in seeds],
            seeds=seeds,
            num_inference_steps=num_inference_steps,
        )
        latents.append(
            base.encode_images(torch.stack([to_tensor(image, base.resolution) for image in images]))
        )
    return torch.cat(latents)


def make_class_examples(base: DiffusionBase, recipe: Recipe, latents: Tensor) -> TrainingExamples:
    """Make the examples of prior preservation: the class images under their prompts.

    Args:
        base: Base model, which encodes the prompts.
        recipe: Templates and class noun.
        latents: Latents of the class images [n, c, h, w].

    Returns:
        Examples with a leading axis of 1.
    """
    return TrainingExamples(
        latents[None],
        map_tensors(lambda t: t[None], base.encode_prompts(make_class_prompts(recipe))),
        [make_class_prompts(recipe)],
    )


def make_class_prompts(recipe: Recipe) -> list[str]:
    """Make the prompt of each class image."""
    return [
        recipe.prompt_templates[i % len(recipe.prompt_templates)].format(recipe.class_noun)
        for i in range(recipe.num_class_images)
    ]


def _read_photo(photo: Photo, source: Source) -> tuple[Image.Image, str]:
    """Read a photo with its SHA-256 and check the latter against the plan."""
    image, sha256 = source.read_photo(photo.ref)
    if photo.sha256 and sha256 != photo.sha256:
        raise InvalidImageError(
            f"the photo {photo.ref!r} is another than when the plan was made: "
            "put it back, or plan again"
        )
    return image, sha256


def _make_examples(
    base: DiffusionBase, images: Sequence[Image.Image], photos: Sequence[Photo], recipe: Recipe
) -> TrainingExamples:
    """Make examples of each image under its own caption, or under every template."""
    captions = [
        [photo.caption] if photo.caption else list(recipe.prompt_templates) for photo in photos
    ]
    base.check_generates_images()
    prompts = [text.replace("{}", recipe.identifier) for group in captions for text in group]
    pixels = torch.stack([to_tensor(image, base.resolution) for image in images])
    latents = base.encode_images(pixels)  # [images, c, h, w]
    image_indices = torch.tensor(
        [i for i, group in enumerate(captions) for _ in group], device=latents.device
    )
    conditions = base.encode_prompts(prompts)
    return TrainingExamples(
        latents[image_indices][None],  # [1, examples, c, h, w]
        map_tensors(lambda condition: condition[None], conditions),
        [prompts],
    )
