"""How far a build is."""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from data_builder.build.chunk_store import ChunkStore
from data_builder.build.plan import read_plan


@dataclass(frozen=True)
class BuildStatus:
    """``num_rows`` of LoRAs finished of ``num_planned``; ``loras_per_hour`` and ``eta_s`` are None before the first."""

    num_planned: int
    num_finished: int
    num_rows: int
    num_chunks: int
    num_pending_chunks: int
    loras_per_hour: float | None
    eta_s: float | None
    skipped: tuple[str, ...]


def read_status(folder: Path) -> BuildStatus:
    """Raises ``InvalidArgumentError`` for a folder without a plan."""
    store = ChunkStore(read_plan(folder), folder)
    pending = store.list_pending_chunks()
    num_pending = sum(len(store.plan.get_chunk(number)) for number in pending)
    num_planned, loras_per_hour = len(store.plan.rows), store.compute_throughput()
    return BuildStatus(
        num_planned,
        num_planned - num_pending,
        store.count_rows(),
        store.plan.num_chunks,
        len(pending),
        loras_per_hour,
        num_pending / loras_per_hour * 3600 if loras_per_hour else None,
        (*store.plan.skipped, *store.list_skip_reasons()),
    )


def make_table(status: BuildStatus, name: str) -> Table:
    table = Table(title=name, show_header=False)
    table.add_row("LoRAs", f"{status.num_finished} of {status.num_planned}")
    table.add_row("chunks left", f"{status.num_pending_chunks} of {status.num_chunks}")
    table.add_row(
        "rate", f"{status.loras_per_hour:,.0f} LoRAs/hour" if status.loras_per_hour else "–"
    )
    table.add_row("time left", _format_duration(status.eta_s) if status.eta_s is not None else "–")
    table.add_row("skipped", str(len(status.skipped)))
    return table


def to_dict(status: BuildStatus) -> dict[str, object]:
    return asdict(status)


def _format_duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
