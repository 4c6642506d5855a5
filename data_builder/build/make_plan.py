"""From a source to a plan: every photo is opened once, what cannot be used is named."""

import hashlib
from collections.abc import Mapping, Sequence

from data_builder.build.plan import Plan, Planned, Recipe, printable, seed_of
from data_builder.sources.crops import Crop, centre
from data_builder.sources.sources import Avatars, Source, to_dict
from data_builder.sources.types import Listed, Photo
from hyperlora.errors import BadImage, BadRequest
from hyperlora.progress import track


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    crop: Crop | None = None,
    views: int = 1,
    validation: float = 0.0,
    limit: int | None = None,
    notes: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for all subjects of ``source``, ``views`` LoRAs of each; what is skipped is listed with its reason.

    A fraction of the subjects is for ``validation`` (by their names) where the source does not say. Raises
    ``BadRequest`` if no subject is left.
    """
    recipe.check()
    skipped, remarks = list[str](), list[str]()
    found = list(source.subjects(skipped))[:limit]
    rows: list[Planned] = []
    for subject in track(found, "reading photos", "subjects", len(found)):
        photos = _photos(subject, source, crop, skipped, remarks)
        if not photos:
            skipped.append(f"{subject.name}: no photo of it can be used")
            continue
        split = subject.split or _split(subject.name, validation)
        rows += [
            Planned(printable(subject.name), photos, seed_of(recipe.seed, subject.name, view), split, view)
            for view in range(views)
        ]
    if not rows:
        raise BadRequest("no subject can be used: " + "; ".join(skipped[:3]))
    return Plan(
        recipe,
        to_dict(source),
        tuple(rows),
        tuple(map(printable, skipped)),
        tuple(map(printable, remarks)),
        dict(notes or {}),
    )


def _photos(
    subject: Listed, source: Source, crop: Crop | None, skipped: list[str], remarks: list[str]
) -> tuple[Photo, ...]:
    if isinstance(source, Avatars):  # drawn when they are needed, always whole
        return tuple(Photo(ref, caption=caption) for ref, caption in subject.photos)
    photos: list[Photo] = []
    for ref, caption in subject.photos:
        said: list[str] = []
        try:
            image, digest = source.read(ref)
            square = crop(image, said) if crop is not None else centre(image)
        except BadImage as error:
            skipped.append(f"{subject.name}: {error}" if ref in str(error) else f"{subject.name}, {ref}: {error}")
            continue
        remarks += [f"{subject.name}, {ref}: {remark}" for remark in said]
        photos.append(Photo(ref, digest, caption, square))
    return tuple(photos)


def _split(name: str, validation: float) -> str:
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32
    return "validation" if place < validation else "train"


def summary(plan: Plan) -> Sequence[str]:
    """What was planned, one line each."""
    subjects, photos = len({r.subject for r in plan.rows}), sum(len(r.photos) for r in plan.rows if r.view == 0)
    recipe = plan.recipe
    return (
        f"{len(plan.rows)} LoRAs of {subjects} subjects ({photos} photos) in {plan.chunks} chunks",
        f"base {recipe.base}, {recipe.space}, rank {recipe.rank}, {recipe.steps} steps, start {recipe.start}",
    )
