"""``PhotoSplit``: the subjects of training or of validation, and what is known of their photos."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from PIL import Image
from torch import Tensor

from hyperlora.data.aspect_buckets import ImageSize, choose_bucket, make_buckets
from hyperlora.data.hub_subjects import HubStream
from hyperlora.data.photos import FilePhoto, Photo, SubjectPhotos
from hyperlora.data.subject_sources import SubjectSource
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.progress import track
from hyperlora.training.datamodules.face_filter import (
    FaceIndex,
    filter_subjects,
    format_counts,
)
from hyperlora.training.datamodules.photo_dataset import GetSize
from hyperlora.training.datamodules.photo_samples import SampleMaker, count_crops
from hyperlora.training.datamodules.photo_stream import StreamFaceCheck
from hyperlora.training.datamodules.target_cache import TargetCache, TargetJob

if TYPE_CHECKING:
    import lightning as L

SinglePhotos = Literal["views", "identical", "skip"]
T = TypeVar("T")
_MAX_REASONS: Final = 5
"""Reasons that are said one by one."""


@dataclass(frozen=True)
class RankShare:
    """The part of a list that one of several processes works on.

    Attributes:
        rank: The process.
        num_ranks: Number of processes.
        trainer: Its trainer; None for a single process.
    """

    rank: int = 0
    num_ranks: int = 1
    trainer: "L.Trainer | None" = None

    @classmethod
    def from_trainer(cls, trainer: "L.Trainer | None") -> "RankShare":
        """Make the share of this process."""
        return cls(trainer.global_rank, trainer.world_size, trainer) if trainer else cls()

    def select(self, items: Sequence[T]) -> Sequence[T]:
        """Select every ``num_ranks``-th item."""
        return items[self.rank :: self.num_ranks]

    def wait(self) -> None:
        """Wait until all processes have come so far."""
        if self.trainer is not None:
            self.trainer.strategy.barrier()


@dataclass
class PhotoSplit:
    """The subjects of training or of validation.

    Attributes:
        subjects: The subjects; empty for a stream.
        maker: Makes samples of them.
        notes: What was found and left out, a sentence each.
        get_size: Returns the size of a photo's bucket; None for squares.
        stream: The stream; None if the subjects are listed.
        face_check: Checks the photos of a stream.
    """

    subjects: list[SubjectPhotos]
    maker: SampleMaker
    notes: list[str] = field(default_factory=list)
    get_size: GetSize | None = None
    stream: HubStream | None = None
    face_check: StreamFaceCheck | None = None

    def add_source_notes(self, source: SubjectSource) -> None:
        """Note how many subjects and photos a source has, how it was read, and what it skipped."""
        num_photos = sum(len(subject.photos) for subject in self.subjects)
        self.notes.append(
            f"{source.name}: {len(self.subjects):,} subjects, {num_photos:,} photos, "
            f"{source.layout_note}."
        )
        reasons = source.skip_reasons
        self.notes += [f"warning: left out: {reason}" for reason in reasons[:_MAX_REASONS]]
        if len(reasons) > _MAX_REASONS:
            self.notes.append(f"warning: left out for like reasons: {len(reasons) - _MAX_REASONS}")

    def add_counts(self, num_photos_by_reason: dict[str, int]) -> None:
        """Note how many photos are left out for which reason; nothing if none are."""
        if num_photos := sum(num_photos_by_reason.values()):
            self.notes.append(
                f"warning: {self.maker.config.source}: {num_photos:,} photos left out, "
                f"{format_counts(num_photos_by_reason)}; {len(self.subjects):,} subjects remain."
            )

    def with_cache(self, cache: TargetCache, jobs: Sequence[TargetJob]) -> "PhotoSplit":
        """Return the split with cached targets, without photos that have none.

        Args:
            cache: The cache, filled by all ranks.
            jobs: What it should hold.
        """
        ids = {job.photo_id for job in jobs if cache.has_latents(job)}
        maker = replace(self.maker, cache=cache)
        subjects, counts = filter_subjects(
            self.subjects, lambda photo: None if maker.get_id(photo) in ids else "cannot be read"
        )
        split = replace(self, subjects=subjects, maker=maker)
        split.add_counts(counts)
        return split


def filter_faces(split: PhotoSplit, index: FaceIndex, share: RankShare) -> PhotoSplit:
    """Leave out photos without one large and sharp face.

    Args:
        split: The subjects.
        index: Detects faces. If it is kept on disk, every rank inspects its share.
        share: The share of this rank.

    Returns:
        The split, with the faces of the photos that are left.

    Raises:
        InvalidArgumentError: No photo is left.
    """
    maker = split.maker
    photos = [(maker.get_id(p), p) for subject in split.subjects for p in subject.photos]
    is_shared = index.folder is not None
    part = share.select(photos) if is_shared else photos
    index.inspect(track(part, "faces", "photos", len(part)))
    if is_shared:
        share.wait()
        index.load()
    records = {photo_id: index.records[photo_id] for photo_id, _ in photos}
    subjects, counts = filter_subjects(
        split.subjects, lambda photo: records[maker.get_id(photo)].reason
    )
    faces = {photo_id: r for photo_id, r in records.items() if r.reason is None}
    filtered = replace(split, subjects=subjects, maker=replace(maker, faces=faces))
    filtered.add_counts(counts)
    return filtered


def add_generated_views(split: PhotoSplit, folder: str) -> PhotoSplit:
    """Add generated images to the references of their subjects.

    Args:
        split: The subjects.
        folder: A sub-folder of images for each subject, by its name.

    Returns:
        The split.

    Raises:
        InvalidArgumentError: No name of a sub-folder is that of a subject.
    """
    root = Path(folder)
    views: Mapping[str, tuple[Photo, ...]] = {
        subject.name: tuple(
            FilePhoto(f"{folder}/{path.relative_to(root)}", None, path) for path in subject.photos
        )
        for subject in list_subjects(root, [], "folders")
    }
    subjects = [
        replace(subject, generated_views=views.get(subject.name, ())) for subject in split.subjects
    ]
    num_matched = sum(bool(subject.generated_views) for subject in subjects)
    if num_matched == 0:
        raise InvalidArgumentError(
            f"no sub-folder of {folder!r} has the name of a subject, as "
            f"{split.subjects[0].name!r}: name them so"
        )
    notes = [*split.notes, f"{folder}: generated views of {num_matched:,} subjects."]
    if num_matched < len(views):
        notes.append(f"warning: {len(views) - num_matched} sub-folders of {folder!r} fit no one.")
    return replace(split, subjects=subjects, notes=notes)


def handle_single_photos(split: PhotoSplit, single_photos: SinglePhotos) -> PhotoSplit:
    """Say how many subjects have one photo only, and leave them out if that is wished.

    Args:
        split: The subjects.
        single_photos: What becomes of them.

    Returns:
        The split.

    Raises:
        InvalidArgumentError: No subject would be left.
    """
    has_one = [len(subject.references) == 1 for subject in split.subjects]
    if not any(has_one):
        return split
    consequence = {
        "views": "reference and target are different crops of it, so LoRAs keep more of the photo "
        "and less of the identity than with several photos",
        "identical": "it is its own target, so the network learns to copy it",
        "skip": "they are left out",
    }[single_photos]
    note = (
        f"warning: {sum(has_one):,} of {len(has_one):,} subjects in {split.maker.config.source} "
        f"have one photo: {consequence}."
    )
    subjects = split.subjects
    if single_photos == "skip":
        subjects = [s for s, is_single in zip(subjects, has_one, strict=True) if not is_single]
        if not subjects:
            raise InvalidArgumentError(
                f"every subject in {split.maker.config.source!r} has one photo: set single_photos "
                "to views, or add photos"
            )
    return replace(split, subjects=subjects, notes=[*split.notes, note])


def assign_buckets(split: PhotoSplit, resolution: int) -> PhotoSplit:
    """Assign each photo to a bucket by the size in its header.

    Args:
        split: The subjects.
        resolution: Side of the square of a bucket's area.

    Returns:
        The split, without photos whose size cannot be read.
    """
    buckets = make_buckets(resolution)
    if split.stream is not None:
        return replace(split, get_size=_StreamSizes(buckets))
    sizes: dict[str, ImageSize] = {}
    photos = [photo for subject in split.subjects for photo in subject.photos]
    for photo in photos:
        try:
            sizes[photo.key] = choose_bucket(photo.read_size(), buckets)
        except InvalidImageError:
            continue
    subjects, counts = filter_subjects(
        split.subjects, lambda photo: None if photo.key in sizes else "cannot be read"
    )
    counts_by_size = Counter(sizes.values())
    size_counts = [f"{w}×{h}: {counts_by_size[w, h]}" for w, h in sorted(counts_by_size)]
    bucketed = replace(
        split,
        subjects=subjects,
        get_size=_KnownSizes(sizes),
        notes=[*split.notes, f"{split.maker.config.source}: buckets {', '.join(size_counts)}."],
    )
    bucketed.add_counts(counts)
    return bucketed


@dataclass(frozen=True)
class _KnownSizes:
    """Buckets by the key of a photo."""

    sizes: Mapping[str, ImageSize]

    def __call__(self, photo: Photo) -> ImageSize:
        return self.sizes[photo.key]


@dataclass(frozen=True)
class _StreamSizes:
    """Buckets of photos that pass by."""

    buckets: list[ImageSize]

    def __call__(self, photo: Photo) -> ImageSize:
        return choose_bucket(photo.read_size(), self.buckets)


def list_target_jobs(split: PhotoSplit) -> tuple[list[TargetJob], list[str]]:
    """List the latents and the prompts that a cache must hold.

    Args:
        split: The subjects.

    Returns:
        A job for each photo, and the prompts without repetition.
    """
    maker, resolution = split.maker, split.maker.config.resolution
    jobs, prompts = [], []
    for subject in split.subjects:
        num_crops = count_crops(subject, maker.config)
        for photo in subject.photos:
            size = split.get_size(photo) if split.get_size else (resolution, resolution)
            make_crop = _CropMaker(maker, photo, size)
            settings = maker.get_cache_settings(size)
            jobs.append(TargetJob(maker.get_id(photo), photo, num_crops, make_crop, settings))
            prompts.append(maker.make_caption(photo))
    return jobs, list(dict.fromkeys(prompts))


@dataclass(frozen=True)
class _CropMaker:
    """Makes crop k of a photo."""

    maker: SampleMaker
    photo: Photo
    size: ImageSize

    def __call__(self, image: Image.Image, crop_number: int) -> Tensor:
        return self.maker.make_target(self.photo, image, self.size, crop_number)
