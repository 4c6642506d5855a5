"""Random seeds that depend on the position in a training run, not on its history."""

import os
from collections.abc import Iterable, Iterator
from typing import Final

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

_EPOCH_SEED: Final = 0
_STEP_SEED: Final = 1
_FETCH_SEED: Final = 2


class PerBatchSeed(L.Callback):
    """Seed the noise of each batch by its number among the batches of all devices.

    With a single seed at the start, all devices would draw the same noise and timesteps. A resumed
    run would repeat those of its first steps. With this callback, n devices equal one
    device that accumulates n batches.

    A resumed run begins with the batch after the last one that it trained on, and equals a run that
    was never interrupted, bit for bit. With workers this needs a data set whose samples depend on
    their indices alone, as those of ``PhotoFolderDataModule`` do.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the current epoch: a resumed run starts within one.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        self.on_train_epoch_start(trainer, pl_module)
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        num_skipped = 0 if progress.is_last_batch else progress.current.processed
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = _SeededSampler(getattr(loader, name), trainer, num_skipped)
        # torch forbids to replace it in a loader; Lightning, and workers that persist, have begun
        # to iterate over the old one
        object.__setattr__(loader, name, sampler)
        loader._iterator = None
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


class _SeededSampler:
    """What a sampler gives, each time after seeding the global generator.

    Args:
        sampler: A sampler, or a batch sampler.
        trainer: The running trainer.
        num_skipped: Batches of the first epoch that are left out, since they were trained on.
    """

    def __init__(self, sampler: Iterable[object], trainer: L.Trainer, num_skipped: int) -> None:
        self.sampler, self.trainer, self.num_skipped = sampler, trainer, num_skipped

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[object]:
        num_skipped, self.num_skipped = self.num_skipped, 0
        trainer, epoch = self.trainer, self.trainer.current_epoch
        self.set_epoch(epoch)  # workers fetch before Lightning does so
        for i, indices in enumerate(self.sampler):
            if i >= num_skipped:
                batch_number = i * trainer.world_size + trainer.global_rank
                torch.manual_seed(_compute_seed(_FETCH_SEED, epoch, batch_number))
                yield indices

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of a sampler that has epochs."""
        if (set_epoch := getattr(self.sampler, "set_epoch", None)) is not None:
            set_epoch(epoch)


def _compute_seed(*position: int) -> int:
    """Hash the run's seed, which ``seed_everything`` keeps in the environment, and ``position``."""
    base_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence([base_seed, *position]).generate_state(1)[0])
