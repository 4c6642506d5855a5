"""Where subjects come from: the avatar world, a folder, a Hugging Face dataset."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

from PIL import Image

from data_builder.sources.types import Listed
from hyperlora.data.images import read_image
from hyperlora.data.subjects import subjects_in
from hyperlora.errors import BadImage, BadRequest

IMAGE_COLUMNS: Final = ("image", "img", "photo", "picture", "jpg", "png", "webp")
SUBJECT_COLUMNS: Final = ("subject", "identity", "celeb_id", "person", "label", "name", "id")
CAPTION_COLUMNS: Final = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Avatars:
    """People ``first`` to ``last - 1`` of the avatar world, ``each`` portraits of every one, their prompts the captions
    (of everything but the identity)."""

    kind: ClassVar[str] = "avatars"
    first: int
    last: int
    each: int = 4
    size: int = 128

    def subjects(self, skipped: list[str]) -> Iterator[Listed]:
        from data_builder.avatars.captions import prompt
        from data_builder.avatars.identity import SPLITS, scene

        for seed in range(self.first, self.last):
            split = next((name for name, seeds in SPLITS.items() if seed in seeds), "train")
            photos = tuple((f"{seed}/{k}", prompt(scene(seed, k))) for k in range(self.each))
            yield Listed(f"person-{seed}", photos, split)

    def read(self, ref: str) -> tuple[Image.Image, str]:
        """The picture and its digest (of the pixels)."""
        from data_builder.avatars.identity import identity, scene
        from data_builder.avatars.rendering import draw

        seed, number = map(int, ref.split("/"))
        image = draw(identity(seed), scene(seed, number), self.size)
        return image, hashlib.sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Folder:
    """A folder of images, one subject each, or of sub-folders with several photos of one subject."""

    kind: ClassVar[str] = "folder"
    where: str

    def subjects(self, skipped: list[str]) -> Iterator[Listed]:
        for subject in subjects_in(self.where, skipped):
            refs = [str(p.relative_to(self.where)) for p in subject.photos]
            yield Listed(subject.name, tuple(zip(refs, subject.captions, strict=True)))

    def read(self, ref: str) -> tuple[Image.Image, str]:
        """The picture and its digest (of the file). Raises ``BadImage``."""
        path = Path(self.where) / ref
        image = read_image(path)
        return image, hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Hub:
    """A Hugging Face dataset by id, or a local folder of its Parquet files or of ``save_to_disk``. Columns are found
    by name unless given; without one that names subjects, every row is a subject."""

    kind: ClassVar[str] = "hub"
    where: str
    split: str = "train"
    image: str | None = None
    subject: str | None = None
    caption: str | None = None

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise BadRequest("reading Hugging Face datasets needs the extra: pip install 'hyperlora[data]'") from error
        on_disk = any((Path(self.where) / f).is_file() for f in ("dataset_info.json", "dataset_dict.json"))
        try:
            if on_disk:
                rows = datasets.load_from_disk(self.where)
            else:
                rows = datasets.load_dataset(self.where, split=self.split)
            if isinstance(rows, Mapping):
                rows = rows[self.split]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadRequest(
                f"{self.where!r}, split {self.split!r}, is neither a folder of photos nor a dataset ({reason})"
            ) from error
        column = _column(rows.column_names, self.image, IMAGE_COLUMNS)
        if column is None:
            raise BadRequest(f"{self.where!r} has the columns {', '.join(rows.column_names)}: which holds the images? "
                             "Give --image-column")  # fmt: skip
        return rows.cast_column(column, datasets.Image(decode=False)).rename_column(column, "photo to read")

    def subjects(self, skipped: list[str]) -> Iterator[Listed]:
        rows = self._rows
        who = _column(rows.column_names, self.subject, SUBJECT_COLUMNS)
        words = _column(rows.column_names, self.caption, CAPTION_COLUMNS)
        captions = list(rows[words]) if words else [None] * len(rows)
        names = [str(name) for name in rows[who]] if who else [f"row-{i:06d}" for i in range(len(rows))]
        photos: dict[str, list[tuple[str, str | None]]] = {}
        for i, (name, caption) in enumerate(zip(names, captions, strict=True)):
            photos.setdefault(name, []).append((str(i), str(caption) if caption else None))
        for name, found in photos.items():
            yield Listed(name, tuple(found), self.split if self.split in ("train", "validation", "test") else None)

    def read(self, ref: str) -> tuple[Image.Image, str]:
        """The picture and its digest (of the encoded bytes). Raises ``BadImage``."""
        cell = self._rows[int(ref)]["photo to read"] or {}
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            data = Path(cell["path"]).read_bytes()
        if not data:
            raise BadImage(f"row {ref} of {self.where!r} holds no image: remove the row")
        try:
            return read_image(data), hashlib.sha256(data).hexdigest()
        except BadImage as error:
            raise BadImage(f"row {ref} of {self.where!r}: {error}") from error


Source = Avatars | Folder | Hub


def source_of(text: str, *, each: int, size: int, split: str, columns: Mapping[str, str | None]) -> Source:
    """``avatars:FIRST-LAST`` (last not included), a folder of photos, or a dataset's folder or hub id.

    Raises ``BadRequest`` for a range that is none.
    """
    if text.startswith("avatars:"):
        first, _, last = text.removeprefix("avatars:").partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise BadRequest(
                f"{text!r} names no people of the avatar world: write avatars:FIRST-LAST, as avatars:0-200"
            )
        return Avatars(int(first), int(last), each, size)
    folder = Path(text)
    marks = ("dataset_info.json", "dataset_dict.json")
    is_dataset = any((folder / m).is_file() for m in marks) or any(folder.glob("*.parquet"))
    if folder.exists() and not is_dataset and not any(folder.glob("data/*.parquet")):
        return Folder(text)
    return Hub(text, split, **columns)


def to_dict(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, **asdict(source)}


def opened(facts: Mapping[str, Any]) -> Source:
    """Inverse of ``to_dict``."""
    kinds: dict[str, Any] = {kind.kind: kind for kind in (Avatars, Folder, Hub)}
    made: Source = kinds[facts["kind"]](**{k: v for k, v in facts.items() if k != "kind"})
    return made


def _column(found: list[str], given: str | None, known: tuple[str, ...]) -> str | None:
    if given and given not in found:
        raise BadRequest(f"the dataset has the columns {', '.join(found)}, not {given!r}")
    return given or next((name for name in known if name in found), None)
