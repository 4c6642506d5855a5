"""Data sets of batches of subjects, and the order in which a run goes through them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, SequentialSampler

from hyperlora.data.aspect_buckets import ImageSize
from hyperlora.data.hub_subjects import HubStream
from hyperlora.data.photos import Photo, SubjectPhotos
from hyperlora.errors import InvalidImageError
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects
from hyperlora.training.datamodules.face_filter import FaceIndex, FaceRecord
from hyperlora.training.datamodules.photo_samples import SampleMaker, SamplePlan, plan_sample

GetSize = Callable[[Photo], ImageSize]
BatchPlan = Sequence[SamplePlan]
_MAX_ATTEMPTS: Final = 8
"""Subjects that are tried in turn before a photo that cannot be read is an error."""
_SHUFFLE_BUFFER: Final = 64
"""Subjects of a stream among which the next one is drawn."""
_MAX_STREAM_FACES: Final = 100_000
"""Faces of a stream that are kept, many more than photos are at hand."""


class PhotoDataset(Dataset[SubjectBatch]):
    """Batches of subjects, by their plans.

    A subject with a photo that cannot be read is replaced by the next one, and the photo is named
    on stderr.

    Args:
        subjects: The subjects.
        maker: Makes samples.
        get_size: Returns the size of a photo's bucket; None for squares.
    """

    def __init__(
        self,
        subjects: Sequence[SubjectPhotos],
        maker: SampleMaker,
        get_size: GetSize | None = None,
    ) -> None:
        self.subjects, self.maker, self.get_size = subjects, maker, get_size
        self._reported_errors: set[str] = set()

    def __len__(self) -> int:
        """Return the number of subjects."""
        return len(self.subjects)

    def __getitem__(self, plans: BatchPlan) -> SubjectBatch:
        """Make the batch of some plans."""
        return collate_subjects([self._make_sample(plan) for plan in plans])

    def _make_sample(self, plan: SamplePlan) -> SubjectSample:
        num_errors = 0
        for candidate in self._list_candidates(plan):
            try:
                return self.maker.make(self.subjects[candidate.subject_index], candidate)
            except InvalidImageError as error:
                last_error, num_errors = error, num_errors + 1
                if str(error) not in self._reported_errors:
                    self._reported_errors.add(str(error))
                    print(f"warning: a photo is left out: {error}", file=sys.stderr)
                if num_errors == _MAX_ATTEMPTS:
                    break
        raise last_error

    def _list_candidates(self, plan: SamplePlan) -> Iterator[SamplePlan]:
        """The plan, then plans of the next subjects with targets of the same size."""
        yield plan
        rng = np.random.default_rng([plan.subject_index, *plan.targets])
        for offset in range(1, len(self.subjects)):
            index = (plan.subject_index + offset) % len(self.subjects)
            subject = self.subjects[index]
            candidate = plan_sample(subject, index, self.maker.config, rng, self.get_size)
            if candidate.size == plan.size:
                yield candidate


@dataclass(frozen=True)
class EpochPlanner:
    """Plans the batches of an epoch: every subject once, or as often as it is repeated.

    The order is random.

    With buckets, a batch has targets of one size. A bucket whose subjects do not fill its last
    batch repeats some, with other photos or views.

    Attributes:
        subjects: The subjects.
        maker: Number of references and targets.
        batch_size: Subjects per batch.
        seed: Seed of the run.
        get_size: Returns the size of a photo's bucket; None for squares.
    """

    subjects: Sequence[SubjectPhotos]
    maker: SampleMaker
    batch_size: int
    seed: int
    get_size: GetSize | None = None

    def plan_training(self, epoch: int) -> list[BatchPlan]:
        """Plan the batches of a training epoch, without an incomplete last one.

        Args:
            epoch: Number of the epoch; the same one has the same plan.
        """
        rng = np.random.default_rng([self.seed, epoch])
        plans_by_size: dict[ImageSize, list[SamplePlan]] = {}
        indices = np.repeat(np.arange(len(self.subjects)), [s.repeats for s in self.subjects])
        for index in rng.permutation(indices).tolist():
            plan = self._plan_sample(index, rng)
            plans_by_size.setdefault(plan.size, []).append(plan)
        batches: list[BatchPlan] = []
        for size, plans in plans_by_size.items():
            while self.get_size is not None and len(plans) % self.batch_size:
                index = plans[int(rng.integers(len(plans)))].subject_index
                plans.append(self._plan_size(index, size, rng))
            num_full = len(plans) // self.batch_size * self.batch_size
            batches += [plans[i : i + self.batch_size] for i in range(0, num_full, self.batch_size)]
        order = rng.permutation(len(batches))[: self.num_training_batches]
        return [batches[i] for i in order]

    @property
    def num_training_batches(self) -> int:
        """Batches of a training epoch, the same number in each."""
        return sum(subject.repeats for subject in self.subjects) // self.batch_size

    def plan_validation(self, epoch: int) -> list[BatchPlan]:
        """Plan the batches of validation, always the same, in the order of the subjects.

        Args:
            epoch: Not used.
        """
        plans_by_size: dict[ImageSize, list[SamplePlan]] = {}
        for index in range(len(self.subjects)):
            plan = self._plan_sample(index, np.random.default_rng(index))
            plans_by_size.setdefault(plan.size, []).append(plan)
        return [
            plans[i : i + self.batch_size]
            for plans in plans_by_size.values()
            for i in range(0, len(plans), self.batch_size)
        ]

    def _plan_sample(self, index: int, rng: np.random.Generator) -> SamplePlan:
        return plan_sample(self.subjects[index], index, self.maker.config, rng, self.get_size)

    def _plan_size(self, index: int, size: ImageSize, rng: np.random.Generator) -> SamplePlan:
        """Plan a sample whose targets have a given size, which the subject has."""
        while True:
            plan = self._plan_sample(index, rng)
            if plan.size == size:
                return plan


class BatchPlanSampler(DistributedSampler[BatchPlan], SequentialSampler):
    """Gives every rank its batches of an epoch: rank r of n has the batches r, r + n, ...

    So n devices go through the same batches as one device that accumulates n of them. Lightning
    replaces samplers unless they are a ``DistributedSampler``, and to overfit a
    ``SequentialSampler``; this one keeps its order in both cases.

    Args:
        plan_epoch: Plans all batches of an epoch.
        num_batches: Their number, the same in every epoch.
        num_ranks: Number of ranks.
        rank: The rank.
        drop_last: Whether the last batches are dropped where ranks would have different numbers;
            otherwise the first ones are repeated.
    """

    def __init__(
        self,
        plan_epoch: Callable[[int], list[BatchPlan]],
        num_batches: int,
        num_ranks: int = 1,
        rank: int = 0,
        drop_last: bool = True,
    ) -> None:
        self.plan_epoch, self.num_ranks, self.rank, self.epoch = plan_epoch, num_ranks, rank, 0
        self.num_batches = num_batches // num_ranks if drop_last else -(-num_batches // num_ranks)

    def __iter__(self) -> Iterator[BatchPlan]:  # type: ignore[override]
        """Iterate over the batches of the epoch."""
        batches = self.plan_epoch(self.epoch)
        for i in range(len(self)):
            yield batches[(i * self.num_ranks + self.rank) % len(batches)]

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which Lightning calls before each."""
        self.epoch = epoch


class PhotoStreamDataset(IterableDataset[SubjectBatch]):
    """Endless batches of subjects from a stream, each rank and loader process from its shards.

    Args:
        stream: The stream.
        maker: Makes samples.
        batch_size: Subjects per batch.
        seed: Seed of the order; a resumed run has another one, and so does not repeat the start.
        find_reason: Says why a photo is left out, or returns None.
        get_size: Returns the size of a photo's bucket; None for squares.

    Attributes:
        rank: Rank of this process, set before the first batch.
        num_ranks: Number of ranks.
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

    def __iter__(self) -> Iterator[SubjectBatch]:
        """Iterate over batches without an end."""
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, self.rank, worker.id if worker else 0])
        samples_by_size: dict[ImageSize, list[SubjectSample]] = {}
        num_left_out: dict[str, int] = {}
        for number, subject in enumerate(self._shuffle_subjects(rng, num_left_out)):
            try:
                plan = plan_sample(subject, number, self.maker.config, rng, self.get_size)
                sample = self.maker.make(subject, plan)
            except InvalidImageError as error:
                _count_reason(num_left_out, "it cannot be read", str(error))
                continue
            samples = samples_by_size.setdefault(plan.size, [])
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield collate_subjects(samples)
                samples_by_size[plan.size] = []

    def _shuffle_subjects(
        self, rng: np.random.Generator, num_left_out: dict[str, int]
    ) -> Iterator[SubjectPhotos]:
        """Iterate over subjects in pass after pass, each drawn from a few that are at hand."""
        buffer: list[SubjectPhotos] = []
        pass_number = 0
        while True:
            # the same on all processes, which take disjoint parts of one order of shards
            seed = int(np.random.default_rng([self.seed, pass_number]).integers(2**31))
            num_subjects = 0
            for subject in self.stream.iterate_subjects(self.rank, self.num_ranks, seed):
                if (checked := self._check_photos(subject, num_left_out)) is None:
                    continue
                num_subjects += 1
                buffer.append(checked)
                if len(buffer) >= _SHUFFLE_BUFFER:
                    yield buffer.pop(int(rng.integers(len(buffer))))
            while buffer and num_subjects < _SHUFFLE_BUFFER:
                yield buffer.pop(int(rng.integers(len(buffer))))
            if num_subjects == 0:
                return
            pass_number += 1

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
