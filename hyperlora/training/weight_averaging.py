"""Moving averages of trained weights, and the checkpoint of the best validation."""

from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

BEST_METRIC: Final = "val/loss_own"
"""The denoising loss of held-out subjects with their own LoRAs."""
BEST_CHECKPOINT_NAME: Final = "best"
"""Stem of the file that ``BestCheckpoint`` writes."""


class TrainedWeightAveraging(WeightAveraging):
    """Exponential moving average of the weights that are trained, which validation then uses.

    θ̄ ← d θ̄ + (1 - d) θ after each step, with d = min(``decay``, (1 + n) / (10 + n)) at step n, so
    that the first weights are soon forgotten.

    Lightning's ``EMAWeightAveraging`` copies the whole LightningModule. With a frozen base or
    encoder, it would keep these twice, and average them with themselves. Here both are left alone.
    Checkpoints hold the same keys as those of ``EMAWeightAveraging``.

    Args:
        decay: Largest d; 0.999 averages over about 1,000 steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        def average(mean: Tensor, value: Tensor, num_averaged: Tensor) -> Tensor:
            """Return the next average."""
            d = ((1 + num_averaged) / (10 + num_averaged)).clamp(max=decay)
            return mean.lerp(value, (1 - d).to(mean))

        super().__init__(avg_fn=average)
        self._is_swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the trained weights when a fit begins.

        Args:
            trainer: Not used.
            pl_module: The module in training.
            stage: ``fit``, or another for which nothing is done.
        """
        if stage == "fit":
            self._average_model = _TrainedAverage(pl_module, **self._kwargs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the average to the device of the weights, where the trainer has moved them.

        Args:
            trainer: Not used.
            pl_module: The module in training.
        """
        self._average_model.to(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module; a checkpoint that is written later still has both.

        Args:
            trainer: Not used.
            pl_module: The module in training.
        """
        self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average into ``state_dict``, and the weights to ``current_model_state``.

        Args:
            trainer: Not used.
            pl_module: The module in training.
            checkpoint: Written by the trainer.
        """
        if self._average_model is None:
            return
        state_dict = checkpoint["state_dict"]
        names = _list_trained_names(pl_module)
        stored = dict(zip(names, self._average_model.module.parameters(), strict=True))
        others = state_dict | {name: p.detach() for name, p in stored.items()}
        # in validation the module holds the average, and the copy holds the weights
        current, average = (others, state_dict) if self._is_swapped else (state_dict, others)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, current
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average and the weights, or take both from a checkpoint without average.

        Args:
            trainer: Not used.
            pl_module: The module in training.
            checkpoint: Read by the trainer.
        """
        if self._average_model is None:
            return
        names, average = _list_trained_names(pl_module), self._average_model.module
        for name, parameter in zip(names, average.parameters(), strict=True):
            parameter.data.copy_(checkpoint["state_dict"][name])
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"])
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(_collect_trainable_params(pl_module))
        self._is_swapped = not self._is_swapped


class _TrainedAverage(AveragedModel):
    """The average of the parameters of a module that have gradients."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(_collect_trainable_params(module), **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Add the trained parameters of ``model`` to the average."""
        super().update_parameters(_collect_trainable_params(model))


class BestCheckpoint(ModelCheckpoint):
    """Checkpoint of the best validation, ``best.ckpt`` in the run's folder.

    The released model is made of it when training ends. ``last.ckpt`` is for resuming.

    Args:
        monitor: Metric of validation; a smaller one is better.
    """

    dirpath: str | None

    def __init__(self, monitor: str = BEST_METRIC) -> None:
        super().__init__(
            monitor=monitor,
            mode="min",
            filename=BEST_CHECKPOINT_NAME,
            save_top_k=1,
            save_last=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder of the run.

        Args:
            trainer: With the folder of the run as ``default_root_dir``.
            pl_module: The module in training.
            stage: What the trainer runs.
        """
        if self.dirpath is None:
            self.dirpath = trainer.default_root_dir
        super().setup(trainer, pl_module, stage)


def _list_trained_names(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def _collect_trainable_params(module: nn.Module) -> nn.ParameterList:
    """Collect the parameters that have gradients: the same objects, not copies."""
    return nn.ParameterList(p for p in module.parameters() if p.requires_grad)
