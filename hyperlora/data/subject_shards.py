"""Write subjects as WebDataset shards, which ``HubStream`` reads on any number of machines."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from hyperlora.data.photos import SubjectPhotos
from hyperlora.errors import InvalidArgumentError

PHOTOS_PER_SHARD: Final = 1000


def write_subject_shards(
    subjects: Iterable[SubjectPhotos], folder: Path, photos_per_shard: int = PHOTOS_PER_SHARD
) -> list[Path]:
    """Write subjects as shards; undone by ``HubStream``.

    A sample holds the encoded image as it is, ``txt`` (the caption) and ``json`` with
    ``person_id``. A subject is never divided over shards.

    Args:
        subjects: The subjects; the order is kept.
        folder: Folder of the shards, created if missing.
        photos_per_shard: Photos after which a shard ends with its subject.

    Returns:
        The files, in order.

    Raises:
        InvalidArgumentError: The folder holds shards already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("*.tar"), None) is not None:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds shards already: remove them, or name another folder"
        )
    paths = []
    for shard_index, group in enumerate(_group_subjects(subjects, photos_per_shard)):
        paths.append(folder / f"shard-{shard_index:06d}.tar")
        with tarfile.open(paths[-1], "w") as shard:
            for subject_index, subject in group:
                for index, photo in enumerate(subject.photos):
                    key = f"{subject_index:08d}-{index:04d}"
                    # ``image`` for any format: samples of a shard must have the same parts
                    _add_file(shard, f"{key}.image", photo.read_bytes())
                    _add_file(shard, f"{key}.txt", (photo.caption or "").encode())
                    metadata = json.dumps({"person_id": subject.name, "key": photo.key})
                    _add_file(shard, f"{key}.json", metadata.encode())
    return paths


def _group_subjects(
    subjects: Iterable[SubjectPhotos], photos_per_shard: int
) -> Iterator[list[tuple[int, SubjectPhotos]]]:
    """Group whole subjects, with their numbers, until a group has enough photos."""
    group: list[tuple[int, SubjectPhotos]] = []
    for numbered_subject in enumerate(subjects):
        group.append(numbered_subject)
        if sum(len(subject.photos) for _, subject in group) >= photos_per_shard:
            yield group
            group = []
    if group:
        yield group


def _add_file(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))
