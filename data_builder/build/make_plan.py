"""From a source to a plan: every photo is opened once, what cannot be used is named."""

import hashlib
from collections.abc import Mapping, Sequence

from data_builder.build.plan import (
    Plan,
    PlannedLora,
    Recipe,
    compute_subject_seed,
    replace_invalid_utf8,
)
from data_builder.sources.crops import Cropper, compute_center_box
from data_builder.sources.sources import AvatarSource, Source, source_to_dict
from data_builder.sources.types import Photo, SubjectEntry
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.progress import track


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    cropper: Cropper | None = None,
    loras_per_subject: int = 1,
    val_fraction: float = 0.0,
    num_subjects: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for all subjects of ``source``, ``loras_per_subject`` LoRAs of each; what is skipped is listed with its reason.

    A fraction of the subjects is for ``val_fraction`` (by their names) where the source does not say. Raises
    ``InvalidArgumentError`` if no subject is left.
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
        rows += [
            PlannedLora(
                replace_invalid_utf8(subject.name),
                photos,
                compute_subject_seed(recipe.seed, subject.name, view),
                split,
                view,
            )
            for view in range(loras_per_subject)
        ]
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
    cropper: Cropper | None,
    skipped: list[str],
    warnings: list[str],
) -> tuple[Photo, ...]:
    if isinstance(source, AvatarSource):  # drawn when they are needed, always whole
        return tuple(Photo(ref, caption=caption) for ref, caption in subject.photos)
    photos: list[Photo] = []
    for ref, caption in subject.photos:
        photo_warnings: list[str] = []
        try:
            image, digest = source.read_photo(ref)
            crop_box = (
                cropper(image, photo_warnings) if cropper is not None else compute_center_box(image)
            )
        except InvalidImageError as error:
            skipped.append(
                f"{subject.name}: {error}"
                if ref in str(error)
                else f"{subject.name}, {ref}: {error}"
            )
            continue
        warnings += [f"{subject.name}, {ref}: {remark}" for remark in photo_warnings]
        photos.append(Photo(ref, digest, caption, crop_box))
    return tuple(photos)


def _assign_split(name: str, val_fraction: float) -> str:
    hash_fraction = (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big")
        / 2**32
    )
    return "validation" if hash_fraction < val_fraction else "train"


def summarize_plan(plan: Plan) -> Sequence[str]:
    """What was planned, one line each."""
    subjects, photos = (
        len({r.subject for r in plan.rows}),
        sum(len(r.photos) for r in plan.rows if r.repetition == 0),
    )
    recipe = plan.recipe
    return (
        f"{len(plan.rows)} LoRAs of {subjects} subjects ({photos} photos) in {plan.num_chunks} chunks",
        f"base {recipe.base}, {recipe.parametrization}, rank {recipe.rank}, {recipe.finetune_steps} steps, start {recipe.init}",
    )
