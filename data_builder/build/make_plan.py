"""Planning: reads every photo of a source once and records what cannot be used."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

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
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError, InvalidImageError, ModelLoadError
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
            seed_name = "" if recipe.shared_noise else subject.name
            seed = compute_subject_seed(recipe.seed, seed_name, repetition)
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


def check_recipe_base(recipe: Recipe) -> None:
    """Check that a base can be fitted as a recipe says, from the base's configuration alone.

    Args:
        recipe: The recipe.

    Raises:
        InvalidArgumentError: The preset matches nothing, or no target can have the rank.
        ModelLoadError: The base is a folder without a pipeline.
    """
    from hyperlora.training.known_bases import KNOWN_BASES, make_meta_base

    folder = Path(recipe.base)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelLoadError(
            f"{folder} is no diffusers pipeline: model_index.json expected, none found; give --base"
        )
    if not folder.exists() and recipe.base not in KNOWN_BASES:
        return  # of the hub, and read when the plan runs
    try:
        meta_base = make_meta_base(recipe.base)
    except KeyError as error:
        raise InvalidArgumentError(
            f"base {recipe.base!r} is a pipeline without a supported {error}: give another --base"
        ) from error
    components: Mapping[str, nn.Module] = {meta_base.family.denoiser_name: meta_base.denoiser}
    layout = make_layout(components, recipe.denoiser_preset, recipe.rank, recipe.base)
    if recipe.inner_rank is not None:
        layout.check_rank(recipe.inner_rank, "inner-rank")


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
