"""Where subjects come from: the avatar world, a folder, a Hugging Face dataset."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

from PIL import Image

from data_builder.sources.types import SubjectEntry
from hyperlora.data.images import read_image
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError, InvalidImageError

IMAGE_COLUMNS: Final = ("image", "img", "photo", "picture", "jpg", "png", "webp")
SUBJECT_COLUMNS: Final = ("subject", "identity", "celeb_id", "person", "label", "name", "id")
CAPTION_COLUMNS: Final = ("caption", "text", "prompt")


@dataclass(frozen=True)
class AvatarSource:
    """People ``first_seed`` to ``end_seed - 1`` of the avatar world, ``portraits_per_identity`` portraits of every one, their prompts the captions
    (of everything but the identity)."""

    kind: ClassVar[str] = "avatars"
    first_seed: int
    end_seed: int
    portraits_per_identity: int = 4
    resolution: int = 128

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
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
        """The picture and its digest (of the pixels)."""
        from data_builder.avatars.identity import sample_identity, sample_scene
        from data_builder.avatars.rendering import render_portrait

        seed, number = map(int, ref.split("/"))
        image = render_portrait(sample_identity(seed), sample_scene(seed, number), self.resolution)
        return image, hashlib.sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class FolderSource:
    """A folder of images, one subject each, or of sub-folders with several photos of one subject."""

    kind: ClassVar[str] = "folder"
    path: str

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
        for subject in list_subjects(self.path, skipped):
            refs = [str(p.relative_to(self.path)) for p in subject.photos]
            yield SubjectEntry(subject.name, tuple(zip(refs, subject.captions, strict=True)))

    def read_photo(self, ref: str) -> tuple[Image.Image, str]:
        """The picture and its digest (of the file). Raises ``InvalidImageError``."""
        path = Path(self.path) / ref
        image = read_image(path)
        return image, hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A Hugging Face dataset by id, or a local folder of its Parquet files or of ``save_to_disk``. Columns are found
    by name unless given; without one that names subjects, every row is a subject."""

    kind: ClassVar[str] = "hub"
    path: str
    split: str = "train"
    image_column: str | None = None
    subject_column: str | None = None
    caption_column: str | None = None

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise InvalidArgumentError(
                "reading Hugging Face datasets needs the extra: pip install 'hyperlora[data]'"
            ) from error
        on_disk = any(
            (Path(self.path) / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")
        )
        try:
            if on_disk:
                rows = datasets.load_from_disk(self.path)
            else:
                rows = datasets.load_dataset(self.path, split=self.split)
            if isinstance(rows, Mapping):
                rows = rows[self.split]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidArgumentError(
                f"{self.path!r}, split {self.split!r}, is neither a folder of photos nor a dataset ({reason})"
            ) from error
        column = _find_column(rows.column_names, self.image_column, IMAGE_COLUMNS)
        if column is None:
            raise InvalidArgumentError(
                f"{self.path!r} has the columns {', '.join(rows.column_names)}: which holds the images? "
                "Give --image-column"
            )
        return rows.cast_column(column, datasets.Image(decode=False)).rename_column(
            column, "photo to read"
        )

    def list_subjects(self, skipped: list[str]) -> Iterator[SubjectEntry]:
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
            photos.setdefault(name, []).append((str(i), str(caption) if caption else None))
        for name, entries in photos.items():
            yield SubjectEntry(
                name,
                tuple(entries),
                self.split if self.split in ("train", "validation", "test") else None,
            )

    def read_photo(self, ref: str) -> tuple[Image.Image, str]:
        """The picture and its digest (of the encoded bytes). Raises ``InvalidImageError``."""
        cell = self._rows[int(ref)]["photo to read"] or {}
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            data = Path(cell["path"]).read_bytes()
        if not data:
            raise InvalidImageError(f"row {ref} of {self.path!r} holds no image: remove the row")
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
    """``draw_portraits:FIRST-LAST`` (last not included), a folder of photos, or a dataset's folder or hub id.

    Raises ``InvalidArgumentError`` for a range that is none.
    """
    if text.startswith("avatars:"):
        first, _, last = text.removeprefix("avatars:").partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InvalidArgumentError(
                f"{text!r} names no people of the avatar world: write avatars:FIRST-LAST, as avatars:0-200"
            )
        return AvatarSource(int(first), int(last), portraits_per_identity, resolution)
    folder = Path(text)
    dataset_files = ("dataset_info.json", "dataset_dict.json")
    is_dataset = any((folder / m).is_file() for m in dataset_files) or any(folder.glob("*.parquet"))
    if folder.exists() and not is_dataset and not any(folder.glob("data/*.parquet")):
        return FolderSource(text)
    return HubSource(text, split, **columns)


def source_to_dict(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, **asdict(source)}


def source_from_dict(config: Mapping[str, Any]) -> Source:
    """Inverse of ``source_to_dict``."""
    source_classes: dict[str, Any] = {
        kind.kind: kind for kind in (AvatarSource, FolderSource, HubSource)
    }
    source: Source = source_classes[config["kind"]](
        **{k: v for k, v in config.items() if k != "kind"}
    )
    return source


def _find_column(
    column_names: list[str], requested: str | None, candidates: tuple[str, ...]
) -> str | None:
    if requested and requested not in column_names:
        raise InvalidArgumentError(
            f"the dataset has the columns {', '.join(column_names)}, not {requested!r}"
        )
    return requested or next((name for name in candidates if name in column_names), None)
