"""Data sets of batches of subjects, and the order in which a run goes through them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from hyperlora.data.aspect_buckets import ImageSize
from hyperlora.data.photos import Photo, SubjectPhotos
from hyperlora.errors import InvalidImageError
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects
from hyperlora.training.datamodules.photo_samples import SampleMaker, SamplePlan, plan_sample

GetSize = Callable[[Photo], ImageSize]
BatchPlan = Sequence[SamplePlan]
_MAX_ATTEMPTS: Final = 8
"""Subjects that are tried in turn before a photo that cannot be read is an error."""


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
