"""Progress of a build."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from data_builder.build.chunk_store import ChunkStore
from data_builder.build.plan import read_plan


@dataclass(frozen=True)
class BuildStatus:
    """Progress of a build, also the JSON of ``data-builder status --json``.

    Attributes:
        num_planned: LoRAs in the plan.
        num_finished: LoRAs in finished chunks, with those that were skipped.
        num_rows: LoRAs that finished chunks hold.
        num_chunks: Chunks in the plan.
        num_pending_chunks: Chunks that are not finished.
        loras_per_hour: Recent throughput; None before the first chunk.
        eta_s: Estimated seconds to the end; None before the first chunk.
        skipped: Photos and subjects that were left out, with reasons.
    """

    num_planned: int
    num_finished: int
    num_rows: int
    num_chunks: int
    num_pending_chunks: int
    loras_per_hour: float | None
    eta_s: float | None
    skipped: tuple[str, ...]


def read_status(folder: Path) -> BuildStatus:
    """Read the progress of the build in ``folder``.

    Raises:
        InvalidArgumentError: If the folder holds no plan.
    """
    store = ChunkStore(read_plan(folder), folder)
    pending = store.list_pending_chunks()
    num_pending = sum(len(store.plan.get_chunk(number)) for number in pending)
    num_planned, loras_per_hour = len(store.plan.rows), store.compute_throughput()
    return BuildStatus(
        num_planned=num_planned,
        num_finished=num_planned - num_pending,
        num_rows=store.count_rows(),
        num_chunks=store.plan.num_chunks,
        num_pending_chunks=len(pending),
        loras_per_hour=loras_per_hour,
        eta_s=num_pending / loras_per_hour * 3600 if loras_per_hour else None,
        skipped=(*store.plan.skipped, *store.list_skip_reasons()),
    )


def make_table(status: BuildStatus, title: str) -> Table:
    """Make the table that ``data-builder status`` prints.

    Args:
        status: Progress of the build.
        title: Title of the table.

    Returns:
        A table of two columns.
    """
    rate = f"{status.loras_per_hour:,.0f} LoRAs/hour" if status.loras_per_hour else "–"
    table = Table(title=title, show_header=False)
    table.add_row("LoRAs", f"{status.num_finished} of {status.num_planned}")
    table.add_row("chunks left", f"{status.num_pending_chunks} of {status.num_chunks}")
    table.add_row("rate", rate)
    table.add_row("time left", _format_duration(status.eta_s) if status.eta_s is not None else "–")
    table.add_row("skipped", str(len(status.skipped)))
    return table


def _format_duration(seconds: float) -> str:
    """Format seconds as hours:minutes:seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
