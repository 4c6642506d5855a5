"""Subject benchmarks on disk: a folder of photos per subject, and prompts with their true
attributes.

subjects/NAME/*.png|jpg|webp  sorted; the first half is for conditioning, the second for comparison
prompts.json                  [{"prompt": "...", "truth": {attribute: class}}, ...]

The truth of a prompt may be missing.
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
    """A prompt of a benchmark.

    Attributes:
        prompt: Text of the prompt.
        truth: Class of each attribute that the prompt asks for; empty if unknown.
    """

    prompt: str
    truth: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """Photos of subjects and prompts.

    Attributes:
        names: Name of each subject.
        photos: Photos for conditioning [subjects, views, 3, size, size] in [0, 1].
        comparison_photos: Photos to compare identities with [subjects, views, 3, size, size].
        prompts: Prompts, the same for all subjects.
    """

    names: tuple[str, ...]
    photos: Tensor
    comparison_photos: Tensor
    prompts: tuple[Prompt, ...]

    @property
    def has_truth(self) -> bool:
        """Whether every prompt has a truth."""
        return all(prompt.truth for prompt in self.prompts)


def load_benchmark(
    folder: str | os.PathLike[str], image_size: int, max_subjects: int | None = None
) -> Benchmark:
    """Load a benchmark, or any folder of subjects, which then gets general prompts.

    Args:
        folder: Folder of ``subjects/`` and ``prompts.json``, or of subjects.
        image_size: Side of the photos in pixels.
        max_subjects: Number of subjects, the first by name; None: all.

    Returns:
        The benchmark; every subject has as many photos as the one with fewest.

    Raises:
        InvalidArgumentError: If a subject has one photo only, or ``prompts.json`` is malformed.
    """
    folder = Path(folder)
    subjects_dir = folder / "subjects"
    subjects = list_subjects(subjects_dir if subjects_dir.is_dir() else folder)[:max_subjects]
    smallest_subject = min(subjects, key=lambda subject: len(subject.photos))
    num_photos = len(smallest_subject.photos)
    if num_photos < 2:
        raise InvalidArgumentError(
            f"subject {smallest_subject.name!r} has one photo, at least 2 expected: "
            "one to condition on and one to compare with"
        )
    pixels = torch.stack(
        [
            torch.stack(
                [to_tensor(read_image(path), image_size) for path in subject.photos[:num_photos]]
            )
            for subject in subjects
        ]
    )  # [subjects, photos, 3, size, size]
    return Benchmark(
        tuple(subject.name for subject in subjects),
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
