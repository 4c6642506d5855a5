"""How far a build is."""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from data_builder.build.chunk_store import Chunks
from data_builder.build.plan import read_plan


@dataclass(frozen=True)
class Status:
    """``rows`` of LoRAs finished of ``planned``; ``per_hour`` and ``seconds_left`` are None before the first."""

    planned: int
    finished: int
    rows: int
    chunks: int
    chunks_left: int
    per_hour: float | None
    seconds_left: float | None
    skipped: tuple[str, ...]


def status(folder: Path) -> Status:
    """Raises ``BadRequest`` for a folder without a plan."""
    chunks = Chunks(read_plan(folder), folder)
    left = chunks.left()
    waiting = sum(len(chunks.plan.chunk(number)) for number in left)
    planned, rate = len(chunks.plan.rows), chunks.rate()
    return Status(
        planned, planned - waiting, chunks.rows(), chunks.plan.chunks, len(left), rate,
        waiting / rate * 3600 if rate else None, (*chunks.plan.skipped, *chunks.skipped()),
    )  # fmt: skip


def as_table(found: Status, name: str) -> Table:
    table = Table(title=name, show_header=False)
    table.add_row("LoRAs", f"{found.finished} of {found.planned}")
    table.add_row("chunks left", f"{found.chunks_left} of {found.chunks}")
    table.add_row("rate", f"{found.per_hour:,.0f} LoRAs/hour" if found.per_hour else "–")
    table.add_row("time left", _clock(found.seconds_left) if found.seconds_left is not None else "–")
    table.add_row("skipped", str(len(found.skipped)))
    return table


def as_dict(found: Status) -> dict[str, object]:
    return asdict(found)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
