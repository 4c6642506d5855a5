"""Planning: reads every photo of a source once and records what cannot be used."""

import hashlib
from collections.abc import Mapping, Sequence

from data_builder.build.plan import (
    Plan,
    PlannedLora,
    Recipe,
    compute_subject_seed,
    replace_invalid_utf8,
)
from data_builder.sources.crops import CENTER_CROPPER, Cropper
from data_builder.sources.sources import AvatarSource, Source, source_to_dict
from data_builder.sources.types import Photo, SubjectEntry
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.progress import track


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    cropper: Cropper = CENTER_CROPPER,
    loras_per_subject: int = 1,
    val_fraction: float = 0.0,
    num_subjects: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a dataset of LoRAs.

    Args:
        source: Source of the photos.
        recipe: How each LoRA is fitted.
        cropper: Chooses the square of each photo; by default the largest in the middle.
        loras_per_subject: LoRAs of each subject, with different seeds.
        val_fraction: Share of subjects for validation, chosen by name, where the source defines no
            split.
        num_subjects: Number of subjects, the first of the source; None: all.
        metadata: Facts to record in the plan.

    Returns:
        The plan, with reasons for all that was skipped.

    Raises:
        InvalidArgumentError: If the recipe is invalid or no subject can be used.
    """
    recipe.validate()
    skipped, warnings = list[str](), list[str]()
    subjects = list(source.list_subjects(skipped))[:num_subjects]
    rows: list[PlannedLora] = []
    for subject in track(subjects, "reading photos", "subjects", len(subjects)):
        photos = _read_photos(subject, source, cropper, skipped, warnings)
        if not photos:
            skipped.append(f"{subject.name}: no photo of it can be used")
            continue
        split = subject.split or _assign_split(subject.name, val_fraction)
        name = replace_invalid_utf8(subject.name)
        for repetition in range(loras_per_subject):
            seed = compute_subject_seed(recipe.seed, subject.name, repetition)
            rows.append(PlannedLora(name, photos, seed, split, repetition))
    if not rows:
        raise InvalidArgumentError("no subject can be used: " + "; ".join(skipped[:3]))
    return Plan(
        recipe,
        source_to_dict(source),
        tuple(rows),
        tuple(map(replace_invalid_utf8, skipped)),
        tuple(map(replace_invalid_utf8, warnings)),
        dict(metadata or {}),
    )


def _read_photos(
    subject: SubjectEntry,
    source: Source,
    cropper: Cropper,
    skipped: list[str],
    warnings: list[str],
) -> tuple[Photo, ...]:
    """Read the photos of a subject; what cannot be used is appended to ``skipped``."""
    if isinstance(source, AvatarSource):  # rendered when they are needed, always uncropped
        return tuple(Photo(ref, caption=caption) for ref, caption in subject.photos)
    photos: list[Photo] = []
    for ref, caption in subject.photos:
        photo_warnings: list[str] = []
        try:
            image, sha256 = source.read_photo(ref)
            crop_box = cropper(image, photo_warnings)
        except InvalidImageError as error:
            name = subject.name if ref in str(error) else f"{subject.name}, {ref}"
            skipped.append(f"{name}: {error}")
            continue
        warnings += [f"{subject.name}, {ref}: {warning}" for warning in photo_warnings]
        photos.append(Photo(ref, sha256, caption, crop_box))
    return tuple(photos)


def _assign_split(name: str, val_fraction: float) -> str:
    """Choose the split by a hash of the subject's name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    hash_fraction = int.from_bytes(digest[:4], "big") / 2**32
    return "validation" if hash_fraction < val_fraction else "train"


def summarize_plan(plan: Plan) -> Sequence[str]:
    """Summarize a plan in a few lines for the user."""
    num_subjects = len({row.subject for row in plan.rows})
    num_photos = sum(len(row.photos) for row in plan.rows if row.repetition == 0)
    recipe = plan.recipe
    return (
        f"{len(plan.rows)} LoRAs of {num_subjects} subjects ({num_photos} photos) "
        f"in {plan.num_chunks} chunks",
        f"base {recipe.base}, {recipe.parametrization}, rank {recipe.rank}, "
        f"{recipe.finetune_steps} steps, init {recipe.init}",
    )
