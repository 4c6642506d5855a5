"""How much a row's pictures look like its subject: drawn with the LoRA, read by an evaluator."""

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
    """Row ``row``: a photo of its subject, and pictures drawn with its LoRA."""

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
    """``images_per_row`` pictures for each of ``evaluate_suite`` under the first template and the captions of its photos."""
    planned_by_key = {(row.subject, row.repetition): row for row in plan.rows}
    source, results = source_from_dict(plan.source), []
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for row_batch in track(batches, "drawing", "rows", len(rows), batch_size):
        planned_loras = [
            planned_by_key[dataset.records[i].subject, dataset.records[i].repetition]
            for i in row_batch
        ]
        prompts_by_row = [_make_prompts(row, plan, images_per_row) for row in planned_loras]
        lora = dataset.get_weights([i for i in row_batch for _ in range(images_per_row)])
        lora = lora.apply(lambda t: t.to(base.pipeline.device))
        batch_images = generate_images(
            base,
            [t for group in prompts_by_row for t in group],
            lora,
            seeds=list(range(images_per_row)) * len(row_batch),
            num_inference_steps=num_inference_steps,
        )
        for position, (i, row) in enumerate(zip(row_batch, planned_loras, strict=True)):
            images = tuple(
                batch_images[position * images_per_row : (position + 1) * images_per_row]
            )
            results.append(RowImages(i, _load_photo(row, source, base.resolution), images))
    return results


def compute_identity_scores(
    row_images: Sequence[RowImages], classifier: AttributeClassifier
) -> dict[int, float]:
    """Identity score by row (0 anyone, 1 as good as a real portrait of the subject, on photos of one each: as good as
    the photo itself). Rows without a readable photo, and fewer than two rows, have none."""
    usable = [d for d in row_images if d.photo is not None]
    if len(usable) < 2:
        return {}
    real = torch.stack(
        [to_tensor(d.photo, classifier.encoder.image_size) for d in usable if d.photo is not None]
    )
    scale = IdentityScale.from_embeddings(predict_in_batches(classifier, real).identity[:, None])
    generated = predict_in_batches(
        classifier, stack_images([p for d in usable for p in d.images])
    ).identity
    scores = scale.compute_score(generated.unflatten(0, (len(usable), -1)))
    return {d.row: float(score) for d, score in zip(usable, scores, strict=True)}


def _make_prompts(row: PlannedLora, plan: Plan, num_prompts: int) -> list[str]:
    captions = [photo.caption for photo in row.photos if photo.caption] + list(
        plan.recipe.prompt_templates
    )
    return [
        captions[i % len(captions)].replace("{}", plan.recipe.identifier)
        for i in range(num_prompts)
    ]


def _load_photo(row: PlannedLora, source: Source, resolution: int) -> Image.Image | None:
    for photo in row.photos:
        try:
            image, _ = source.read_photo(photo.ref)
        except InvalidImageError:
            continue
        return crop_image(image, photo.crop_box or compute_center_box(image), resolution)
    return None
