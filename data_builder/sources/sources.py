"""Sources of photos: the avatar world, a folder, a Hugging Face dataset."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from PIL import Image

from data_builder.sources.types import SourceConfig, SubjectEntry
from hyperlora.data.captions import CAPTION_COLUMNS, parse_caption
from hyperlora.data.hub_dataset import is_saved_dataset, load_hub_dataset
from hyperlora.data.hub_subjects import IMAGE_COLUMNS
from hyperlora.data.images import read_image
from hyperlora.data.photos import get_cell_bytes
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.paths import find_path

if TYPE_CHECKING:
    from datasets import Dataset

SUBJECT_COLUMNS: Final = ("subject", "identity", "celeb_id", "person", "label", "name", "id")
_PHOTO_COLUMN: Final = "_photo"
"""Name of the image column once it is found: its own name may be used by another role."""


@dataclass(frozen=True)
class AvatarSource:
    """Rendered portraits of the avatar world. Captions are the prompts of the scenes.

    Attributes:
        first_seed: Seed of the first identity.
        end_seed: Seed after the last identity.
        portraits_per_identity: Portraits of each identity.
        resolution: Side of the portraits in pixels.
    """

    kind: ClassVar[str] = "avatars"
    first_seed: int
    end_seed: int
    portraits_per_identity: int = 4
    resolution: int = 128

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
        """List the identities in order of their seeds; ``skipped`` stays as it is."""
        from data_builder.avatars.captions import build_prompt
        from data_builder.avatars.identity import SPLITS, sample_scene

        for seed in range(self.first_seed, self.end_seed):
            split = next((name for name, seeds in SPLITS.items() if seed in seeds), "train")
            photos = tuple(
                (f"{seed}/{k}", build_prompt(sample_scene(seed, k)))
                for k in range(self.portraits_per_identity)
            )
            yield SubjectEntry(f"person-{seed}", photos, split)

    def read_photo(self, ref: str) -> tuple[Image.Image, str]:
        """Render the portrait ``seed/number``.

        Returns:
            The image and the SHA-256 of its pixels.
        """
        from data_builder.avatars.identity import sample_identity, sample_scene
        from data_builder.avatars.rendering import render_portrait

        seed, number = map(int, ref.split("/"))
        image = render_portrait(sample_identity(seed), sample_scene(seed, number), self.resolution)
        return image, hashlib.sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class FolderSource:
    """A folder of images, one subject each, or of sub-folders with several photos of one subject.

    Attributes:
        path: Folder of images.
    """

    kind: ClassVar[str] = "folder"
    path: str

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
        """List the subjects by name; appends what cannot be used to ``skipped``."""
        for subject in list_subjects(self.path, skipped):
            refs = [str(path.relative_to(self.path)) for path in subject.photos]
            yield SubjectEntry(subject.name, tuple(zip(refs, subject.captions, strict=True)))

    def read_photo(self, ref: str) -> tuple[Image.Image, str]:
        """Read a photo by its path relative to the folder.

        Returns:
            The image and the SHA-256 of its file.

        Raises:
            InvalidImageError: If the file is no readable image.
        """
        path = Path(self.path) / ref
        image = read_image(path)
        return image, hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A Hugging Face dataset. Columns that are not given are found by their usual names.

    Attributes:
        path: Hub id, folder of Parquet files, or folder of ``save_to_disk``.
        split: Split of the dataset.
        image_column: Column of images.
        subject_column: Column that names subjects. Without one, every row is a subject.
        caption_column: Column of captions.
    """

    kind: ClassVar[str] = "hub"
    path: str
    split: str = "train"
    image_column: str | None = None
    subject_column: str | None = None
    caption_column: str | None = None

    @cached_property
    def _rows(self) -> "Dataset":
        rows = load_hub_dataset(self.path, self.split, "photos")
        column = _find_column(rows.column_names, self.image_column, IMAGE_COLUMNS)
        if column is None:
            raise InvalidArgumentError(
                f"{self.path!r} has the columns {', '.join(rows.column_names)}, none of which is "
                "known to hold images: name it with --image-column"
            )
        import datasets

        encoded = rows.cast_column(column, datasets.Image(decode=False))
        return encoded.rename_column(column, _PHOTO_COLUMN)

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
        """List the subjects in order of their first row; ``skipped`` stays as it is."""
        rows = self._rows
        subject_key = _find_column(rows.column_names, self.subject_column, SUBJECT_COLUMNS)
        caption_key = _find_column(rows.column_names, self.caption_column, CAPTION_COLUMNS)
        captions = list(rows[caption_key]) if caption_key else [None] * len(rows)
        names = (
            [str(name) for name in rows[subject_key]]
            if subject_key
            else [f"row-{i:06d}" for i in range(len(rows))]
        )
        photos: dict[str, list[tuple[str, str | None]]] = {}
        for i, (name, caption) in enumerate(zip(names, captions, strict=True)):
            photos.setdefault(name, []).append((str(i), parse_caption(caption)))
        for name, entries in photos.items():
            split = self.split if self.split in ("train", "validation", "test") else None
            yield SubjectEntry(name, tuple(entries), split)

    def read_photo(self, ref: str) -> tuple[Image.Image, str]:
        """Read the photo of a row.

        Returns:
            The image and the SHA-256 of its encoded bytes.

        Raises:
            InvalidImageError: If the row holds no readable image.
        """
        data = get_cell_bytes(self._rows[int(ref)][_PHOTO_COLUMN], f"row {ref} of {self.path!r}")
        try:
            return read_image(data), hashlib.sha256(data).hexdigest()
        except InvalidImageError as error:
            raise InvalidImageError(f"row {ref} of {self.path!r}: {error}") from error


Source = AvatarSource | FolderSource | HubSource


def parse_source(
    text: str,
    *,
    portraits_per_identity: int,
    resolution: int,
    split: str,
    columns: Mapping[str, str | None],
) -> Source:
    """Parse the source that a user names.

    Args:
        text: ``avatars:FIRST-LAST`` (seeds, the last one excluded), a folder of photos, or the
            folder or hub id of a dataset.
        portraits_per_identity: Portraits of each avatar.
        resolution: Side of rendered portraits in pixels.
        split: Split of a dataset.
        columns: Column names of a dataset by field of ``HubSource``; None to find them.

    Returns:
        The source.

    Raises:
        InvalidArgumentError: For an empty or malformed range of seeds.
    """
    if text.startswith("avatars:"):
        first, _, last = text.removeprefix("avatars:").partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InvalidArgumentError(
                f"{text!r} names no seeds of the avatar world: write avatars:FIRST-LAST, "
                "as avatars:0-200"
            )
        return AvatarSource(int(first), int(last), portraits_per_identity, resolution)
    folder = find_path(Path(text))
    has_parquet = any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))
    if folder.exists() and not is_saved_dataset(folder) and not has_parquet:
        return FolderSource(str(folder))
    return HubSource(text, split, **columns)


def source_to_dict(source: Source) -> SourceConfig:
    """Convert a source to JSON; undone by ``source_from_dict``."""
    return {"kind": source.kind, **asdict(source)}


def source_from_dict(config: SourceConfig) -> Source:
    """Make a source from JSON; undone by ``source_to_dict``."""
    source_classes = {cls.kind: cls for cls in (AvatarSource, FolderSource, HubSource)}
    options: dict[str, Any] = {name: value for name, value in config.items() if name != "kind"}
    source: Source = source_classes[str(config["kind"])](**options)
    return source


def _find_column(
    column_names: list[str], requested: str | None, candidates: tuple[str, ...]
) -> str | None:
    """Find a column: the requested one, or the first candidate that exists."""
    if requested and requested not in column_names:
        raise InvalidArgumentError(
            f"the dataset has the columns {', '.join(column_names)}, not {requested!r}"
        )
    return requested or next((name for name in candidates if name in column_names), None)
