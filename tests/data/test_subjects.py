"""Subjects in folders of photos."""

from pathlib import Path

import pytest

from hyperlora.data.subjects import Subject, list_subjects
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


def test_list_subjects_names_invalid_folders(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidImageError, match="holds no subject: put PNG, JPEG or WEBP images there"
    ):
        list_subjects(tmp_path)
    with pytest.raises(InvalidImageError, match="there is no folder"):
        list_subjects(tmp_path / "missing")
    create_files(tmp_path / "adam.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidImageError, match="empty' holds no PNG, JPEG or WEBP image"):
        list_subjects(tmp_path)
    create_files(tmp_path / "empty/1.png", tmp_path / "adam.jpg")
    with pytest.raises(InvalidImageError, match="two subjects called 'adam'"):
        list_subjects(tmp_path)


def test_list_subjects_names_invalid_captions(tmp_path: Path) -> None:
    create_files(tmp_path / "me.png")
    (tmp_path / "me.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InvalidImageError, match=r"me\.txt' cannot be read as UTF-8 text"):
        list_subjects(tmp_path)
    (tmp_path / "me.txt").write_text("x" * 100_000)
    with pytest.raises(InvalidImageError, match=r"me\.txt' is longer than 64000 bytes"):
        list_subjects(tmp_path)
