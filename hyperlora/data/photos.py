"""``Photo``: a photo that is read when it is needed, from a file, a data set or a shard."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from hyperlora.data.images import read_image, read_image_size
from hyperlora.errors import InvalidImageError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Photo(ABC):
    """A photo of a subject, not read yet.

    Attributes:
        key: Its name in its source, the same in every run.
        caption: Its caption, or None.
    """

    key: str
    caption: str | None

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Read the encoded image."""

    @property
    def signature(self) -> str:
        """Text that changes with the image: its SHA-256, unless something quicker is known."""
        return self.compute_sha256()

    def compute_sha256(self) -> str:
        """Compute the SHA-256 of the encoded image."""
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def read_image(self) -> Image.Image:
        """Read the image upright, in 8-bit RGB.

        Raises:
            InvalidImageError: It is missing, damaged or too large.
        """
        try:
            return read_image(self.read_bytes())
        except InvalidImageError as error:
            raise InvalidImageError(f"{self.key}: {error}") from error

    def read_size(self) -> tuple[int, int]:
        """Read width and height in pixels of the upright image from its header.

        Raises:
            InvalidImageError: It is missing or no image.
        """
        try:
            return read_image_size(self.read_bytes())
        except InvalidImageError as error:
            raise InvalidImageError(f"{self.key}: {error}") from error


@dataclass(frozen=True)
class FilePhoto(Photo):
    """A photo in a file.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def signature(self) -> str:
        """Size and time of the last change of the file."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise InvalidImageError(
                f"there is no file {str(self.path)!r}, an image was expected: check the path"
            ) from error
        return f"{status.st_size}:{status.st_mtime_ns}"

    def read_bytes(self) -> bytes:
        """Read the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InvalidImageError(
                f"{str(self.path)!r} cannot be read ({error.strerror}): check its permissions"
            ) from error

    def read_image(self) -> Image.Image:
        """Read the image upright, in 8-bit RGB; errors name the file."""
        return read_image(self.path)


@dataclass(frozen=True)
class RowPhoto(Photo):
    """A photo in a row of a Hugging Face dataset.

    Attributes:
        rows: The dataset, whose images are not decoded.
        column: The column of images.
        index: The row.
    """

    rows: "Dataset"
    column: str
    index: int

    def read_bytes(self) -> bytes:
        """Read the encoded image of the row."""
        return get_cell_bytes(self.rows[self.index][self.column], self.key)


@dataclass(frozen=True)
class EncodedPhoto(Photo):
    """A photo in memory, as a stream delivers it.

    Attributes:
        data: The encoded image.
    """

    data: bytes

    def read_bytes(self) -> bytes:
        """Return the encoded image."""
        return self.data


@dataclass(frozen=True)
class SubjectPhotos:
    """The photos of one subject.

    Attributes:
        name: The name of the subject.
        photos: Its photos, at least one.
        generated_views: Images of the subject made by a model; references, but never targets.
        repeats: How often a training sees the subject in an epoch.
    """

    name: str
    photos: tuple[Photo, ...]
    generated_views: tuple[Photo, ...] = ()
    repeats: int = 1

    @property
    def references(self) -> Sequence[Photo]:
        """All images that may be references: photos, then generated views."""
        return (*self.photos, *self.generated_views)


def get_cell_bytes(cell: object, name: str) -> bytes:
    """Return the encoded image in a cell of a Hugging Face dataset.

    Args:
        cell: ``bytes`` and ``path`` of an image that is not decoded.
        name: Name of the photo, for the error message.

    Returns:
        The encoded image.

    Raises:
        InvalidImageError: The cell is empty, or its file cannot be read.
    """
    fields = cast(dict[str, Any], cell) if isinstance(cell, dict) else {}
    if data := fields.get("bytes"):
        return cast(bytes, data)
    if path := fields.get("path"):
        return FilePhoto(name, None, Path(path)).read_bytes()
    raise InvalidImageError(f"{name} holds no image: remove the row")
