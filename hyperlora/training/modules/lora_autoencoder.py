"""Train the autoencoder of LoRAs (LAE) on a dataset of them."""

from typing import Any

import lightning as L
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.lora.merge import apart
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder, weight_preserved_loss
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.training.optimizers import adamw_one_cycle


class LoraCodecTraining(L.LightningModule):
    """L = mean((1 + λ |w| / max |w|) (w - ŵ)²) + ``divergence`` KL, over normalised rows; λ = ``preserved``.

    Batches: rows [n, P] of the dataset ``folder``, whose statistics (z-score, ``balanced`` by SVD first or not) travel
    in what is released. Every validation logs the relative error and the cosine of ΔW.
    """

    def __init__(
        self,
        folder: str,
        out: str,
        autoencoder: dict[str, Any] | None = None,
        balanced: bool = False,
        preserved: float = 1.0,
        divergence: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        data = LoraDataset(folder, "train")
        self.model = LoraCodec(data.scale(balanced), LoraAutoencoder(data.layout, **(autoencoder or {})))

    def training_step(self, rows: Tensor, batch_index: int) -> Tensor:
        wanted = self.model.scale.normalize(rows)
        found, divergence = self.model.autoencoder(wanted)
        loss = weight_preserved_loss(found, wanted, self.hparams["preserved"])
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.hparams["divergence"] * divergence.mean()

    def validation_step(self, rows: Tensor, batch_index: int) -> None:
        given = LoraWeights.unflatten(self.model.layout, rows.float())
        error, cosine = apart(given, self.model.decode(self.model.encode_rows(rows)))
        values = {"val/error": error.mean(), "val/cosine": cosine.mean()}
        self.log_dict(values, prog_bar=True, batch_size=len(rows), sync_dist=True)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.eval()
            rows = LoraDataset(self.hparams["folder"], "train")
            self.model.measure(rows[: min(256, len(rows))].to(self.device))
            self.model.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.parameters(), self.hparams["lr"])
