"""A benchmark on disk: folders of photos, one per subject, and prompts with the truth they ask for.

subjects/NAME/*.png|jpg|webp     sorted; the first half is for conditioning, the rest is for comparison
prompts.json                     [{"prompt": "...", "truth": {attribute: class}}, ...]; truth may be missing
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError

DEFAULT_PROMPTS = (
    "a portrait of sks person",
    "a portrait of sks person, smiling",
    "a portrait of sks person wearing sunglasses",
    "a portrait of sks person in a red hoodie",
)


@dataclass(frozen=True)
class Prompt:
    prompt: str
    truth: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """``load_photos`` [subjects, conditioning views, 3, size, size] and ``comparison_photos`` [subjects, views, 3, size, size]."""

    names: tuple[str, ...]
    photos: Tensor
    comparison_photos: Tensor
    prompts: tuple[Prompt, ...]

    @property
    def has_truth(self) -> bool:
        return all(p.truth for p in self.prompts)


def load_benchmark(
    folder: str | os.PathLike[str], image_size: int, max_subjects: int | None = None
) -> Benchmark:
    """Read a benchmark, or any folder of subjects with at least two photos each (its prompts are then general ones).

    Raises ``InvalidArgumentError`` if a subject has a single photo: half are for conditioning, the others for comparison.
    """
    folder = Path(folder)
    subjects_dir = folder / "subjects"
    subjects = list_subjects(subjects_dir if subjects_dir.is_dir() else folder)[:max_subjects]
    smallest_subject = min(subjects, key=lambda s: len(s.photos))
    num_photos = len(smallest_subject.photos)
    if num_photos < 2:
        raise InvalidArgumentError(
            f"subject {smallest_subject.name!r} has one photo, at least 2 expected: to condition on and to compare"
        )
    pixels = torch.stack(
        [
            torch.stack([to_tensor(read_image(p), image_size) for p in s.photos[:num_photos]])
            for s in subjects
        ]
    )
    return Benchmark(
        tuple(s.name for s in subjects),
        pixels[:, : num_photos // 2],
        pixels[:, num_photos // 2 :],
        _load_prompts(folder / "prompts.json"),
    )


def _load_prompts(path: Path) -> tuple[Prompt, ...]:
    if not path.is_file():
        return tuple(Prompt(text, {}) for text in DEFAULT_PROMPTS)
    try:
        prompts = tuple(
            Prompt(str(item["prompt"]), dict(item.get("truth", {})))
            for item in json.loads(path.read_text())
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgumentError(
            f'{str(path)!r} is no list of {{"prompt": "...", "truth": {{...}}}}: correct it'
        ) from error
    if not prompts:
        raise InvalidArgumentError(
            f"{str(path)!r} holds no prompt: write one, or remove the file for general prompts"
        )
    return prompts
