"""Paths are found whichever way their accents are written."""

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from hyperlora.data.images import list_image_files, read_image
from hyperlora.data.open_subject_source import open_subject_source
from hyperlora.data.subjects import list_subjects
from hyperlora.paths import find_path

IMAGE = Image.new("RGB", (20, 12), (200, 160, 120))
NAMES = ("Zoé", "Ångström", "ゴジラ", "강아지", "ñandú/São Tomé/ü.x")


def write_form(path: str, form: str) -> str:
    return unicodedata.normalize(form, path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_find_path_finds_equal_letters(tmp_path: Path, name: str, stored: str, typed: str) -> None:
    path = tmp_path / write_form(name, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    assert find_path(tmp_path / write_form(name, typed)) == path
    assert find_path(path) == path


def test_find_path_works_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(write_form("é/ß ç.txt", "NFD"))
    path.parent.mkdir()
    path.touch()
    assert find_path(Path(write_form("./é/ß ç.txt", "NFC"))) == path


def test_find_path_never_guesses(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / write_form("é", form)).write_text(form)
    for form in ("NFC", "NFD"):  # both are there: each is itself
        assert find_path(tmp_path / write_form("é", form)).read_text() == form
    # two files of equal letters, neither written as here
    for mixed in ("e\u0301\u00e9", "\u00e9e\u0301"):
        (tmp_path / mixed).touch()
    missing = tmp_path / "\u00e9\u00e9"
    assert find_path(missing) == missing
    for odd in (tmp_path / "É", tmp_path / "none" / "é", tmp_path / ("é" * 300), Path("é\0")):
        assert find_path(odd) == odd


def test_photos_and_folders_are_found_by_equal_letters(tmp_path: Path) -> None:
    folder = tmp_path / write_form("Familie Müller", "NFD")
    (folder / "anna").mkdir(parents=True)
    IMAGE.save(folder / "anna" / (write_form("jürgen", "NFD") + ".png"))
    typed = tmp_path / write_form("Familie Müller", "NFC")
    assert read_image(typed / "anna" / (write_form("jürgen", "NFC") + ".png")).size == IMAGE.size
    assert len(list_image_files(typed / "anna")) == 1
    (subject,) = open_subject_source(str(typed)).list_subjects()
    assert (subject.name, subject.photos[0].read_image().size) == ("anna", IMAGE.size)


def test_rows_of_metadata_find_files_by_equal_letters(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / (write_form("zoë", "NFD") + ".png"))
    row = f'{{"file_name": "{write_form("zoë", "NFC")}.png", "person_id": "z", "text": "a cat"}}'
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    skip_reasons: list[str] = []
    (subject,) = list_subjects(tmp_path, skip_reasons)
    assert (subject.name, subject.captions, skip_reasons) == ("z", ("a cat",), [])
