"""Subjects of datasets and shards, listed or streamed."""

import io
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperlora.data.hub_subjects import HubSource, HubStream
from hyperlora.data.open_subject_source import SubjectSourceConfig, open_subject_source
from hyperlora.data.photos import EncodedPhoto, FilePhoto, SubjectPhotos
from hyperlora.data.subject_shards import write_subject_shards
from hyperlora.errors import InvalidArgumentError, InvalidImageError


def encode_image(seed: int, image_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def make_subjects(sizes: Sequence[int]) -> list[SubjectPhotos]:
    formats = ("PNG", "JPEG", "WEBP")
    return [
        SubjectPhotos(
            f"person {i}",
            tuple(
                EncodedPhoto(
                    f"{i}/{n}", "smiling" if n else None, encode_image(9 * i + n, formats[n % 3])
                )
                for n in range(size)
            ),
        )
        for i, size in enumerate(sizes)
    ]


def summarize(
    subjects: Sequence[SubjectPhotos],
) -> list[tuple[str, list[tuple[str | None, bytes]]]]:
    return [(s.name, [(p.caption, p.read_bytes()) for p in s.photos]) for s in subjects]


def save_dataset(folder: Path, names: Sequence[str], **columns: list[object]) -> Path:
    """A dataset with one image of each name, whose color is that of the row."""
    from datasets import Dataset

    images = [Image.new("RGB", (4, 3), (i, 0, 0)) for i in range(len(names))]
    Dataset.from_dict({"img": images, "identity": list(names), **columns}).save_to_disk(folder)
    return folder


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 7))
def test_shards_give_back_the_subjects_that_were_written(
    sizes: list[int], photos_per_shard: int
) -> None:
    subjects = make_subjects(sizes)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_subject_shards(subjects, Path(folder), photos_per_shard)
        source = open_subject_source(folder)
        assert isinstance(source, HubStream)
        assert source.num_shards == len(paths)
        assert summarize(source.list_subjects()) == summarize(subjects)
        assert source.layout_note == "by the column json.person_id"
        with pytest.raises(InvalidArgumentError, match="holds shards already"):
            write_subject_shards(subjects, Path(folder))


def test_shards_are_divided_over_ranks_and_shuffled(tmp_path: Path) -> None:
    subjects = make_subjects([2, 1, 3, 1, 2, 2, 1])
    num_shards = len(write_subject_shards(subjects, tmp_path, photos_per_shard=2))
    source = HubStream("shards", shards=[str(p) for p in sorted(tmp_path.glob("*.tar"))])
    for seed in (None, 3, 4):
        parts = [list(source.iterate_subjects(rank, 2, seed)) for rank in range(2)]
        assert all(parts)
        assert sorted(summarize([s for part in parts for s in part])) == summarize(subjects)
    orders = {tuple(s.name for s in source.iterate_subjects(shuffle_seed=k)) for k in range(4)}
    assert len(orders) > 1
    source.check_num_readers(num_shards)
    with pytest.raises(InvalidArgumentError, match=f"has {num_shards} shards, .* are needed"):
        source.check_num_readers(num_shards + 1)


def test_shards_of_others_are_grouped_by_folder_or_class(tmp_path: Path) -> None:
    for name, parts, expected in (
        ("folders", ["anna/1.jpg", "anna/2.jpg", "ben/1.jpg"], {"anna": 2, "ben": 1}),
        (
            "classes",
            ["0.jpg", "0.cls", "1.jpg", "1.cls", "2.jpg", "2.cls"],
            {"0": 1, "1": 2},
        ),
    ):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as shard:
            for i, part in enumerate(parts):
                data = (
                    encode_image(i, "JPEG") if part.endswith("jpg") else b"01"[min(i, 2) // 2 :][:1]
                )
                info = tarfile.TarInfo(part)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
        subjects = open_subject_source(str(path)).list_subjects()
        assert {s.name: len(s.photos) for s in subjects} == expected
    pattern = open_subject_source(str(tmp_path / "f*s.tar"))
    assert isinstance(pattern, HubStream)
    assert len(pattern.list_subjects()) == 2


def test_shards_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"nothing" * 300)
    with pytest.raises(InvalidArgumentError, match="cannot be read as a stream of photos"):
        open_subject_source(str(tmp_path / "x.tar")).list_subjects()


def test_dataset_is_grouped_by_identity(tmp_path: Path) -> None:
    folder = save_dataset(
        tmp_path / "d", ["b", "a", "b", "c"], caption=["in rain", None, "", "smiling"]
    )
    source = open_subject_source(str(folder))
    assert isinstance(source, HubSource)
    subjects = source.list_subjects()
    assert source.layout_note == "by the column identity"
    assert [(s.name, [p.caption for p in s.photos]) for s in subjects] == [
        ("b", ["in rain", None]),
        ("a", [None]),
        ("c", ["smiling"]),
    ]
    assert [p.read_image().getpixel((0, 0))[0] for p in subjects[0].photos] == [0, 2]
    assert subjects[0].photos[0].read_size() == (4, 3)
    assert subjects[0].photos[0].signature != subjects[0].photos[1].signature


def test_dataset_columns_can_be_named(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "d", ["x", "y"], who=["z", "z"], said=["1", "2"])
    config = SubjectSourceConfig(identity_column="who", caption_column="said")
    (subject,) = open_subject_source(str(folder), config).list_subjects()
    assert (subject.name, [p.caption for p in subject.photos]) == ("z", ["1", "2"])
    wrong = SubjectSourceConfig(identity_column="whom")
    with pytest.raises(InvalidArgumentError, match=r"not 'whom': correct source\.identity_column"):
        open_subject_source(str(folder), wrong).list_subjects()
    large = SubjectSourceConfig(identity_column="who", max_photos_per_subject=1)
    with pytest.raises(InvalidImageError, match="at most 1 of one person"):
        open_subject_source(str(folder), large).list_subjects()


def test_dataset_without_images_or_identities(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(InvalidArgumentError, match="none of which is known to hold images"):
        open_subject_source(str(tmp_path / "numbers")).list_subjects()
    Dataset.from_dict({"image": [Image.new("RGB", (2, 2))] * 3}).save_to_disk(tmp_path / "faces")
    source = open_subject_source(str(tmp_path / "faces"))
    assert len(source.list_subjects()) == 3
    assert source.layout_note == "no column says who is shown: every row shows someone else"


def test_streamed_dataset_must_be_sorted(tmp_path: Path) -> None:
    config = SubjectSourceConfig(streaming=True)
    folder = save_dataset(tmp_path / "d", ["a", "a", "b", "c", "c", "c"])
    subjects = open_subject_source(str(folder), config).list_subjects()
    assert {s.name: len(s.photos) for s in subjects} == {"a": 2, "b": 1, "c": 3}
    names = [f"s{i % 9}" for i in range(180)]
    folder = save_dataset(tmp_path / "e", names)
    with pytest.raises(InvalidArgumentError, match="do not follow one another"):
        open_subject_source(str(folder), config).list_subjects()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_size_is_that_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "me.jpg"
    Image.new("RGB", (9, 5)).save(path, exif=exif)
    photo = FilePhoto("me.jpg", None, path)
    assert photo.read_size() == photo.read_image().size


def test_photo_that_changes_has_another_signature(tmp_path: Path) -> None:
    path = tmp_path / "me.png"
    Image.new("RGB", (9, 5)).save(path)
    photo = FilePhoto("me.png", None, path)
    signature = photo.signature
    Image.new("RGB", (9, 6)).save(path)
    assert photo.signature != signature
    path.unlink()
    for read in (lambda: photo.signature, photo.read_bytes, photo.read_image, photo.read_size):
        with pytest.raises(InvalidImageError, match=r"me\.png"):
            read()
