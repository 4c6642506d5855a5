"""Chunks of a build on disk: a chunk is finished once its shard stands under its final name."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypedDict

from filelock import FileLock, Timeout

from data_builder.build.plan import PLAN_KEY, SKIPPED_KEY, Plan, read_plan
from hyperlora.data.lora_shards import Shard, open_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.progress import track

LOG_FILE: Final = "log.jsonl"


class ChunkResult(NamedTuple):
    """A chunk that was built.

    Attributes:
        number: Number of the chunk in the plan.
        shard: Bytes of its shard.
        seconds: Time that building took.
    """

    number: int
    shard: bytes
    seconds: float


class _LogEntry(TypedDict):
    """A line of the log."""

    chunk: int
    rows: int
    seconds: float
    timestamp: float


@dataclass(frozen=True)
class ChunkStore:
    """Shards of a plan in a folder.

    Attributes:
        plan: Plan of the build.
        folder: Folder of the build; shards lie in ``chunks/``.
    """

    plan: Plan
    folder: Path

    def get_path(self, number: int) -> Path:
        """Return the path of a chunk's shard."""
        return self.folder / "chunks" / f"{number:06d}.safetensors"

    def check_finished_chunks(self) -> None:
        """Raise what ``open_chunk`` raises if a finished chunk is damaged or of another plan."""
        for number in self.list_finished_chunks():
            self.open_chunk(number)

    def list_finished_chunks(self) -> list[int]:
        """List the numbers of chunks whose shard exists."""
        return [number for number in range(self.plan.num_chunks) if self.get_path(number).is_file()]

    def list_pending_chunks(self) -> list[int]:
        """List the numbers of chunks whose shard is missing."""
        finished = set(self.list_finished_chunks())
        return [number for number in range(self.plan.num_chunks) if number not in finished]

    def open_chunk(self, number: int) -> Shard:
        """Open the shard of a finished chunk.

        Raises:
            InvalidArgumentError: If the chunk belongs to another plan.
            InvalidLoraFileError: If the shard is damaged.
        """
        shard = open_shard(self.get_path(number))
        if shard.metadata.get(PLAN_KEY) != self.plan.fingerprint:
            raise InvalidArgumentError(
                f"chunk {number} in {str(self.folder)!r} was made by another plan: remove the file"
            )
        return shard

    def write_chunk(self, number: int, data: bytes, seconds: float) -> None:
        """Write a shard as a whole under its final name, then append a line to the log.

        Args:
            number: Number of the chunk.
            data: Bytes of the shard.
            seconds: Time that building took, for ``compute_throughput``.
        """
        write_bytes(data, self.get_path(number))
        num_rows = len(self.plan.get_chunk(number))
        entry: _LogEntry = {
            "chunk": number,
            "rows": num_rows,
            "seconds": seconds,
            "timestamp": time.time(),
        }
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def compute_throughput(self, num_chunks: int = 20) -> float | None:
        """Compute the LoRAs per hour over the last ``num_chunks`` chunks; None before the first."""
        entries = list(self._read_log())[-num_chunks:]
        seconds = sum(entry["seconds"] for entry in entries)
        return 3600 * sum(entry["rows"] for entry in entries) / seconds if seconds > 0 else None

    def list_skip_reasons(self) -> list[str]:
        """List why rows of finished chunks are missing, one line each."""
        skip_reports = [
            self.open_chunk(number).metadata.get(SKIPPED_KEY, "")
            for number in self.list_finished_chunks()
        ]
        return [line for report in skip_reports for line in report.splitlines()]

    def count_rows(self) -> int:
        """Count the LoRAs in finished chunks."""
        return sum(len(self.open_chunk(number).rows) for number in self.list_finished_chunks())

    def _read_log(self) -> Iterator[_LogEntry]:
        file = self.folder / LOG_FILE
        text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
        for line in text.splitlines():
            if (entry := self._parse_log_line(line)) is not None:
                yield entry

    def _parse_log_line(self, line: str) -> _LogEntry | None:
        """Parse a line of the log; None for others, such as half a line of a killed run."""
        try:
            data = json.loads(line)
            entry: _LogEntry = {
                "chunk": int(data["chunk"]),
                "rows": int(data["rows"]),
                "seconds": float(data["seconds"]),
                "timestamp": float(data["timestamp"]),
            }
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        is_possible = 0 <= entry["rows"] <= len(self.plan.rows) and 0 <= entry["seconds"] < math.inf
        return entry if is_possible else None


def build_pending_chunks(
    folder: Path, build_chunks: Callable[[Plan, Sequence[int]], Iterable[ChunkResult]]
) -> int:
    """Build the pending chunks of a build and write each as soon as it is done, with a progress
    bar.

    Args:
        folder: Folder of the build.
        build_chunks: Builds the chunks of a plan with these numbers, in any order.

    Returns:
        Number of planned LoRAs in the chunks that were written.

    Raises:
        InvalidArgumentError: If ``folder`` holds no plan, or another run works in it.
    """
    plan = read_plan(folder)
    store = ChunkStore(plan, folder)
    with lock_build(folder):
        store.check_finished_chunks()
        pending = store.list_pending_chunks()
        if not pending:
            return 0
        num_pending = sum(len(plan.get_chunk(number)) for number in pending)
        results = track(
            build_chunks(plan, pending),
            "fitting",
            "LoRAs",
            total=len(plan.rows),
            units_per_item=plan.recipe.subjects_per_batch,
            time_unit="hour",
            completed=len(plan.rows) - num_pending,
        )
        for number, shard, seconds in results:
            store.write_chunk(number, shard, seconds)
        return num_pending


@contextmanager
def lock_build(folder: Path) -> Iterator[None]:
    """Lock a build against other runs and remove what a killed run left half-written.

    The lock ends with the process, however it ends.

    Raises:
        InvalidArgumentError: If another run holds the lock, or the lock is a link.
    """
    lock_path = folder / ".lock"
    if lock_path.is_symlink():  # never open what it leads to
        raise InvalidArgumentError(
            f"{str(lock_path)!r} is a link, a file of the build was expected: remove it"
        )
    try:
        lock = FileLock(lock_path).acquire(timeout=0)
    except Timeout as error:
        raise InvalidArgumentError(
            f"another run is at work in {str(folder)!r}: wait for it, or end it"
        ) from error
    with lock:  # an acquired lock, which is released at the end
        for stale_path in [*folder.glob(".*.tmp"), *folder.glob("chunks/.*.tmp")]:
            stale_path.unlink()
        yield


def check_complete(store: ChunkStore, partial: bool) -> None:
    """Check that chunks can be read as a dataset.

    Args:
        store: Chunks of the build.
        partial: Whether one finished chunk is enough.

    Raises:
        InvalidArgumentError: If no chunk is finished, or, unless ``partial``, one is pending.
    """
    if not store.list_finished_chunks():
        raise InvalidArgumentError(
            f"no chunk of {str(store.folder)!r} is finished: data-builder run {store.folder}"
        )
    if (pending := store.list_pending_chunks()) and not partial:
        raise InvalidArgumentError(
            f"{len(pending)} of {store.plan.num_chunks} chunks are not finished: "
            f"data-builder run {store.folder}, or take what there is with --partial"
        )
