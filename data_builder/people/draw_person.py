"""Draw one person: a reference with a face, images that keep it, and which of them agree."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from data_builder.people.config import PeopleConfig
from data_builder.people.face_matcher import FaceMatcher, is_avatar_base
from data_builder.people.identity_keeper import IdentityKeeper
from data_builder.people.person_prompt import (
    DEFAULT_SCENES,
    SUBJECT_PLACEHOLDER,
    PersonPrompt,
    get_person_prompt,
    sample_person_prompt,
)
from hyperlora.errors import InvalidImageError

MAX_REFERENCES: Final = 5
"""References of a person that are drawn, with other seeds, until one shows a face."""
NO_FACE: Final = "no face"
NO_FACE_IN_REFERENCE: Final = "no face in the reference"
TOO_FEW_IMAGES: Final = "too few images agree"


@dataclass(frozen=True)
class ImageRecord:
    """An image that was drawn of a person.

    Attributes:
        prompt: Its prompt.
        seed: Seed of its noise.
        similarity: Cosine of its face embedding and the reference's; None without a face.
        file: Name in the person's folder; None if it was dropped.
        reason: Why it was dropped; empty if it was kept.
    """

    prompt: str
    seed: int
    similarity: float | None
    file: str | None
    reason: str = ""


@dataclass(frozen=True)
class PersonRecord:
    """A person in ``people.jsonl``.

    Attributes:
        person: Name of the person and of its folder.
        kept: Whether the folder is there.
        reason: Why the person was dropped; empty if it was kept.
        prompt: Prompt of the reference.
        seed: Seed of the reference, the last one that was drawn.
        num_references: References that were drawn until one showed a face.
        images: The images besides the reference.
        duration_s: Seconds that the person took.
    """

    person: str
    kept: bool
    reason: str
    prompt: str
    seed: int
    num_references: int
    images: tuple[ImageRecord, ...]
    duration_s: float


@dataclass(frozen=True)
class DrawnPerson:
    """A person with its images.

    Attributes:
        record: What ``people.jsonl`` says of it.
        images: The reference and the images that agree, as their files are numbered; empty if the
            person was dropped.
        captions: The caption of each, with ``{}`` for the subject.
    """

    record: PersonRecord
    images: tuple[Image.Image, ...] = ()
    captions: tuple[str, ...] = ()


def make_person_name(number: int) -> str:
    """Make the name of a person and of its folder."""
    return f"person-{number:05d}"


def make_scenes(config: PeopleConfig, keeper: IdentityKeeper) -> Sequence[str]:
    """Choose the scenes: the user's, those that the model knows, or the built-in ones.

    Args:
        config: The settings.
        keeper: What keeps identities.

    Returns:
        At least one scene.
    """
    return config.scenes or tuple(keeper.scenes) or DEFAULT_SCENES


def draw_person(
    number: int, config: PeopleConfig, keeper: IdentityKeeper, matcher: FaceMatcher
) -> DrawnPerson:
    """Draw a person, which depends on the settings and its own number alone.

    Args:
        number: Number of the person.
        config: The settings.
        keeper: What draws, and keeps the identity of the reference.
        matcher: What compares faces.

    Returns:
        The person, kept or not.
    """
    start_time = time.perf_counter()
    person_prompt = _make_person_prompt(number, config)
    reference, embedding, num_references = None, None, 0
    while embedding is None and num_references < MAX_REFERENCES:
        seed = _compute_seed(config.seed, number, f"reference {num_references}")
        (reference,) = keeper.draw_images([person_prompt.prompt], [seed])
        embedding = matcher.embed_face(reference)
        num_references += 1

    def make_record(reason: str, images: tuple[ImageRecord, ...] = ()) -> PersonRecord:
        return PersonRecord(
            make_person_name(number),
            not reason,
            reason,
            person_prompt.prompt,
            seed,
            num_references,
            images,
            round(time.perf_counter() - start_time, 3),
        )

    if reference is None or embedding is None:
        return DrawnPerson(make_record(NO_FACE_IN_REFERENCE))
    scenes = _choose_scenes(number, config, keeper)
    prompts = [keeper.make_prompt(person_prompt.noun, scene) for scene in scenes]
    seeds = [_compute_seed(config.seed, number, f"image {i}") for i in range(len(scenes))]
    try:
        images = keeper.draw_images(prompts, seeds, reference)
    except InvalidImageError as error:  # a model with a face detector of its own
        return DrawnPerson(make_record(f"the model cannot use the reference: {error}"))
    records, agreeing = _match_images(images, prompts, seeds, embedding, config, matcher)
    if len(agreeing) < config.num_required_images:
        dropped_files = tuple(
            ImageRecord(r.prompt, r.seed, r.similarity, None, r.reason or TOO_FEW_IMAGES)
            for r in records
        )
        return DrawnPerson(make_record(TOO_FEW_IMAGES, dropped_files))
    captions = [f"a portrait of {SUBJECT_PLACEHOLDER}, {scenes[i]}" for i in agreeing]
    return DrawnPerson(
        make_record("", records),
        (reference, *(images[i] for i in agreeing)),
        (person_prompt.caption, *captions),
    )


def _match_images(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    embedding: np.ndarray,
    config: PeopleConfig,
    matcher: FaceMatcher,
) -> tuple[tuple[ImageRecord, ...], list[int]]:
    """Compare n images with the reference's embedding [width]; also which of them agree."""
    records: list[ImageRecord] = []
    agreeing: list[int] = []
    for i, image in enumerate(images):
        image_embedding = matcher.embed_face(image)
        if image_embedding is None:
            records.append(ImageRecord(prompts[i], seeds[i], None, None, NO_FACE))
            continue
        similarity = round(float(image_embedding @ embedding), 4)
        if similarity < config.min_similarity:
            reason = f"similarity below {config.min_similarity:g}"
            records.append(ImageRecord(prompts[i], seeds[i], similarity, None, reason))
            continue
        agreeing.append(i)
        # 0.png is the reference
        records.append(ImageRecord(prompts[i], seeds[i], similarity, f"{len(agreeing)}.png"))
    return tuple(records), agreeing


def _make_person_prompt(number: int, config: PeopleConfig) -> PersonPrompt:
    """The prompt of a person: a line of the user's, or sampled attributes."""
    if config.prompts:
        return get_person_prompt(config.prompts, number)
    return sample_person_prompt(config.seed, number, is_avatar_base(config.base))


def _choose_scenes(number: int, config: PeopleConfig, keeper: IdentityKeeper) -> list[str]:
    """The scenes of a person's images; the next person goes on in the list."""
    scenes, n = make_scenes(config, keeper), config.images_per_person
    return [scenes[(number * n + i) % len(scenes)] for i in range(n)]


def _compute_seed(seed: int, number: int, purpose: str) -> int:
    """A seed below 2^48 that depends on no other person."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
