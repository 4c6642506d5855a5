"""Draw people into a folder, count them, and show the first on a sheet."""

import io
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image
from rich.table import Table

from data_builder.people.config import PeopleConfig
from data_builder.people.draw_person import PersonRecord, draw_person, make_person_name
from data_builder.people.face_matcher import FaceMatcher
from data_builder.people.identity_keeper import IdentityKeeper
from data_builder.people.people_folder import SHEET_FILE, PeopleFolder
from hyperlora.data.contact_sheet import draw_contact_sheet
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.progress import track

_NUM_SHEET_PEOPLE: Final = 12
_SHEET_CELL_SIZE: Final = 128


@dataclass(frozen=True)
class PeopleSummary:
    """What a folder of people holds.

    Attributes:
        num_people: People that were drawn.
        num_kept: People that were kept.
        num_images: Images that were drawn besides references.
        num_agreeing: Images whose face agrees with the reference, also of people that were dropped.
        num_kept_images: Photos in the folders, references among them.
        duration_s: Seconds that all people took.
        reasons: Dropped people by reason.
    """

    num_people: int
    num_kept: int
    num_images: int
    num_agreeing: int
    num_kept_images: int
    duration_s: float
    reasons: Mapping[str, int]


def draw_people(
    folder: Path,
    count: int,
    config: PeopleConfig,
    load_tools: Callable[[], tuple[IdentityKeeper, FaceMatcher]],
) -> PeopleSummary:
    """Draw the people that a folder still lacks; a run may be killed and started again.

    Args:
        folder: The folder.
        count: People that the folder shall have drawn, kept or not.
        config: The settings.
        load_tools: Loads what draws and what compares faces; called if people are missing.

    Returns:
        What the folder holds.

    Raises:
        InvalidArgumentError: ``count`` is below 1, or the folder was begun with other settings.
    """
    if count < 1:
        raise InvalidArgumentError(f"--count of at least 1 expected, got {count}")
    people_folder = PeopleFolder(folder)
    people_folder.check_settings(config)
    is_finished = not _list_missing(count, {r.person for r in people_folder.read_records()})
    tools = None if is_finished else load_tools()  # fails before anything is written
    with people_folder.open(config) as records:
        if tools is not None:
            keeper, matcher = tools
            missing = _list_missing(count, records)
            bar = {"total": count, "completed": count - len(missing)}
            for number in track(missing, "drawing people", "people", time_unit="hour", **bar):
                person = draw_person(number, config, keeper, matcher)
                people_folder.add_person(person)
                records[person.record.person] = person.record
        ordered_records = [records[name] for name in sorted(records)]
        write_sheet(folder, ordered_records)
    return summarize_people(ordered_records, config)


def summarize_people(records: Sequence[PersonRecord], config: PeopleConfig) -> PeopleSummary:
    """Count people and images.

    Args:
        records: All people of a folder.
        config: The settings.

    Returns:
        The numbers.
    """
    images = [image for record in records for image in record.images]
    kept = [record for record in records if record.kept]
    similarities = [image.similarity for image in images if image.similarity is not None]
    return PeopleSummary(
        num_people=len(records),
        num_kept=len(kept),
        num_images=len(images),
        num_agreeing=sum(value >= config.min_similarity for value in similarities),
        num_kept_images=sum(1 + _count_files(record) for record in kept),
        duration_s=sum(record.duration_s for record in records),
        reasons=Counter(record.reason for record in records if not record.kept),
    )


def make_table(summary: PeopleSummary, title: str) -> Table:
    """Make the table that ``data-builder people`` prints.

    Args:
        summary: What the folder holds.
        title: Title of the table.

    Returns:
        A table of two columns.
    """
    table = Table(title=title, show_header=False)
    rate = summary.num_people / summary.duration_s * 3600 if summary.duration_s else 0.0
    share = summary.num_agreeing / summary.num_images if summary.num_images else 0.0
    table.add_row("people per hour", f"{rate:,.0f}")
    table.add_row(
        "images whose faces agree", f"{summary.num_agreeing} of {summary.num_images} ({share:.0%})"
    )
    table.add_row("people kept", f"{summary.num_kept} of {summary.num_people}")
    for reason, number in sorted(summary.reasons.items()):
        table.add_row(f"dropped: {reason}", str(number))
    table.add_row("photos", str(summary.num_kept_images))
    return table


def write_sheet(folder: Path, records: Sequence[PersonRecord]) -> None:
    """Write ``sheet.png``: a row for each of the first people, its reference on the left.

    Args:
        folder: Folder of the people.
        records: All people; without a kept one, nothing is written.
    """
    shown = [record for record in records if record.kept][:_NUM_SHEET_PEOPLE]
    if not shown:
        return
    num_columns = 1 + max(_count_files(record) for record in shown)
    blank = Image.new("RGB", (_SHEET_CELL_SIZE,) * 2, "white")
    grid: list[list[Image.Image]] = []
    for record in shown:
        row = []
        for i in range(1 + _count_files(record)):
            with Image.open(folder / record.person / f"{i}.png") as image:
                row.append(image.convert("RGB"))
        grid.append(row + [blank] * (num_columns - len(row)))
    titles = ["reference", *map(str, range(1, num_columns))]
    labels = [record.person for record in shown]
    buffer = io.BytesIO()
    draw_contact_sheet(titles, grid, _SHEET_CELL_SIZE, labels).save(buffer, "PNG")
    write_bytes(buffer.getvalue(), folder / SHEET_FILE)


def _list_missing(count: int, names: Collection[str]) -> list[int]:
    """Numbers of people that are not among the names."""
    return [number for number in range(count) if make_person_name(number) not in names]


def _count_files(record: PersonRecord) -> int:
    """Images in a person's folder besides the reference."""
    return sum(image.file is not None for image in record.images)
