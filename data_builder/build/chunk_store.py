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
from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import write_bytes

LOG: Final = "log.jsonl"


@dataclass(frozen=True)
class Chunks:
    """Where the shards of ``plan`` lie in ``folder``."""

    plan: Plan
    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / "chunks" / f"{number:06d}.safetensors"

    def check(self) -> None:
        """Raises what ``open`` raises for any finished chunk."""
        for number in self.done():
            self.open(number)

    def done(self) -> list[int]:
        return [number for number in range(self.plan.chunks) if self.path(number).is_file()]

    def left(self) -> list[int]:
        return [number for number in range(self.plan.chunks) if not self.path(number).is_file()]

    def open(self, number: int) -> Shard:
        """Raises ``BadRequest`` for a chunk of another plan, ``BadLoraFile`` for one that is damaged."""
        shard = open_shard(self.path(number))
        if shard.notes.get("hyperlora.plan") != self.plan.digest:
            raise BadRequest(f"chunk {number} in {str(self.folder)!r} was made by another plan: remove the file")
        return shard

    def write(self, number: int, data: bytes, seconds: float) -> None:
        """The shard whole under its name, or not at all; then a line of the log, which may be lost."""
        write_bytes(data, self.path(number))
        rows = len(self.plan.chunk(number))
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps({"chunk": number, "rows": rows, "seconds": seconds, "at": time.time()}) + "\n")

    def rate(self, last: int = 20) -> float | None:
        """LoRAs per hour of work over the ``last`` chunks, whoever made them; None before the first."""
        lines = list(self._log())[-last:]
        seconds = sum(line["seconds"] for line in lines)
        return 3600 * sum(line["rows"] for line in lines) / seconds if seconds > 0 else None

    def skipped(self) -> list[str]:
        """Why rows of finished chunks are missing."""
        notes = [self.open(number).notes.get("hyperlora.skipped", "") for number in self.done()]
        return [line for note in notes for line in note.splitlines()]

    def rows(self) -> int:
        """LoRAs in finished chunks."""
        return sum(len(self.open(number).rows) for number in self.done())

    def _log(self) -> Iterator[dict[str, float]]:
        file = self.folder / LOG
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                yield json.loads(line)
            except ValueError:  # a killed run may leave half a line
                continue


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a build while this one writes; the lock ends with the process, however it ends. What a
    killed run left half-written is removed. Raises ``BadRequest`` if another run is at work."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(f"another run is at work in {str(folder)!r}: wait for it, or end it") from error
        for left in [*folder.glob(".*.tmp"), *folder.glob("chunks/.*.tmp")]:
            left.unlink()
        yield


def require_whole(chunks: Chunks, partial: bool) -> None:
    """Raise ``BadRequest`` if chunks are missing (unless ``partial``, and then if there is none at all)."""
    if not chunks.done():
        raise BadRequest(f"no chunk of {str(chunks.folder)!r} is finished: data-builder run {chunks.folder}")
    if (left := chunks.left()) and not partial:
        raise BadRequest(
            f"{len(left)} of {chunks.plan.chunks} chunks are not finished: data-builder run {chunks.folder}, "
            "or take what there is with --partial"
        )
