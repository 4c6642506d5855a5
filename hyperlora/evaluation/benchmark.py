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
from hyperlora.data.subjects import subjects_in
from hyperlora.errors import BadRequest

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
    """``photos`` [subjects, conditioning views, 3, size, size] and ``others`` [subjects, views, 3, size, size]."""

    names: tuple[str, ...]
    photos: Tensor
    others: Tensor
    prompts: tuple[Prompt, ...]

    @property
    def has_truth(self) -> bool:
        return all(p.truth for p in self.prompts)


def load_benchmark(folder: str | os.PathLike[str], size: int, limit: int | None = None) -> Benchmark:
    """Read a benchmark, or any folder of subjects with at least two photos each (its prompts are then general ones).

    Raises ``BadRequest`` if a subject has a single photo: half are for conditioning, the others for comparison.
    """
    folder = Path(folder)
    inside = folder / "subjects"
    subjects = subjects_in(inside if inside.is_dir() else folder)[:limit]
    fewest = min(subjects, key=lambda s: len(s.photos))
    n = len(fewest.photos)
    if n < 2:
        raise BadRequest(f"subject {fewest.name!r} has one photo, at least 2 expected: to condition on and to compare")
    pixels = torch.stack([torch.stack([to_tensor(read_image(p), size) for p in s.photos[:n]]) for s in subjects])
    return Benchmark(
        tuple(s.name for s in subjects), pixels[:, : n // 2], pixels[:, n // 2 :], _prompts(folder / "prompts.json")
    )


def _prompts(file: Path) -> tuple[Prompt, ...]:
    if not file.is_file():
        return tuple(Prompt(text, {}) for text in DEFAULT_PROMPTS)
    try:
        found = tuple(Prompt(str(item["prompt"]), dict(item.get("truth", {}))) for item in json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRequest(f'{str(file)!r} is no list of {{"prompt": "...", "truth": {{...}}}}: correct it') from error
    if not found:
        raise BadRequest(f"{str(file)!r} holds no prompt: write one, or remove the file for general prompts")
    return found
