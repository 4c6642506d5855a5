"""``SubjectSource``: where the photos of subjects come from, behind one interface.

A folder (``FolderSource``) or a Hugging Face dataset (``HubSource``) lists its subjects. A stream
(``HubStream``) passes them by: a dataset that is not fetched, or WebDataset shards.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hyperlora.data.photos import FilePhoto, SubjectPhotos
from hyperlora.data.subject_layouts import (
    SubjectLayout,
    find_metadata_column,
    has_numbered_folders,
    recognize_layout,
)
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidImageError

MAX_PHOTOS_PER_SUBJECT: Final = 200
"""A subject with more photos is suspected to be many people."""
_CAMERA_NAMES: Final = frozenset(
    {"img", "dsc", "dscn", "dscf", "pxl", "image", "photo", "picture", "frame", "face", "mvimg"}
)
"""Stems before a number that say nothing of who is shown."""


class SubjectSource(ABC):
    """Where the photos of subjects come from.

    Attributes:
        name: What the user called it: a path, a pattern or a hub id.
        layout_note: How it was understood, one clause.
        skip_reasons: Why subjects and photos are left out, a sentence each.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout_note = ""
        self.skip_reasons: list[str] = []

    @abstractmethod
    def list_subjects(self) -> list[SubjectPhotos]:
        """List the subjects, always in the same order.

        Raises:
            InvalidImageError: There is none, or one is suspected to be many people.
        """


class FolderSource(SubjectSource):
    """A folder of photos in one of the layouts of ``hyperlora.data.subject_layouts``.

    Args:
        folder: The folder.
        layout: The layout; None to recognize it.
        max_photos_per_subject: See ``check_subject_sizes``.
    """

    def __init__(
        self,
        folder: str,
        layout: SubjectLayout | None = None,
        max_photos_per_subject: int = MAX_PHOTOS_PER_SUBJECT,
    ) -> None:
        super().__init__(folder)
        self.layout, self.max_photos_per_subject = layout, max_photos_per_subject

    def list_subjects(self) -> list[SubjectPhotos]:
        """List the subjects by name."""
        root = Path(self.name)
        layout = self.layout or recognize_layout(root)
        self.skip_reasons = []
        subjects = [
            SubjectPhotos(
                subject.name,
                tuple(
                    FilePhoto(str(path.relative_to(root)), caption, path)
                    for path, caption in zip(subject.photos, subject.captions, strict=True)
                ),
                repeats=subject.repeats,
            )
            for subject in list_subjects(root, self.skip_reasons, layout)
        ]
        self.layout_note = self._describe_layout(layout, subjects)
        check_subject_sizes(subjects, self.name, self.max_photos_per_subject)
        return subjects

    def _describe_layout(self, layout: SubjectLayout, subjects: Sequence[SubjectPhotos]) -> str:
        root = Path(self.name)
        match layout:
            case "identity_file":
                return "by CelebA's list of identities"
            case "metadata":
                column = find_metadata_column(root)
                return f"by the column {column} of its metadata" if column else "by its metadata"
            case "strangers" if has_numbered_folders(root):
                return "numbered folders as FFHQ's: every photo shows someone else"
            case "strangers":
                return "every photo shows someone else"
        if any(len(Path(photo.key).parts) > 1 for s in subjects for photo in s.photos):
            has_repeats = any(subject.repeats > 1 for subject in subjects)
            repeats_note = ", repeated as kohya's names of folders say" if has_repeats else ""
            return f"a sub-folder for each subject{repeats_note}"
        note = "no sub-folders: every photo shows someone else"
        if names := find_repeated_names([subject.name for subject in subjects]):
            note += f" (put {', '.join(names)} into one sub-folder if they show one person)"
        return note


def check_subject_sizes(subjects: Sequence[SubjectPhotos], name: str, max_photos: int) -> None:
    """Refuse subjects of so many photos that each of these may show someone else.

    One large subject among smaller ones passes.

    Args:
        subjects: All subjects of a source.
        name: Name of the source.
        max_photos: Photos of the median subject beyond which it is suspected.

    Raises:
        InvalidImageError: The median subject has more photos.
    """
    by_size = sorted(subjects, key=lambda subject: len(subject.photos))
    median = by_size[len(by_size) // 2]
    if len(median.photos) > max_photos:
        raise InvalidImageError(
            f"{name!r}: subject {median.name!r} has {len(median.photos)} photos, as others have, "
            f"at most {max_photos} of one person are expected: set source.layout to strangers if "
            "each photo shows someone else, else raise source.max_photos_per_subject"
        )


def find_repeated_names(names: Sequence[str]) -> list[str]:
    """Find names such as ``anna_1`` and ``anna_2``, which may belong to one person.

    Args:
        names: Names of images without suffix.

    Returns:
        Two names, or nothing. A common prefix of all names, or a camera's, says nothing.
    """
    prefixes = {name: re.sub(r"[\s_.()-]*\d+\)?$", "", name).lower() for name in names}
    counts = Counter(prefix for prefix in prefixes.values() if prefix not in _CAMERA_NAMES)
    counts.pop("", None)
    repeated = [prefix for prefix, count in counts.items() if count > 1]
    if len(repeated) < 2 and not (repeated and len(counts) > 1):
        return []
    return sorted(name for name, prefix in prefixes.items() if prefix == repeated[0])[:2]
