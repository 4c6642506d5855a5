"""Random seeds that depend on the position in a training run, not on its history."""

import os

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler


class PerBatchSeed(L.Callback):
    """Seed the noise of each batch by its number among the batches of all devices.

    With a single seed at the start, all devices would draw the same noise and timesteps. A resumed
    run would repeat those of its first steps. With this callback, n devices equal one
    device that accumulates n batches. A run resumed at an epoch's start equals one that was never
    interrupted, provided that the data loader has no workers.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the current epoch: a resumed run starts within one.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the global generator and, with generators of their own, the data loaders.

        Args:
            trainer: The running trainer.
            pl_module: Not used.
        """
        seed = _compute_seed(0, trainer.current_epoch, trainer.global_rank)
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
        torch.manual_seed(_compute_seed(1, batch_number))


def _compute_seed(*position: int) -> int:
    """Hash the run's seed, which ``seed_everything`` keeps in the environment, and ``position``."""
    base_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence([base_seed, *position]).generate_state(1)[0])
