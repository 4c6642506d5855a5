"""Layouts of collections of photos are recognized, whatever their sizes and names."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlora.data.open_subject_source import SubjectSourceConfig, list_shards, open_subject_source
from hyperlora.data.subject_layouts import find_metadata_column, recognize_layout
from hyperlora.data.subject_sources import FolderSource, find_repeated_names
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError, InvalidImageError


def create_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def create_numbered(
    folder: Path, numbers: range, step: int, digits: int, suffix: str = ".png"
) -> None:
    """Images numbered through sub-folders of ``step`` images, as FFHQ's."""
    create_files(
        folder,
        *(f"{n // step * step:0{digits}d}/{n:0{digits}d}{suffix}" for n in numbers),
    )


@pytest.mark.parametrize(
    ("numbers", "step", "digits", "suffix"),
    [
        (range(3000, 3047), 1000, 5, ".png"),  # a part of one folder
        (range(65), 20, 4, ".JPG"),
        (range(40, 118), 40, 6, ".webp"),
    ],
)
def test_numbered_folders_hold_strangers(
    tmp_path: Path, numbers: range, step: int, digits: int, suffix: str
) -> None:
    create_numbered(tmp_path, numbers, step, digits, suffix)
    create_files(tmp_path, "LICENSE.txt")
    source = FolderSource(str(tmp_path))
    subjects = source.list_subjects()
    assert [len(subject.photos) for subject in subjects] == [1] * len(numbers)
    assert [subject.name for subject in subjects] == [f"{n:0{digits}d}" for n in numbers]
    assert "FFHQ" in source.layout_note
    assert len(list_subjects(tmp_path)) == len(numbers)  # for all commands


@pytest.mark.parametrize(
    "names",
    [
        [f"{s:03d}/{n}.jpg" for s in range(3) for n in range(20)],  # a number per subject
        [f"{s:05d}/{n:05d}.jpg" for s in range(3) for n in range(12)],  # from 0 in each
        [f"{s}00/{s}0{n}.jpg" for s in (1, 2, 3) for n in range(3)],  # few
        [f"{s:05d}/{s:05d}-{n}.png" for s in (0, 1000) for n in range(15)],
        [f"person{s}/{n:05d}.png" for s in (0, 1) for n in range(15)],
    ],
)
def test_numbered_subjects_are_no_strangers(tmp_path: Path, names: list[str]) -> None:
    create_files(tmp_path, *names)
    assert recognize_layout(tmp_path) == "folders"
    assert len(list_subjects(tmp_path)) == len({name.split("/")[0] for name in names})


def test_strangers_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    for i in range(8):
        folder = tmp_path.joinpath(*"abcdefgh"[: i + 1])
        folder.mkdir()
        (folder / f"{i}.png").write_bytes(b"")
    (folder / "loop").symlink_to(tmp_path / "a")
    subjects = FolderSource(str(tmp_path), "strangers").list_subjects()
    assert [subject.name for subject in subjects] == [str(i) for i in range(8)]


def test_layout_can_be_set(tmp_path: Path) -> None:
    create_numbered(tmp_path, range(30), 10, 5)
    assert len(FolderSource(str(tmp_path), "folders").list_subjects()) == 3
    strangers = FolderSource(str(tmp_path), "strangers").list_subjects()
    assert len(strangers) == 30
    create_files(tmp_path, "extra/00003.png")
    names = [subject.name for subject in FolderSource(str(tmp_path), "strangers").list_subjects()]
    assert len(set(names)) == 31
    assert {"00000/00003", "extra/00003"} <= set(names)


def test_celeba_identities_are_read(tmp_path: Path) -> None:
    lines = ["000001.jpg 7", "000002.jpg 12", "000003.jpg 7", "000009.jpg 3"]
    create_files(tmp_path, *(f"img_align_celeba/00000{n}.png" for n in (1, 2, 3, 4, 5)))
    (tmp_path / "Anno").mkdir()
    (tmp_path / "Anno/identity_CelebA.txt").write_text("\n".join(lines) + "\n")
    source = FolderSource(str(tmp_path))
    subjects = {s.name: [p.key for p in s.photos] for s in source.list_subjects()}
    assert subjects == {
        "7": ["img_align_celeba/000001.png", "img_align_celeba/000003.png"],
        "12": ["img_align_celeba/000002.png"],
    }
    assert source.skip_reasons == [
        "2 images have no line in identity_CelebA.txt (000004.png, 000005.png)"
    ]


def test_celeba_hq_numbers_are_mapped(tmp_path: Path) -> None:
    create_files(tmp_path, "0.jpg", "1.jpg", "00002.jpg")
    (tmp_path / "identity_CelebA.txt").write_text("000119.jpg 5\n000004.jpg 6\n000200.jpg 5\n")
    (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx     orig_idx  orig_file\n0 118 000119.jpg\n1 3 000004.jpg\n2 199 000200.jpg\n"
    )
    subjects = {s.name: len(s.photos) for s in FolderSource(str(tmp_path)).list_subjects()}
    assert subjects == {"5": 2, "6": 1}


def test_broken_identity_file_is_refused(tmp_path: Path) -> None:
    create_files(tmp_path, "0.jpg")
    (tmp_path / "identity.txt").write_text("0.jpg 1\n0.jpg\n")
    with pytest.raises(InvalidImageError, match=r"line 2: 2 words were expected"):
        FolderSource(str(tmp_path)).list_subjects()
    with pytest.raises(InvalidImageError, match="holds no list of identities"):
        FolderSource(str(tmp_path / "empty"), "identity_file").list_subjects()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_name_subjects_and_captions(tmp_path: Path, suffix: str) -> None:
    create_files(tmp_path, "a/1.png", "b/2.png", "3.png", "4.png")
    rows = [
        {"file_name": "a/1.png", "text": "in the rain", "celeb_id": "17"},
        {"file_name": "b/2.png", "text": "", "celeb_id": "17"},
        {"file_name": "3.png", "text": "at sea, smiling", "celeb_id": "4"},
        {"file_name": "missing.png", "text": "x", "celeb_id": "4"},
        {"file_name": "4.png", "text": "x", "celeb_id": ""},
    ]
    write_metadata(tmp_path / f"metadata.{suffix}", rows)
    source = FolderSource(str(tmp_path))
    subjects = {s.name: [(p.key, p.caption) for p in s.photos] for s in source.list_subjects()}
    assert subjects == {
        "17": [("a/1.png", "in the rain"), ("b/2.png", None)],
        "4": [("3.png", "at sea, smiling")],
    }
    assert source.layout_note == "by the column celeb_id of its metadata"
    missing, unnamed = source.skip_reasons
    assert "missing.png" in missing
    assert unnamed == "1 rows have no celeb_id (4.png)"


def test_metadata_without_identities_keep_the_folders(tmp_path: Path) -> None:
    create_files(tmp_path, "zoe/1.png", "zoe/2.png", "adam.png")
    rows = [{"file_name": name, "text": "t"} for name in ("zoe/1.png", "zoe/2.png", "adam.png")]
    write_metadata(tmp_path / "metadata.jsonl", rows)
    assert find_metadata_column(tmp_path) is None
    assert {s.name: len(s.photos) for s in list_subjects(tmp_path)} == {"zoe": 2, "adam": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": 1', "cannot be read"),
        ("[1, 2]", "an object was expected"),
        ('{"picture": "1.png"}', "has the columns picture, file_name expected"),
    ],
)
def test_broken_metadata_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InvalidImageError, match=message):
        FolderSource(str(tmp_path)).list_subjects()


def test_metadata_cannot_name_files_outside(tmp_path: Path) -> None:
    create_files(tmp_path, "secret.png", "in/1.png")
    rows = [{"file_name": "../secret.png", "person_id": "a"}, {"file_name": "1.png"}]
    write_metadata(tmp_path / "in/metadata.jsonl", rows)
    source = FolderSource(str(tmp_path / "in"))
    with pytest.raises(InvalidImageError):  # the second row has no person
        source.list_subjects()


def write_metadata(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return
    lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
    path.write_text("\ufeff" + "\n".join(lines))


@pytest.mark.parametrize("sizes", [(31, 45, 40), (33,), (31, 1, 50)])
def test_too_large_subjects_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    for i, size in enumerate(sizes):
        create_files(tmp_path, *(f"class-{i}/x{n}.jpg" for n in range(size)))
    source = FolderSource(str(tmp_path), max_photos_per_subject=30)
    with pytest.raises(InvalidImageError, match=r"at most 30 of one person .* strangers"):
        source.list_subjects()
    assert len(FolderSource(str(tmp_path), None, 50).list_subjects()) == len(sizes)
    assert len(FolderSource(str(tmp_path), "strangers", 30).list_subjects()) == sum(sizes)


def test_one_large_subject_among_small_ones_passes(tmp_path: Path) -> None:
    create_files(tmp_path, *(f"a/{n}.jpg" for n in range(25)), "b/1.jpg", "c/1.jpg")
    assert len(FolderSource(str(tmp_path), None, 20).list_subjects()) == 3


def test_folders_of_folders_are_refused_by_the_deeper_name(tmp_path: Path) -> None:
    create_files(tmp_path, "train/anna/1.png", "validation/zoe/1.png")
    with pytest.raises(InvalidImageError, match=r"one level deeper, as '.*train'"):
        FolderSource(str(tmp_path)).list_subjects()


def test_flat_folder_asks_about_repeated_names(tmp_path: Path) -> None:
    create_files(tmp_path, "anna_1.jpg", "anna_2.jpg", "ben-1.jpg", "zoe.jpg")
    source = FolderSource(str(tmp_path))
    assert len(source.list_subjects()) == 4
    assert source.layout_note == (
        "no sub-folders: every photo shows someone else "
        "(put anna_1, anna_2 into one sub-folder if they show one person)"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["IMG_0001", "IMG_0002", "zoe"], []),
        (["00001", "00002"], []),
        (["anna (1)", "anna (2)", "ben"], ["anna (1)", "anna (2)"]),
        (["a-1", "a-2", "b-1", "b-2"], ["a-1", "a-2"]),
        (["frankfurt1", "frankfurt2"], []),  # a prefix of all says nothing
    ],
)
def test_find_repeated_names(names: list[str], expected: list[str]) -> None:
    assert find_repeated_names(names) == expected


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_folder_source_lists_every_photo_once(sizes: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        names = {f"s{i}/{n}.png" for i, size in enumerate(sizes) for n in range(size)}
        create_files(Path(folder), *names)
        keys = [p.key for s in FolderSource(folder).list_subjects() for p in s.photos]
        assert sorted(keys) == sorted(names)


def test_open_subject_source_names_missing_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_files(tmp_path, "photos/anna/1.png")
    for name in ("photos/trian", "./photos2", str(tmp_path / "x"), "a/b/c"):
        with pytest.raises(InvalidArgumentError, match="there is no folder"):
            open_subject_source(name)
    with pytest.raises(InvalidArgumentError, match="no shard matches"):
        open_subject_source("shards-*.tar")
    assert isinstance(open_subject_source("photos"), FolderSource)
    assert open_subject_source("someone/faces").name == "someone/faces"  # a hub id
    assert list_shards("https://example.org/0.tar") == ["https://example.org/0.tar"]
    config = SubjectSourceConfig(layout="strangers")
    assert open_subject_source("photos", config).layout == "strangers"
