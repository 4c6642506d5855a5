"""Streams of photos: batches without an end, that go on after a restart where they were.

Subjects are read in blocks. Each block is shuffled, and a sample depends on the seed, its block and
its place alone. So the state of a stream is a few numbers: where the blocks begin whose subjects
wait for their batch, and how far the last block was used.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hyperlora.data.aspect_buckets import ImageSize
from hyperlora.data.hub_subjects import HubStream, StreamPosition
from hyperlora.data.photos import Photo, SubjectPhotos
from hyperlora.errors import InvalidImageError
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects
from hyperlora.training.datamodules.face_filter import FaceIndex, FaceRecord
from hyperlora.training.datamodules.photo_dataset import GetSize
from hyperlora.training.datamodules.photo_samples import SampleMaker, plan_sample

BLOCK_SIZE: Final = 64
"""Subjects that are shuffled together."""
_MAX_WAIT: Final = 16
"""Blocks that a subject waits for others of its size, before it is left out of this pass."""
_MAX_STREAM_FACES: Final = 100_000
"""Faces of a stream that are kept, many more than photos are at hand."""
WorkerState = dict[str, Any]
"""State of one loader process in plain values, see ``PhotoStreamDataset``."""


@dataclass(frozen=True)
class _Block:
    """Subjects that are shuffled together.

    Attributes:
        number: Number of the block among those of the process, through all passes.
        pass_number: Number of the pass through the stream.
        position: Where the block begins.
        subjects: The subjects in their shuffled order.
    """

    number: int
    pass_number: int
    position: StreamPosition
    subjects: Sequence[SubjectPhotos]

    @property
    def start(self) -> dict[str, Any]:
        """From where the block can be read again."""
        return {
            "number": self.number,
            "pass_number": self.pass_number,
            "position": self.position,
        }


@dataclass
class _Waiting:
    """Samples that wait until there are enough of their size.

    Attributes:
        samples: By size: number of the block, place in it, and sample.
        blocks: Starts of the blocks that may have such samples, and of the current block.
    """

    samples: dict[ImageSize, list[tuple[int, int, SubjectSample]]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def begin_block(self, block: _Block) -> None:
        """Leave out what has waited too long, and forget blocks that nothing waits for."""
        oldest = block.number - _MAX_WAIT
        self.samples = {
            size: [entry for entry in entries if entry[0] >= oldest]
            for size, entries in self.samples.items()
        }
        numbers = {number for entries in self.samples.values() for number, _, _ in entries}
        self.blocks = [start for start in self.blocks if start["number"] in numbers]
        self.blocks.append(block.start)

    def get_state(self, num_used: int) -> WorkerState:
        """Return the state after ``num_used`` subjects of the current block."""
        places: dict[int, list[int]] = {}
        for entries in self.samples.values():
            for number, place, _ in entries:
                places.setdefault(number, []).append(place)
        blocks = [
            start | {"places": sorted(places.get(start["number"], []))} for start in self.blocks
        ]
        kept = [block for block in blocks[:-1] if block["places"]]
        return {"blocks": [*kept, blocks[-1]], "num_used": num_used}


class PhotoStreamDataset(IterableDataset[SubjectBatch]):
    """Endless batches of subjects from a stream, each rank and loader process from its shards.

    Each batch carries the state of its loader process after it. ``states`` holds those of the
    processes after their last batch that was trained on; an iteration goes on from there.

    Args:
        stream: The stream.
        maker: Makes samples.
        batch_size: Subjects per batch.
        seed: Seed of all random choices.
        find_reason: Says why a photo is left out, or returns None.
        get_size: Returns the size of a photo's bucket; None for squares.

    Attributes:
        rank: Rank of this process, set before the first batch.
        num_ranks: Number of ranks.
        states: By the number of the loader process; a process that is missing begins at the start.
        next_worker: Process whose batch comes next.
    """

    def __init__(
        self,
        stream: HubStream,
        maker: SampleMaker,
        batch_size: int,
        seed: int,
        find_reason: Callable[[Photo], str | None] | None = None,
        get_size: GetSize | None = None,
    ) -> None:
        self.stream, self.maker, self.batch_size = stream, maker, batch_size
        self.seed, self.find_reason, self.get_size = seed, find_reason, get_size
        self.rank, self.num_ranks = 0, 1
        self.states: dict[int, WorkerState] = {}
        self.next_worker = 0

    def get_position(self, num_workers: int) -> dict[str, Any]:
        """Return the position of this rank in plain values, for a checkpoint.

        Args:
            num_workers: Loader processes.
        """
        return {
            "seed": self.seed,
            "num_ranks": self.num_ranks,
            "num_workers": num_workers,
            "next_worker": self.next_worker,
            "states": dict(self.states),
        }

    def restore_position(self, position: Mapping[str, Any], num_workers: int) -> bool:
        """Go on where a run was; undoes ``get_position``.

        Args:
            position: Of this rank.
            num_workers: Loader processes.

        Returns:
            Whether it can: only with as many ranks and loader processes as then.
        """
        if (position["num_ranks"], position["num_workers"]) != (self.num_ranks, num_workers):
            return False
        self.seed, self.next_worker = position["seed"], position["next_worker"]
        self.states = dict(position["states"])
        return True

    def record_batch(self, progress: Mapping[str, Any], num_workers: int) -> None:
        """Note that a batch is trained on.

        Args:
            progress: Of the batch.
            num_workers: Loader processes.
        """
        worker = int(progress["worker"])
        self.states[worker] = progress["state"]
        self.next_worker = (worker + 1) % max(1, num_workers)

    def __iter__(self) -> Iterator[SubjectBatch]:
        """Iterate over batches without an end; see ``PhotoStreamLoader`` for what is None."""
        worker = info.id if (info := get_worker_info()) else 0
        if worker < self.next_worker:
            yield cast(SubjectBatch, None)
        waiting, num_left_out = _Waiting(), dict[str, int]()
        state = self.states.get(worker)
        waiting_places = (
            {block["number"]: set(block["places"]) for block in state["blocks"]} if state else {}
        )
        first = state["blocks"][-1]["number"] if state else 0
        for block in self._iterate_blocks(worker, state, num_left_out):
            waiting.begin_block(block)
            num_used = state["num_used"] if state and block.number == first else 0
            for place, subject in enumerate(block.subjects):
                is_used = block.number < first or place < num_used
                if is_used and place not in waiting_places.get(block.number, ()):
                    continue
                sample = self._make_sample(subject, worker, block.number, place, num_left_out)
                if sample is None:
                    continue
                size, subject_sample = sample
                samples = waiting.samples.setdefault(size, [])
                samples.append((block.number, place, subject_sample))
                if len(samples) == self.batch_size:
                    waiting.samples[size] = []
                    batch = collate_subjects([entry[2] for entry in samples])
                    progress = {"worker": worker, "state": waiting.get_state(place + 1)}
                    yield replace(batch, progress=progress)

    def _make_sample(
        self,
        subject: SubjectPhotos,
        worker: int,
        block_number: int,
        place: int,
        num_left_out: dict[str, int],
    ) -> tuple[ImageSize, SubjectSample] | None:
        """Make the sample of a place in a block; None if its photos cannot be read."""
        rng = np.random.default_rng([self.seed, self.rank, worker, block_number, place])
        number = block_number * BLOCK_SIZE + place
        try:
            plan = plan_sample(subject, number, self.maker.config, rng, self.get_size)
            return plan.size, self.maker.make(subject, plan)
        except InvalidImageError as error:
            _count_reason(num_left_out, "it cannot be read", str(error))
            return None

    def _iterate_blocks(
        self, worker: int, state: WorkerState | None, num_left_out: dict[str, int]
    ) -> Iterator[_Block]:
        """Iterate over blocks in pass after pass, from the first one of a state on."""
        start: dict[str, Any] = {"number": 0, "pass_number": 0, "position": None}
        if state:
            start = state["blocks"][0]
        number, pass_number, position = start["number"], start["pass_number"], start["position"]
        while True:
            # the same on all processes, which take disjoint parts of one order of shards
            seed = int(np.random.default_rng([self.seed, pass_number]).integers(2**31))
            is_whole_pass, is_empty = position is None, True
            subjects: list[SubjectPhotos] = []
            for next_position, subject in self.stream.iterate_positions(
                self.rank, self.num_ranks, seed, position
            ):
                if len(subjects) == BLOCK_SIZE:
                    yield self._shuffle_block(worker, number, pass_number, position, subjects)
                    number, position, subjects = number + 1, next_position, []
                if (checked := self._check_photos(subject, num_left_out)) is not None:
                    subjects.append(checked)
                    is_empty = False
            if subjects:
                yield self._shuffle_block(worker, number, pass_number, position, subjects)
                number += 1
            if is_whole_pass and is_empty:
                return
            pass_number, position = pass_number + 1, None

    def _shuffle_block(
        self,
        worker: int,
        number: int,
        pass_number: int,
        position: StreamPosition,
        subjects: Sequence[SubjectPhotos],
    ) -> _Block:
        rng = np.random.default_rng([self.seed, self.rank, worker, number])
        order = rng.permutation(len(subjects))
        return _Block(number, pass_number, position, [subjects[i] for i in order])

    def _check_photos(
        self, subject: SubjectPhotos, num_left_out: dict[str, int]
    ) -> SubjectPhotos | None:
        """Leave out photos that are not good enough; None if none is left."""
        if self.find_reason is None:
            return subject
        photos = []
        for photo in subject.photos:
            if (reason := self.find_reason(photo)) is None:
                photos.append(photo)
            else:
                _count_reason(num_left_out, reason, photo.key)
        return replace(subject, photos=tuple(photos)) if photos else None


class PhotoStreamLoader(DataLoader[Any]):
    """Loads the batches of a ``PhotoStreamDataset``, first that of the process whose turn it is.

    Torch begins with process 0. The processes whose turn is over give None first, which is dropped.
    Processes end with their iteration, so that the next one begins at the state of the dataset.

    Args:
        data: The dataset.
        num_workers: Loader processes.
        pin_memory: As of ``DataLoader``.
    """

    def __init__(self, data: PhotoStreamDataset, num_workers: int, pin_memory: bool) -> None:
        super().__init__(data, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[SubjectBatch]:  # type: ignore[override]
        """Iterate over batches."""
        batches = super().__iter__()
        return (batch for batch in batches if batch is not None)


class StreamFaceCheck:
    """Checks the face of each photo that passes by, and keeps the faces of the last ones.

    Args:
        index: Detects and checks faces.
        maker: Makes samples; its ``faces`` are written here.
    """

    def __init__(self, index: FaceIndex, maker: SampleMaker) -> None:
        self.index, self.maker = index, maker

    def __call__(self, photo: Photo) -> str | None:
        """Say why a photo is left out, or return None."""
        try:
            record = self.index.inspect_image(photo.read_image())
        except InvalidImageError:
            return "it cannot be read"
        if record.reason is None:
            faces = cast(dict[str, FaceRecord], self.maker.faces)
            if len(faces) >= _MAX_STREAM_FACES:
                del faces[next(iter(faces))]  # the oldest
            faces[self.maker.get_id(photo)] = record
        return record.reason


def _count_reason(counts: dict[str, int], reason: str, example: str) -> None:
    """Count a photo that is left out, and say so at the 1st, 10th, 100th, ... of a reason."""
    counts[reason] = counts.get(reason, 0) + 1
    if str(counts[reason]).strip("0") == "1":
        print(
            f"warning: {counts[reason]} photo(s) left out because {reason}, the last is {example}",
            file=sys.stderr,
        )
