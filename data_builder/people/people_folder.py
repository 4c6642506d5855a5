"""``PeopleFolder``: people on disk, each whole or not there, and the settings they were drawn with.

``settings.json`` holds the settings, and ``people.jsonl`` one line per person that was drawn, kept
or not. A kept person has a folder ``person-00000`` of ``0.png``, the reference, further images, and
a caption beside each.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from data_builder.build.chunk_store import lock_build
from data_builder.people.config import PeopleConfig
from data_builder.people.draw_person import DrawnPerson, ImageRecord, PersonRecord
from hyperlora.data.subject_layouts import PEOPLE_FILE
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes

SETTINGS_FILE: Final = "settings.json"
SHEET_FILE: Final = "sheet.png"
_TEMP_SUFFIX: Final = ".part"
_PATH_FIELDS: Final = ("base", "model", "ip_adapter", "face_pack")
"""Settings that are a path, or the name of something on the hub."""


class PeopleFolder:
    """The folder that people are drawn into.

    Args:
        path: The folder, which may be missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def open(self, config: PeopleConfig) -> Iterator[dict[str, PersonRecord]]:
        """Lock the folder, check its settings and clean up after a killed run.

        Args:
            config: The settings of this run; a new folder records them.

        Yields:
            The people that are there, by name.

        Raises:
            InvalidArgumentError: The folder was begun with other settings, or is in use.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_build(self.path):
            self.check_settings(config)
            if not (self.path / SETTINGS_FILE).exists():
                settings = json.dumps(_to_settings(config), indent=1)
                write_bytes(settings.encode(), self.path / SETTINGS_FILE)
            for stale_dir in self.path.glob(f".person-*{_TEMP_SUFFIX}"):
                shutil.rmtree(stale_dir)
            self._remove_half_line()
            yield {record.person: record for record in self.read_records()}

    def read_records(self) -> Iterator[PersonRecord]:
        """Read ``people.jsonl``, without a last line that a killed run did not end.

        Yields:
            The people in the order in which they were drawn.

        Raises:
            InvalidArgumentError: A line is damaged.
        """
        file = self.path / PEOPLE_FILE
        if not file.exists():
            return
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                images = tuple(ImageRecord(**image) for image in row["images"])
                yield PersonRecord(**{**row, "images": images})
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(
                    f"{str(file)!r}, line {number}, is no person: delete the line, and that "
                    "person is drawn again"
                ) from error

    def add_person(self, person: DrawnPerson) -> None:
        """Write a person: its folder if it was kept, then its line, each whole or not at all."""
        record = person.record
        if record.kept:
            temp_dir = self.path / f".{record.person}{_TEMP_SUFFIX}"
            temp_dir.mkdir()
            for i, (image, caption) in enumerate(zip(person.images, person.captions, strict=True)):
                image.save(temp_dir / f"{i}.png")
                (temp_dir / f"{i}.txt").write_text(f"{caption}\n", encoding="utf-8")
            person_dir = self.path / record.person
            if person_dir.exists():  # of a run that was killed before it wrote the line
                shutil.rmtree(person_dir)
            os.replace(temp_dir, person_dir)
        with (self.path / PEOPLE_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check_settings(self, config: PeopleConfig) -> None:
        """Check that a folder was begun with these settings, or is empty; nothing is written.

        Raises:
            InvalidArgumentError: It was begun with others, or holds something else.
        """
        file = self.path / SETTINGS_FILE
        if not file.exists():
            if self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
                raise InvalidArgumentError(
                    f"{str(self.path)!r} holds files of something else, an empty or new folder "
                    "expected: choose another one"
                )
            return
        try:
            old_settings = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"{str(file)!r} is damaged: choose another folder"
            ) from error
        new_settings = json.loads(json.dumps(_to_settings(config)))
        for name, value in new_settings.items():
            if (old_value := old_settings.get(name)) != value:
                option = name.replace("_", "-")
                difference = (
                    f"other --{option}"
                    if isinstance(value, list)
                    else f"--{option} {_format(old_value)}, not {_format(value)}"
                )
                raise InvalidArgumentError(
                    f"{str(self.path)!r} was begun with {difference}: "
                    "use the same settings, or choose another folder"
                )

    def _remove_half_line(self) -> None:
        """Remove a last line that a killed run did not end."""
        file = self.path / PEOPLE_FILE
        if file.exists() and not (data := file.read_bytes()).endswith(b"\n") and data:
            write_bytes(data[: data.rfind(b"\n") + 1], file)


def _to_settings(config: PeopleConfig) -> Mapping[str, object]:
    """The settings as JSON: paths as they are from everywhere, and defaults that are known."""
    settings = asdict(config) | {"min_images": config.num_required_images}
    for name in _PATH_FIELDS:
        if settings[name] is not None and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def _format(value: object) -> str:
    """A value of an option for a sentence."""
    return "its default" if value is None else str(value)
