"""Identity scores of rows: images are generated with each LoRA and compared with photos by an
evaluator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from data_builder.build.plan import Plan, PlannedLora
from data_builder.sources.crops import compute_center_box, crop_image
from data_builder.sources.sources import Source, source_from_dict
from hyperlora.data.images import stack_images, to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.errors import InvalidImageError
from hyperlora.evaluation.metrics import IdentityScale
from hyperlora.progress import track


@dataclass(frozen=True)
class RowImages:
    """Images of one row.

    Attributes:
        row: Number of the row.
        photo: Photo of the subject; None if none can be read.
        images: Images generated with the LoRA.
    """

    row: int
    photo: Image.Image | None
    images: tuple[Image.Image, ...]


def render_rows(
    plan: Plan,
    dataset: LoraDataset,
    base: DiffusionBase,
    rows: Sequence[int],
    images_per_row: int = 2,
    num_inference_steps: int = 12,
    batch_size: int = 8,
) -> list[RowImages]:
    """Generate images with the LoRAs of some rows, under the captions of their photos and the
    templates.

    Args:
        plan: Plan of the build.
        dataset: Rows of the build.
        base: Base model.
        rows: Rows to generate images for.
        images_per_row: Images of each row, with seeds 0, 1, ...
        num_inference_steps: Denoising steps.
        batch_size: Rows per batch.

    Returns:
        Images in the order of ``rows``.
    """
    planned_by_key = {(row.subject, row.repetition): row for row in plan.rows}
    source = source_from_dict(plan.source)
    results = []
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for row_batch in track(batches, "drawing", "rows", len(rows), batch_size):
        planned_loras = [
            planned_by_key[dataset.records[i].subject, dataset.records[i].repetition]
            for i in row_batch
        ]
        prompts = [
            prompt for row in planned_loras for prompt in _make_prompts(row, plan, images_per_row)
        ]
        loras = dataset.get_weights([i for i in row_batch for _ in range(images_per_row)])
        batch_images = generate_images(
            base,
            prompts,
            loras,
            seeds=list(range(images_per_row)) * len(row_batch),
            num_inference_steps=num_inference_steps,
        )
        for position, (i, row) in enumerate(zip(row_batch, planned_loras, strict=True)):
            first = position * images_per_row
            images = tuple(batch_images[first : first + images_per_row])
            results.append(RowImages(i, _load_photo(row, source, base.resolution), images))
    return results


def compute_identity_scores(
    row_images: Sequence[RowImages], classifier: AttributeClassifier
) -> dict[int, float]:
    """Compute the identity score of rows: 0 for another subject, 1 for a real photo of the subject.

    Args:
        row_images: Images of each row.
        classifier: Evaluator with an identity embedding.

    Returns:
        Score by row. Rows without a readable photo have none, nor has a single row.
    """
    usable = [
        (images.row, images.photo, images.images)
        for images in row_images
        if images.photo is not None
    ]
    if len(usable) < 2:
        return {}
    image_size = classifier.encoder.image_size
    real = torch.stack([to_tensor(photo, image_size) for _, photo, _ in usable])  # [n, 3, h, w]
    real_embeddings = predict_in_batches(classifier, real).identity[:, None]  # [n, 1, width]
    scale = IdentityScale.from_embeddings(real_embeddings)
    generated = stack_images([image for _, _, images in usable for image in images])
    embeddings = predict_in_batches(classifier, generated).identity.unflatten(0, (len(usable), -1))
    scores = scale.compute_score(embeddings)  # [n]
    return {row: float(score) for (row, _, _), score in zip(usable, scores, strict=True)}


def _make_prompts(row: PlannedLora, plan: Plan, num_prompts: int) -> list[str]:
    """Make the prompts of a row."""
    captions = [photo.caption for photo in row.photos if photo.caption] + list(
        plan.recipe.prompt_templates
    )
    return [
        captions[i % len(captions)].replace("{}", plan.recipe.identifier)
        for i in range(num_prompts)
    ]


def _load_photo(row: PlannedLora, source: Source, resolution: int) -> Image.Image | None:
    """Load the first readable photo of a subject."""
    for photo in row.photos:
        try:
            image, _ = source.read_photo(photo.ref)
        except InvalidImageError:
            continue
        return crop_image(image, photo.crop_box or compute_center_box(image), resolution)
    return None
