"""Train the autoencoder of LoRAs (LAE) on a dataset of them."""

from typing import Final

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.lora.merge import compare_deltas
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder, compute_weight_preserved_loss
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine

_MAX_FIT_NUMBERS: Final = 10**9
"""Numbers of LoRAs from which the start is computed, 4 GB."""


class LoraAutoencoderTraining(L.LightningModule):
    """Train on the weight-preserved loss and a KL divergence.

    L = mean((1 + λ |w| / max |w|) (w - ŵ)²) / mean(σ²) + ``kl_weight`` KL, with λ =
    ``magnitude_weight``. w are the numbers of a LoRA as they are, and σ² their variances over the
    dataset. For normalized numbers, the largest would be those that vary least.

    Training starts at principal components (``LoraAutoencoder.fit``). Batches are flat LoRAs
    [n, P]. Validation logs the relative error and the cosine of ΔW.

    Args:
        folder: Dataset whose training split gives layout and normalization, both stored in the
            released codec.
        output_dir: Folder that receives the ``LoraCodec`` when training ends.
        autoencoder: Arguments of ``LoraAutoencoder``.
        canonicalize: Whether each LoRA is brought to a canonical form by SVD first.
        magnitude_weight: λ; large weights count up to 1 + λ times as much as small ones.
        kl_weight: Weight of the KL divergence to a unit Gaussian.
        lr: Peak learning rate of AdamW.
    """

    def __init__(
        self,
        folder: str,
        output_dir: str,
        autoencoder: Options | None = None,
        canonicalize: bool = False,
        magnitude_weight: float = 1.0,
        kl_weight: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        data = LoraDataset(folder, "train")
        self.model = LoraCodec(
            data.fit_normalizer(canonicalize, per_factor=True),
            LoraAutoencoder(data.layout, **(autoencoder or {})),
        )
        num_rows = min(len(data), _MAX_FIT_NUMBERS // data.layout.numel)
        self.model.autoencoder.fit(self.model.normalizer.normalize(data[:num_rows]))

    def training_step(self, flat_loras: Tensor, batch_idx: int) -> Tensor:
        """Compute the loss of a batch.

        Args:
            flat_loras: [n, P].
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        normalizer = self.model.normalizer
        normalized = normalizer.normalize(flat_loras)  # [n, P]
        reconstruction, kl = self.model.autoencoder(normalized)  # [n, P], [n]
        loss = compute_weight_preserved_loss(
            normalizer.denormalize(reconstruction),
            normalizer.denormalize(normalized),  # in canonical form, unlike the batch
            self.hparams["magnitude_weight"],
        )
        loss = loss / normalizer.std.square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.hparams["kl_weight"] * kl.mean()

    def validation_step(self, flat_loras: Tensor, batch_idx: int) -> None:
        """Log the relative error and the cosine of ΔW of decoded LoRAs.

        Args:
            flat_loras: [n, P].
            batch_idx: Not used.
        """
        targets = LoraWeights.unflatten(self.model.layout, flat_loras.float())
        decoded = self.model.decode(self.model.encode_flat(flat_loras))
        relative_error, cosine = compare_deltas(targets, decoded)  # [n], [n]
        self.log_dict(
            {"val/relative_error": relative_error.mean(), "val/cosine": cosine.mean()},
            prog_bar=True,
            batch_size=len(flat_loras),
            sync_dist=True,
        )

    def on_train_end(self) -> None:
        """Calibrate the latents on at most 256 training LoRAs and write the codec."""
        if self.trainer.is_global_zero:
            self.model.eval()
            data = LoraDataset(self.hparams["folder"], "train")
            self.model.calibrate(data[: min(256, len(data))].to(self.device))
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])
