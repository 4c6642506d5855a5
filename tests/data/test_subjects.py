"""Subjects in folders of photos."""

from pathlib import Path

import pytest

from hyperlora.data import image_formats
from hyperlora.data.subjects import SkippedPhoto, Subject, list_subjects
from hyperlora.errors import InvalidImageError


def create_files(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_list_subjects_reads_sub_folders_and_single_images(
    tmp_path: Path,
) -> None:
    create_files(
        tmp_path / "zoe/2.png",
        tmp_path / "zoe/1.jpg",
        tmp_path / "adam.webp",
        tmp_path / "notes.md",
    )
    create_files(tmp_path / ".cache/x.png", tmp_path / ".y.png", tmp_path / "zoe/.z.png")
    (tmp_path / "zoe/1.txt").write_text("\ufeffa portrait of zoe \nand more", encoding="utf-8")
    (tmp_path / "adam.txt").write_text("\n")
    assert list_subjects(tmp_path) == [
        Subject("adam", (tmp_path / "adam.webp",), (None,)),
        Subject(
            "zoe", (tmp_path / "zoe/1.jpg", tmp_path / "zoe/2.png"), ("a portrait of zoe", None)
        ),
    ]
    assert list_subjects(str(tmp_path)) == list_subjects(tmp_path)


def test_list_subjects_follows_links_inside_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    create_files(folder / "me/1.png", folder / "shared.png", outside / "secret.png")
    (outside / "secret.txt").write_text("secret")
    (folder / "me/2.png").symlink_to(folder / "shared.png")
    (folder / "me/3.png").symlink_to(outside / "secret.png")
    (folder / "me/1.txt").symlink_to(outside / "secret.txt")
    (folder / "they").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "secret.png").symlink_to(outside / "secret.png")
    me, shared = list_subjects(folder)
    assert me == Subject("me", (folder / "me/1.png", folder / "me/2.png"), (None, None))
    assert shared.name == "shared"


def test_list_subjects_reads_linked_folder(tmp_path: Path) -> None:
    create_files(tmp_path / "real/me.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert list_subjects(tmp_path / "link")[0].photos == (tmp_path / "link/me.png",)


def test_list_subjects_skips_links_that_lead_back(tmp_path: Path) -> None:
    create_files(tmp_path / "zoe/1.png")
    for name, target in (("me", "me"), ("a.png", "b.png"), ("b.png", "a.png"), ("zoe/2.png", "2")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "zoe/2").symlink_to("../zoe/2.png")
    skipped: list[SkippedPhoto] = []
    (subject,) = list_subjects(tmp_path, skipped_photos=skipped)
    assert subject.photos == (tmp_path / "zoe/1.png",)
    assert {photo.path.name for photo in skipped} == {"a.png", "b.png", "2.png"}
    assert all("a link to a file that is not there" in photo.reason for photo in skipped)


def test_list_subjects_names_invalid_folders(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidImageError, match="holds no subject: put images there, such as PNG, JPEG"
    ):
        list_subjects(tmp_path)
    with pytest.raises(InvalidImageError, match="there is no folder"):
        list_subjects(tmp_path / "missing")
    create_files(tmp_path / "adam.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidImageError, match="empty' holds no image, such as PNG"):
        list_subjects(tmp_path)
    create_files(tmp_path / "empty/1.png", tmp_path / "adam/1.jpg")
    with pytest.raises(InvalidImageError, match="two subjects called 'adam'"):
        list_subjects(tmp_path)


def test_list_subjects_names_invalid_captions(tmp_path: Path) -> None:
    create_files(tmp_path / "me.png")
    (tmp_path / "me.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InvalidImageError, match=r"me\.txt' is neither UTF-8, UTF-16 nor cp1252"):
        list_subjects(tmp_path)
    (tmp_path / "me.txt").write_text("x" * 100_000)
    with pytest.raises(InvalidImageError, match=r"me\.txt' is longer than 64000 bytes"):
        list_subjects(tmp_path)


def test_list_subjects_counts_photos_without_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {**image_formats._DECODERS, "HEIC": ("no_such_module", "x")}
    monkeypatch.setattr(image_formats, "_DECODERS", missing)
    create_files(
        *(tmp_path / "ben" / name for name in ("1.JPG", "2.HEIC", "3.heif", "4.tiff", "5.Nef")),
        *(tmp_path / name for name in ("zoe.dng", "adam.avif", "notes.pdf")),
        tmp_path / "carl/IMG_1.heic",
    )
    reasons: list[str] = []
    skipped: list[SkippedPhoto] = []
    subjects = list_subjects(tmp_path, reasons, skipped_photos=skipped)
    assert [(s.name, [p.name for p in s.photos]) for s in subjects] == [
        ("adam", ["adam.avif"]),
        ("ben", ["1.JPG", "4.tiff"]),
    ]
    raw, heic = reasons
    assert raw.startswith("2 photos skipped (zoe.dng, ben/5.Nef), each is a camera RAW file,")
    assert heic.startswith("3 photos skipped (ben/2.HEIC, ben/3.heif, carl/IMG_1.heic), each is")
    assert "pip install 'hyperlora[heif]'" in heic
    assert len(skipped) == 5
    assert len(list_subjects(tmp_path)) == 2  # no whole subject is lost without a word
    (tmp_path / "ben/1.JPG").unlink()
    for name in ("ben/4.tiff", "adam.avif"):
        (tmp_path / name).unlink()
    with pytest.raises(InvalidImageError, match=r"no photo that can be used, 2 photos skipped \("):
        list_subjects(tmp_path)


def test_list_subjects_counts_photos_in_nested_folders(tmp_path: Path) -> None:
    create_files(
        *(tmp_path / name for name in ("anna/1.png", "anna/2023/2.jpg", "anna/2023/may/3.HEIC")),
        *(tmp_path / name for name in ("ben/a/b/c/d/e/4.png", "anna/notes/x.txt", "zoe.png")),
        *(tmp_path / name for name in ("anna/.cache/5.png", "anna/__MACOSX/._1.png")),
    )
    (tmp_path / "anna/2023/may/again").symlink_to(tmp_path / "anna/2023")
    (tmp_path / "zoe").mkdir()
    (tmp_path / "zoe/out").symlink_to(tmp_path.parent)
    reasons: list[str] = []
    skipped: list[SkippedPhoto] = []
    subjects = list_subjects(tmp_path, reasons, skipped_photos=skipped)
    assert [(s.name, [p.name for p in s.photos]) for s in subjects] == [
        ("anna", ["1.png"]),
        ("zoe", ["zoe.png"]),
    ]
    nested, link = reasons
    assert nested.startswith(
        "3 photos skipped (anna/2023/2.jpg, anna/2023/may/3.HEIC, ben/a/b/c/d/e/4.png), each is a "
        "photo in a folder within the folder of a subject"
    )
    assert "1 photos skipped (zoe/out), each is a link out of the folder" in link
    assert len(skipped) == 4
    (tmp_path / "anna/1.png").unlink()
    (tmp_path / "zoe.png").unlink()
    with pytest.raises(InvalidImageError, match=r"name one level deeper, as .*anna'"):
        list_subjects(tmp_path)


def test_list_subjects_reads_every_format_in_any_case(tmp_path: Path) -> None:
    names = ["a.Jpg", "b.JFIF", "c.mpo", "d.TIF", "e.tiff", "f.BMP", "g.gif", "h.avif", "i.jp2"]
    create_files(*(tmp_path / "anna" / name for name in names))
    assert [p.name for p in list_subjects(tmp_path)[0].photos] == names


def test_list_subjects_ignores_what_systems_add(tmp_path: Path) -> None:
    create_files(
        *(tmp_path / "anna" / name for name in ("1.png", "._1.png", ".DS_Store", "Thumbs.db")),
        *(tmp_path / name for name in ("__MACOSX/x.png", "@eaDir/x.jpg", "Thumbs.db", "._b.jpg")),
    )
    reasons: list[str] = []
    assert [s.photos for s in list_subjects(tmp_path, reasons)] == [(tmp_path / "anna/1.png",)]
    assert reasons == []


def test_list_subjects_counts_links_and_twins(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    create_files(folder / "me/1.png", folder / "zoe.jpg", folder / "zoe.png", outside / "x.png")
    (folder / "me/2.png").symlink_to(outside / "x.png")
    (folder / "me/3.png").symlink_to(folder / "nothing.png")
    (folder / "they").symlink_to(outside)
    reasons: list[str] = []
    assert [s.name for s in list_subjects(folder, reasons)] == ["me", "zoe"]
    assert sorted(reason.partition(":")[0] for reason in reasons) == [
        "1 photos skipped (me/3.png), each is a link to a file that is not there",
        "1 photos skipped (zoe.png), each is a photo with the name of 'zoe.jpg'",
        "2 photos skipped (they, me/2.png), each is a link out of the folder",
    ]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["10_sks person", "1_person"], {"sks person": 10, "person": 1}),
        (["25_ohwx woman"], {"ohwx woman": 25}),
        (["3_a_b", "3_c"], {"a_b": 3, "c": 3}),
        (["0_unused", "4_dog"], {"dog": 4}),
        (["1_anna", "2_ben", "3_carl"], {"1_anna": 1, "2_ben": 1, "3_carl": 1}),  # numbering
        (["10_anna", "zoe"], {"10_anna": 1, "zoe": 1}),
        (["10_anna", "2_anna"], {"10_anna": 1, "2_anna": 1}),  # perhaps two people
        (["007_anna", "009_ben"], {"007_anna": 1, "009_ben": 1}),
    ],
)
def test_list_subjects_reads_repeats_of_kohya(
    tmp_path: Path, folders: list[str], expected: dict[str, int]
) -> None:
    create_files(*(tmp_path / folder / "x.png" for folder in folders))
    assert {s.name: s.repeats for s in list_subjects(tmp_path, [])} == expected
