"""Random seeds that depend on the position in a training run, not on its history."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler

_EPOCH_SEED: Final = 0
_STEP_SEED: Final = 1
_SAMPLE_SEED: Final = 2


class PerBatchSeed(L.Callback):
    """Seed the noise of each batch by its number among the batches of all devices.

    With a single seed at the start, all devices would draw the same noise and timesteps. A resumed
    run would repeat those of its first steps. With this callback, n devices equal one
    device that accumulates n batches.

    A resumed run begins with the batch after the last one that it trained on. It equals a run that
    was never interrupted, bit for bit, if the data loader has no workers. Workers draw other
    augmentations after a break in the midst of an epoch.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the current epoch: a resumed run starts within one.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        self.on_train_epoch_start(trainer, pl_module)
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        num_skipped = 0 if progress.is_last_batch else progress.current.processed
        batches = _SeededBatches(loader.batch_sampler, lambda: trainer.current_epoch, num_skipped)
        # torch forbids to replace it in a loader, and Lightning has begun to iterate over the old
        object.__setattr__(loader, "batch_sampler", batches)
        iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the global generator and, with generators of their own, the data loaders.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        seed = _compute_seed(_EPOCH_SEED, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(seed)
        for loader in (trainer.train_dataloader, trainer.val_dataloaders):
            if isinstance(loader, DataLoader):
                # a generator of its own: the loader's draws must not advance the global one
                loader.generator = torch.Generator().manual_seed(seed)
                if isinstance(loader.sampler, RandomSampler):
                    loader.sampler.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed the global generator by the batch's number among those of all devices.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
            batch: Not used.
            batch_idx: Not used: it starts again with every epoch.
        """
        batch_number = trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank
        torch.manual_seed(_compute_seed(_STEP_SEED, batch_number))


class _SeededBatches:
    """The batches of a sampler, each loaded after seeding the global generator by its first index.

    Args:
        batches: A batch sampler.
        get_epoch: Returns the current epoch.
        num_skipped: Batches of the first epoch that are left out, since they were trained on.
    """

    def __init__(
        self, batches: Iterable[Sequence[int]], get_epoch: Callable[[], int], num_skipped: int
    ) -> None:
        self.batches, self.get_epoch, self.num_skipped = batches, get_epoch, num_skipped

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sequence[int]]:
        num_skipped, self.num_skipped = self.num_skipped, 0
        epoch = self.get_epoch()
        for i, indices in enumerate(self.batches):
            if i >= num_skipped:
                torch.manual_seed(_compute_seed(_SAMPLE_SEED, epoch, int(indices[0])))
                yield indices


def _compute_seed(*position: int) -> int:
    """Hash the run's seed, which ``seed_everything`` keeps in the environment, and ``position``."""
    base_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence([base_seed, *position]).generate_state(1)[0])
