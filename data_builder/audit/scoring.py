"""How much a row's pictures look like its subject: drawn with the LoRA, read by an evaluator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from data_builder.build.plan import Plan, Planned
from data_builder.sources.crops import centre, cut
from data_builder.sources.sources import Source, opened
from hyperlora.data.images import pixels_of, to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.text_to_image import render
from hyperlora.encoders.attribute_classifier import Reader, read_in_batches
from hyperlora.errors import BadImage
from hyperlora.evaluation.metrics import IdentityScale
from hyperlora.progress import track


@dataclass(frozen=True)
class Drawn:
    """Row ``row``: a photo of its subject, and pictures drawn with its LoRA."""

    row: int
    photo: Image.Image | None
    pictures: tuple[Image.Image, ...]


def draw_rows(
    plan: Plan, dataset: LoraDataset, base: Base, rows: Sequence[int], prompts: int = 2, steps: int = 12, batch: int = 8
) -> list[Drawn]:
    """``prompts`` pictures for each of ``rows`` under the first template and the captions of its photos."""
    planned = {(row.subject, row.view): row for row in plan.rows}
    source, out = opened(plan.source), []
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    for some in track(batches, "drawing", "rows", len(rows), batch):
        wanted = [planned[dataset.records[i].subject, dataset.records[i].view] for i in some]
        texts = [_prompts(row, plan, prompts) for row in wanted]
        lora = dataset.lora([i for i in some for _ in range(prompts)])
        lora = lora.map(lambda t: t.to(base.pipeline.device))
        pictures = render(base, [t for group in texts for t in group], lora, seeds=list(range(prompts)) * len(some),
                          steps=steps)  # fmt: skip
        for place, (i, row) in enumerate(zip(some, wanted, strict=True)):
            own = tuple(pictures[place * prompts : (place + 1) * prompts])
            out.append(Drawn(i, _photo(row, source, base.resolution), own))
    return out


def likeness(drawn: Sequence[Drawn], reader: Reader) -> dict[int, float]:
    """Identity score by row (0 anyone, 1 as good as a real portrait of the subject, on photos of one each: as good as
    the photo itself). Rows without a readable photo, and fewer than two rows, have none."""
    usable = [d for d in drawn if d.photo is not None]
    if len(usable) < 2:
        return {}
    real = torch.stack([to_tensor(d.photo, reader.encoder.image_size) for d in usable if d.photo is not None])
    scale = IdentityScale.of(read_in_batches(reader, real).identity[:, None])
    made = read_in_batches(reader, pixels_of([p for d in usable for p in d.pictures])).identity
    scores = scale.score(made.unflatten(0, (len(usable), -1)))
    return {d.row: float(score) for d, score in zip(usable, scores, strict=True)}


def _prompts(row: Planned, plan: Plan, n: int) -> list[str]:
    captions = [photo.caption for photo in row.photos if photo.caption] + list(plan.recipe.templates)
    return [captions[i % len(captions)].replace("{}", plan.recipe.identifier) for i in range(n)]


def _photo(row: Planned, source: Source, size: int) -> Image.Image | None:
    for photo in row.photos:
        try:
            image, _ = source.read(photo.ref)
        except BadImage:
            continue
        return cut(image, photo.square or centre(image), size)
    return None
