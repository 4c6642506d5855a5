"""Randomness that depends on where a training is, not on how it got there."""

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler


class PerBatchSeed(L.Callback):
    """Draw each batch's noise from a seed of its own: base seed, and the batch's number among those of all devices.

    With one seed at the start alone, all devices would draw the same noise and timesteps for their different samples,
    and a resumed run would repeat those of its first steps. So n devices equal one that accumulates n batches, and a
    run resumed where an epoch begins goes on as if it had never stopped (if the data needs no workers).
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # a resumed run goes on within its epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seed = _compute_seed(0, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(seed)
        for loader in (trainer.train_dataloader, trainer.val_dataloaders):
            if isinstance(
                loader, DataLoader
            ):  # what it draws for itself must not come out of the data's stream
                loader.generator = torch.Generator().manual_seed(seed)
                if isinstance(loader.sampler, RandomSampler):
                    loader.sampler.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(
            _compute_seed(
                1, trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank
            )
        )


def _compute_seed(*position: int) -> int:
    base_seed = int(
        os.environ.get("PL_GLOBAL_SEED", 0)
    )  # where Lightning's seed_everything keeps it
    return int(np.random.SeedSequence([base_seed, *position]).generate_state(1)[0])
