"""``FrozenBaseTraining``: what trainings through a frozen base model have in common."""

from pathlib import Path
from typing import Any

import lightning as L
from diffusers import ModelMixin

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.sharding import shard_base


def load_training_base(
    name_or_path: str | Path, dtype: str = "float32", **pretrained_kwargs: Any
) -> DiffusionBase:
    """Load a base on the CPU, from which the trainer moves it to its device.

    Args:
        name_or_path: Folder of a pipeline, or a hub id.
        dtype: Precision of all components: ``float32``, ``bfloat16`` or ``float16``.
        pretrained_kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Returns:
        The base.
    """
    compute = ComputeConfig(device="cpu", dtype=dtype)
    return load_diffusion_base(name_or_path, compute, **pretrained_kwargs)


class FrozenBaseTraining(L.LightningModule):
    """A LightningModule that trains through a frozen base, with an optional attribute loss.

    Neither the ``DiffusionBase`` nor the ``AttributeLoss`` is an ``nn.Module``. So they are no
    submodules: no checkpoint and no optimizer holds them, and they are moved to the device here.

    So strategies that shard the LightningModule leave the base alone. ``shards_base`` spreads it
    over the devices of any data-parallel strategy.

    Attributes:
        base: The frozen base, set by the constructor of the subclass.
        attribute_loss: The auxiliary loss, set by the constructor of the subclass.
        shards_base: Whether each device holds a part of the base (``shard_base``).
    """

    base: DiffusionBase
    attribute_loss: AttributeLoss
    shards_base: bool = False

    @property
    def denoiser_name(self) -> str:
        """The base's component that is trained through: ``unet`` or ``transformer``."""
        return next(iter(self.base.modules))

    def enable_gradient_checkpointing(self) -> None:
        """Let the denoiser recompute its activations in the backward pass, to save memory."""
        denoiser: ModelMixin = self.base.denoiser
        denoiser.enable_gradient_checkpointing()

    def on_fit_start(self) -> None:
        """Move the base and the attribute classifier to the device of the training."""
        if self.shards_base and self.trainer.world_size > 1:
            shard_base(self.base, self.device)
        self.base.pipeline.to(self.device)
        self.attribute_loss.to(self.device)
