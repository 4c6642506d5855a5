"""Captions: texts beside photos, in tables of metadata and in cells of datasets.

Training, fine-tuning and ``data-builder`` read captions here. A caption is literal text: braces,
parentheses and ``<...>`` mean nothing.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from hyperlora.data.images import is_within, list_entries
from hyperlora.errors import InvalidImageError

MAX_CAPTION_BYTES: Final = 64_000
"""The longest caption file that is read."""
CAPTION_SUFFIXES: Final = (".txt", ".caption")
"""Suffixes of texts beside photos, the first that exists counts: kohya's and those of others."""
CAPTION_COLUMNS: Final = ("text", "caption", "prompt")
FILE_COLUMNS: Final = ("file_name", "image", "filename", "file")
METADATA_NAMES: Final = ("metadata.jsonl", "metadata.csv")
_BOMS: Final = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_EAST_ASIAN_BYTES: Final = re.compile(rb"[\x80-\xff]{4}")
"""Letters of several bytes, which cp1252 would turn into nonsense."""


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-8, UTF-16 or UTF-32 with a byte order mark, or Windows' cp1252.

    Args:
        data: The file.

    Returns:
        The text, without the mark.

    Raises:
        UnicodeDecodeError: It is none of these.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:  # no text has NUL: UTF-16 without its mark
        is_big_endian = data[::2].count(0) > data[1::2].count(0)
        encoding = "utf-16-be" if is_big_endian else "utf-16-le"
    if encoding is not None:
        return data.decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if _EAST_ASIAN_BYTES.search(data):
            raise
        return data.decode("cp1252")


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """Read a text file, see ``decode_text``.

    Args:
        path: The file.
        max_bytes: Most bytes that it may have; None for any number.

    Returns:
        The text.

    Raises:
        InvalidImageError: It cannot be read, is no text, or is longer.
    """
    try:
        with path.open("rb") as file:
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise InvalidImageError(
                f"the text {str(path)!r} is longer than {max_bytes} bytes: shorten it"
            )
        return decode_text(data)
    except OSError as error:
        raise InvalidImageError(
            f"the text {str(path)!r} cannot be read ({error.strerror}): check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidImageError(
            f"the text {str(path)!r} is neither UTF-8, UTF-16 nor cp1252: save it as UTF-8"
        ) from error


def parse_caption(value: object) -> str | None:
    """Parse the caption in a cell of a table or a dataset.

    Args:
        value: Text, bytes of text, or a sequence whose first caption counts.

    Returns:
        The caption on one line; None if there is none, or it is blank.

    Raises:
        UnicodeDecodeError: The bytes are no text.
    """
    if isinstance(value, bytes):
        value = decode_text(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return parse_caption(value[0]) if value else None
    if value is None or (isinstance(value, float) and value != value):  # NaN of an empty cell
        return None
    return " ".join(str(value).split()) or None


class CaptionReader:
    """Reads the captions of photos in a folder and its sub-folders.

    The caption is that of ``metadata.jsonl`` or ``metadata.csv`` in the photo's folder, else the
    first line that is not blank of ``NAME.txt`` or ``NAME.caption``, in any case of letters.

    Args:
        root: The folder; links out of it are not followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._text_paths: dict[Path, Mapping[tuple[str, str], Path]] = {}
        self._metadata: dict[Path, Mapping[str, str]] = {}

    def read(self, photo: Path) -> str | None:
        """Read the caption of a photo; None if there is none, or it is blank.

        Raises:
            InvalidImageError: It is no text, or too long.
        """
        caption = self._get_metadata(photo.parent).get(_normalize(photo.name))
        return caption or self.read_text_of(photo.parent, photo.stem)

    def read_text_of(self, folder: Path, stem: str) -> str | None:
        """Read the first line of ``STEM.txt`` or ``STEM.caption``.

        Args:
            folder: Their folder.
            stem: Name without suffix.

        Returns:
            The line; None if there is no such file, or it is blank.

        Raises:
            InvalidImageError: It is no text, or too long.
        """
        if folder not in self._text_paths:
            self._text_paths[folder] = {
                (_normalize(path.stem), path.suffix.lower()): path
                for path in list_entries(folder)
                if path.suffix.lower() in CAPTION_SUFFIXES
            }
        for suffix in CAPTION_SUFFIXES:
            path = self._text_paths[folder].get((_normalize(stem), suffix))
            if path is not None and path.is_file() and is_within(path, self.root):
                lines = map(str.strip, read_text(path, MAX_CAPTION_BYTES).splitlines())
                if line := next(filter(None, lines), None):
                    return line
        return None

    def _get_metadata(self, folder: Path) -> Mapping[str, str]:
        """Return captions by file name from the metadata of a folder."""
        if folder not in self._metadata:
            path = find_metadata(folder)
            rows = read_rows(path) if path is not None and is_within(path, self.root) else ()
            captions = ((get_first(row, FILE_COLUMNS), get_caption(row)) for row in rows)
            self._metadata[folder] = {
                _normalize(name.removeprefix("./")): caption
                for name, caption in captions
                if name and caption
            }
        return self._metadata[folder]


def find_metadata(folder: Path) -> Path | None:
    """Find ``metadata.jsonl`` or ``metadata.csv`` of Hugging Face's image folders; None if none."""
    paths = (folder / name for name in METADATA_NAMES)
    return next((path for path in paths if path.is_file()), None)


def read_rows(path: Path) -> Iterator[Mapping[str, object]]:
    """Read the rows of a CSV or JSONL file.

    Args:
        path: The file.

    Yields:
        Cells by column.

    Raises:
        InvalidImageError: It cannot be read.
    """
    text = read_text(path)
    try:
        if path.suffix == ".csv":
            header = text.partition("\n")[0]
            delimiter = max(",;\t", key=header.count)  # spreadsheets of some languages write ;
            yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InvalidImageError(
                        f"{str(path)!r}, line {number}: an object was expected, as "
                        '{"file_name": "1.jpg", "person_id": "anna"}'
                    )
                yield row
    except (ValueError, csv.Error) as error:
        raise InvalidImageError(f"{str(path)!r} cannot be read ({error}): save it again") from error


def get_first(row: Mapping[str, object], columns: Sequence[str]) -> str | None:
    """Return the value of the first column that a row has.

    Args:
        row: Cells by column.
        columns: Names of columns, the surest first.

    Returns:
        The text; None if it is empty, or the row has none of these.
    """
    value = _find_cell(row, columns)
    return str(value).strip() or None if value is not None else None


def get_caption(row: Mapping[str, object]) -> str | None:
    """Return the caption in a row of a table; None if it is blank, or there is no such column."""
    return parse_caption(_find_cell(row, CAPTION_COLUMNS))


def _find_cell(row: Mapping[str, object], columns: Sequence[str]) -> object:
    return next((row[name] for name in columns if row.get(name) is not None), None)


def _normalize(name: str) -> str:
    """Names with accents have two spellings, of which macOS writes one and others the other."""
    return unicodedata.normalize("NFC", name)
