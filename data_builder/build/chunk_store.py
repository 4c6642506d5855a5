"""The chunks of a build on disk: finished when its shard stands under its final name, otherwise not begun."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_builder.build.plan import Plan
from hyperlora.data.lora_shards import Shard, open_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes

LOG_FILE: Final = "log.jsonl"


@dataclass(frozen=True)
class ChunkStore:
    """Where the shards of ``plan`` lie in ``folder``."""

    plan: Plan
    folder: Path

    def get_path(self, number: int) -> Path:
        return self.folder / "chunks" / f"{number:06d}.safetensors"

    def check_finished_chunks(self) -> None:
        """Raises what ``open_chunk`` raises for any finished chunk."""
        for number in self.list_finished_chunks():
            self.open_chunk(number)

    def list_finished_chunks(self) -> list[int]:
        return [number for number in range(self.plan.num_chunks) if self.get_path(number).is_file()]

    def list_pending_chunks(self) -> list[int]:
        return [
            number for number in range(self.plan.num_chunks) if not self.get_path(number).is_file()
        ]

    def open_chunk(self, number: int) -> Shard:
        """Raises ``InvalidArgumentError`` for a chunk of another plan, ``InvalidLoraFileError`` for one that is damaged."""
        shard = open_shard(self.get_path(number))
        if shard.metadata.get("hyperlora.plan") != self.plan.fingerprint:
            raise InvalidArgumentError(
                f"chunk {number} in {str(self.folder)!r} was made by another plan: remove the file"
            )
        return shard

    def write_chunk(self, number: int, data: bytes, seconds: float) -> None:
        """The shard whole under its name, or not at all; then a line of the log, which may be lost."""
        write_bytes(data, self.get_path(number))
        rows = len(self.plan.get_chunk(number))
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(
                json.dumps({"chunk": number, "rows": rows, "seconds": seconds, "at": time.time()})
                + "\n"
            )

    def compute_throughput(self, num_chunks: int = 20) -> float | None:
        """LoRAs per hour of work over the ``num_chunks`` chunks, whoever made them; None before the first."""
        lines = list(self._read_log())[-num_chunks:]
        seconds = sum(line["seconds"] for line in lines)
        return 3600 * sum(line["rows"] for line in lines) / seconds if seconds > 0 else None

    def list_skip_reasons(self) -> list[str]:
        """Why rows of finished chunks are missing."""
        skip_reports = [
            self.open_chunk(number).metadata.get("hyperlora.skipped", "")
            for number in self.list_finished_chunks()
        ]
        return [line for note in skip_reports for line in note.splitlines()]

    def count_rows(self) -> int:
        """LoRAs in finished chunks."""
        return sum(len(self.open_chunk(number).rows) for number in self.list_finished_chunks())

    def _read_log(self) -> Iterator[dict[str, float]]:
        file = self.folder / LOG_FILE
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                yield json.loads(line)
            except ValueError:  # a killed run may leave half a line
                continue


@contextmanager
def lock_build(folder: Path) -> Iterator[None]:
    """Keep other runs out of a build while this one writes; the lock ends with the process, however it ends. What a
    killed run left half-written is removed. Raises ``InvalidArgumentError`` if another run is at work."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidArgumentError(
                f"another run is at work in {str(folder)!r}: wait for it, or end it"
            ) from error
        for stale_path in [*folder.glob(".*.tmp"), *folder.glob("chunks/.*.tmp")]:
            stale_path.unlink()
        yield


def check_complete(store: ChunkStore, partial: bool) -> None:
    """Raise ``InvalidArgumentError`` if chunks are missing (unless ``partial``, and then if there is none at all)."""
    if not store.list_finished_chunks():
        raise InvalidArgumentError(
            f"no chunk of {str(store.folder)!r} is finished: data-builder run {store.folder}"
        )
    if (pending := store.list_pending_chunks()) and not partial:
        raise InvalidArgumentError(
            f"{len(pending)} of {store.plan.num_chunks} chunks are not finished: data-builder run {store.folder}, "
            "or take what there is with --partial"
        )
