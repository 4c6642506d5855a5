"""``PretrainedModelTraining``: what trainings that release a ``PretrainedModel`` have in common."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.pipelines.pretrained_model import PretrainedModel
from hyperlora.pipelines.readme import TrainingRecord, make_readme
from hyperlora.training.activations import make_meta_denoiser, make_meta_text_encoder
from hyperlora.training.estimate import BatchSize, TrainingParts, estimate_memory
from hyperlora.training.memory import (
    TrainerOptions,
    TrainingMemory,
    get_device_bytes,
    make_frozen_row,
)
from hyperlora.training.modules.frozen_base import FrozenBaseTraining
from hyperlora.training.weight_averaging import BestCheckpoint

ENCODER_PREFIX: Final = "model.encoder."
_STATE_KEYS: Final = ("state_dict", "current_model_state")
"""Where a checkpoint holds weights; the second one is that of averaging callbacks."""
_SHA256_KEY: Final = "encoder_sha256"
_SCORES_KEY: Final = "validation_scores"


class PretrainedModelTraining(FrozenBaseTraining):
    """A training that ends with a folder ready for ``push_to_hub``.

    Checkpoints lack an image encoder that is frozen, often most of their bytes. A resumed run has
    the encoder from where its configuration says, and refuses another one.

    When training ends, the weights of the best validation are released if the trainer has a
    ``BestCheckpoint``, else the latest ones. The ``README.md`` of the folder says how the model was
    trained.

    Attributes:
        model: The model in training, set by the constructor of the subclass.
    """

    model: PretrainedModel

    @property
    def image_encoder(self) -> nn.Module:
        """The image encoder of the model, which is frozen or not."""
        encoder = self.model.encoder
        assert isinstance(encoder, nn.Module)
        return encoder

    def setup(self, stage: str) -> None:
        """Print what the training takes, and refuse what cannot fit, before anything is moved.

        Args:
            stage: ``fit``, or another for which nothing is done.

        Raises:
            InvalidArgumentError: The device has too little memory, or the strategy shards the
                wrong part; the text names an option.
        """
        if stage != "fit":
            return
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise InvalidArgumentError(
                "this strategy would shard the network that is trained, and not the frozen base: "
                "use strategy ddp with shard_base: true"
            )
        device = self.trainer.strategy.root_device
        memory, device_bytes = self.estimate_memory(), get_device_bytes(device)
        if self.trainer.is_global_zero:
            memory.print_table(device_bytes, str(device))
        memory.check_fits(device_bytes, str(device))

    def estimate_memory(self) -> TrainingMemory:
        """Estimate the memory of this training on each device of its trainer."""
        num_devices = self.trainer.world_size
        num_shards = num_devices if self.shards_base else 1
        datamodule = getattr(self.trainer, "datamodule", None)
        return estimate_memory(
            TrainingParts(
                base_rows=[
                    make_frozen_row(name, module, "base", 1 if name == "vae" else num_shards)
                    for name, module in self.base.pipeline.components.items()
                    if isinstance(module, nn.Module)
                ],
                family=self.base.family,
                denoiser=make_meta_denoiser(self.base.denoiser),
                encoder=self.image_encoder,
                network=self.model,
                layout=self.model.layout,
                batch=BatchSize.from_config(
                    {} if datamodule is None else datamodule.hparams,
                    self.hparams,
                    self.base.resolution,
                ),
                use_checkpointing=self.hparams["gradient_checkpointing"],
                options=TrainerOptions(
                    has_average=any(
                        isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks
                    ),
                    is_mixed=str(self.trainer.precision).endswith("-mixed"),
                    num_devices=num_devices,
                ),
                text_encoders={
                    name: make_meta_text_encoder(self.base.modules[name])
                    for name in self.model.layout.components
                    if name != self.base.family.denoiser_name
                },
            )
        )

    def get_frozen_encoder_state(self) -> dict[str, Tensor]:
        """Return the weights of a frozen encoder by their names in checkpoints, {} if it trains."""
        if any(p.requires_grad for p in self.image_encoder.parameters()):
            return {}
        return {f"{ENCODER_PREFIX}{k}": v for k, v in self.image_encoder.state_dict().items()}

    @cached_property
    def _frozen_encoder_sha256(self) -> str:
        return _compute_state_sha256(self.get_frozen_encoder_state())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen encoder out, and add the latest scores of validation.

        Args:
            checkpoint: What the trainer is about to write.
        """
        frozen = self.get_frozen_encoder_state()
        for key in _STATE_KEYS:
            if key in checkpoint:
                state = checkpoint[key]
                checkpoint[key] = {k: v for k, v in state.items() if k not in frozen}
        checkpoint[_SHA256_KEY] = self._frozen_encoder_sha256 if frozen else ""
        checkpoint[_SCORES_KEY] = self._get_scores()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the weights of a frozen encoder back.

        Args:
            checkpoint: What the trainer read.

        Raises:
            ModelLoadError: The run began with other weights of the encoder.
        """
        frozen = self.get_frozen_encoder_state()
        sha256 = checkpoint.get(_SHA256_KEY)
        if frozen and sha256 and sha256 != self._frozen_encoder_sha256:
            raise ModelLoadError(
                f"the checkpoint was trained with other weights of the encoder "
                f"{self.hparams['encoder']!r}: resume it with those"
            )
        for key in _STATE_KEYS:
            if key in checkpoint:
                checkpoint[key] = {**frozen, **checkpoint[key]}

    def on_train_end(self) -> None:
        """Write the model with its ``README.md``."""
        if not self.trainer.is_global_zero:
            return
        step, scores = self.trainer.global_step, self._get_scores()
        if best_path := self._find_best_checkpoint():
            # the file is this run's own, and Lightning's counters are no tensors
            checkpoint = torch.load(best_path, map_location="cpu", weights_only=False)
            self.on_load_checkpoint(checkpoint)
            self.load_state_dict(checkpoint["state_dict"])
            step, scores = checkpoint["global_step"], checkpoint[_SCORES_KEY]
        datamodule = getattr(self.trainer, "datamodule", None)
        data_config = {} if datamodule is None else dict(datamodule.hparams)
        config = {"model": dict(self.hparams), "data": data_config}
        self.model.readme = make_readme(self.model, TrainingRecord(step, config, scores))
        self.model.save_pretrained(self.hparams["output_dir"])

    def _find_best_checkpoint(self) -> Path | None:
        """Return the checkpoint of the best validation, None if there is none."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, BestCheckpoint) and Path(callback.best_model_path).is_file():
                return Path(callback.best_model_path)
        return None

    def _get_scores(self) -> dict[str, float]:
        """Return the metrics of the latest validation."""
        metrics = self.trainer.callback_metrics
        return {name: float(value) for name, value in metrics.items() if name.startswith("val/")}


def _compute_state_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
