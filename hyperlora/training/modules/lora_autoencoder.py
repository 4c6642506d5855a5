"""Train the autoencoder of LoRAs (LAE) on a dataset of them."""

from typing import Any

import lightning as L
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.lora.merge import compare_deltas
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder, compute_weight_preserved_loss
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.training.optimizers import make_adamw_cosine


class LoraAutoencoderTraining(L.LightningModule):
    """L = mean((1 + λ |w| / max |w|) (w - ŵ)²) + ``kl_weight`` KL, over normalised rows; λ = ``magnitude_weight``.

    Batches: rows [n, P] of the dataset ``folder``, whose statistics (z-score, ``canonicalize`` by SVD first or not) travel
    in what is released. Every validation logs the relative error and the cosine of ΔW.
    """

    def __init__(
        self,
        folder: str,
        output_dir: str,
        autoencoder: dict[str, Any] | None = None,
        canonicalize: bool = False,
        magnitude_weight: float = 1.0,
        kl_weight: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        data = LoraDataset(folder, "train")
        self.model = LoraCodec(
            data.fit_normalizer(canonicalize), LoraAutoencoder(data.layout, **(autoencoder or {}))
        )

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        normalized_rows = self.model.normalizer.normalize(rows)
        reconstruction, kl = self.model.autoencoder(normalized_rows)
        loss = compute_weight_preserved_loss(
            reconstruction, normalized_rows, self.hparams["magnitude_weight"]
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.hparams["kl_weight"] * kl.mean()

    def validation_step(self, rows: Tensor, batch_idx: int) -> None:
        target_loras = LoraWeights.unflatten(self.model.layout, rows.float())
        error, cosine = compare_deltas(
            target_loras, self.model.decode(self.model.encode_flat(rows))
        )
        metrics = {"val/error": error.mean(), "val/cosine": cosine.mean()}
        self.log_dict(metrics, prog_bar=True, batch_size=len(rows), sync_dist=True)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.eval()
            rows = LoraDataset(self.hparams["folder"], "train")
            self.model.calibrate(rows[: min(256, len(rows))].to(self.device))
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])
