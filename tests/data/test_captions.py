"""Captions in every spelling: encodings, places and names."""

import json
from pathlib import Path

import pytest

from hyperlora.data.captions import CaptionReader, decode_text, parse_caption
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidImageError


def create_photos(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("a café – “quoted”", "cp1252"),
        ("Zoë’s naïve photo", "cp1252"),
        ("a café – 照片", "utf-8"),
        ("a café – 照片", "utf-8-sig"),
        ("a café – 照片", "utf-16"),
        ("a portrait", "utf-16-le"),
        ("a portrait", "utf-16-be"),
        ("照片 at sea", "utf-32"),
    ],
)
def test_encodings_are_recognized(text: str, encoding: str, tmp_path: Path) -> None:
    assert decode_text(text.encode(encoding)) == text
    create_photos(tmp_path, "x.jpg")
    (tmp_path / "x.txt").write_bytes(f"\n{text}\r\nmore".encode(encoding))
    assert CaptionReader(tmp_path).read(tmp_path / "x.jpg") == text


@pytest.mark.parametrize("data", ["一个人的照片".encode("gbk"), b"a\x81b", b"\xff\xfea"])
def test_other_encodings_are_refused(data: bytes, tmp_path: Path) -> None:
    create_photos(tmp_path, "x.jpg")
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(InvalidImageError, match=r"x\.txt' is neither UTF-8, UTF-16 nor cp1252"):
        list_subjects(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{}", "a {red|blue} hat, {0}, {name}, {", "(smile:1.2), <lora:x:1>, \\(name\\), 100%, $a"],
)
def test_caption_is_literal(text: str, tmp_path: Path) -> None:
    create_photos(tmp_path, "x.jpg")
    (tmp_path / "x.txt").write_text(text)
    assert list_subjects(tmp_path)[0].captions == (text,)


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", ".Caption"])
def test_suffixes_are_read_in_any_case(suffix: str, tmp_path: Path) -> None:
    create_photos(tmp_path, "anna/1.JPG", "anna/2.jpg")
    (tmp_path / f"anna/1{suffix}").write_text("by the sea")
    assert list_subjects(tmp_path)[0].captions == ("by the sea", None)


def test_names_of_both_unicode_forms_meet(tmp_path: Path) -> None:
    create_photos(tmp_path, "u\u0308ber.png")
    (tmp_path / "\u00fcber.txt").write_text("x")
    assert list_subjects(tmp_path)[0].captions == ("x",)


def test_blank_txt_gives_way_to_caption_and_both_to_metadata(tmp_path: Path) -> None:
    create_photos(tmp_path, "anna/1.png", "anna/2.png", "anna/3.png")
    (tmp_path / "anna/1.txt").write_text(" \n\t\n")
    (tmp_path / "anna/1.caption").write_text("one")
    (tmp_path / "anna/2.txt").write_text("two of the text")
    rows = [{"file_name": "2.png", "text": "two"}, {"file_name": "./3.png", "caption": "three"}]
    (tmp_path / "anna/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list_subjects(tmp_path)[0].captions == ("one", "two", "three")


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b'file_name,text\n1.png,"a hat, red"\n2.png,\n', ("a hat, red", None)),
        ("file_name;text\n1.png;Zoë’s hat\n2.png;x\n".encode("cp1252"), ("Zoë’s hat", "x")),
        ("file_name\ttext\n1.png\ta\n2.png\tb\n".encode("utf-16"), ("a", "b")),
    ],
    ids=["comma", "semicolon in cp1252", "tab in UTF-16"],
)
def test_tables_of_spreadsheets_are_read(
    data: bytes, captions: tuple[str | None, ...], tmp_path: Path
) -> None:
    create_photos(tmp_path, "zoe/1.png", "zoe/2.png")
    (tmp_path / "zoe/metadata.csv").write_bytes(data)
    assert list_subjects(tmp_path)[0].captions == captions


def test_rows_with_backslashes_name_files(tmp_path: Path) -> None:
    create_photos(tmp_path, "zoe/1.png", "3.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "zoe\\\\1.png", "text": "t"}')
    reasons: list[str] = []
    (subject,) = list_subjects(tmp_path, reasons)
    assert (subject.name, subject.captions) == ("zoe", ("t",))
    assert reasons == [
        "1 photos skipped (3.png), each is a photo without a row in the metadata: add one"
    ]


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, None),
        ("", None),
        (" \n", None),
        (float("nan"), None),
        ("a\n b ", "a b"),
        (["first", "second"], "first"),
        ([], None),
        ("Zoë".encode("cp1252"), "Zoë"),
        (7, "7"),
    ],
)
def test_cells_of_datasets_are_parsed(value: object, caption: str | None) -> None:
    assert parse_caption(value) == caption
