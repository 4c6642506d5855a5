"""Train a ``Reader`` (the evaluator of a world, or the encoder that conditions a hypernetwork)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import LATENTS, Reader, Reading
from hyperlora.training.augmentation import degraded
from hyperlora.training.optimizers import adamw_one_cycle

UNSEEN: Final = -100
"""The label of an attribute that cannot be seen in an image: neither trained on nor counted."""


class ReaderTraining(L.LightningModule):
    """Cross-entropy per attribute + squared error of geometry + a little supervised contrast (2004.11362).

    The contrast is kept small: at equal weight with the mean over attributes it alone was learned.

    Batches: ``images`` [n, 3, h, w] in [0, 1], ``labels`` {attribute: [n]} (``UNSEEN`` where there is nothing to see),
    ``geometry`` [n, measures] (standardised), ``subject`` [n]. Training images are degraded at random (blur, noise) so
    that pictures a model has painted are read as well as drawn ones. With the backbone ``latents``, ``images`` are
    scaled latents [n, c, h, w] (degraded too), for losses on what a denoiser expects (see ``BaseModel``).
    """

    def __init__(
        self,
        out: str,
        backbone: str,
        image_size: int,
        attributes: Mapping[str, Sequence[str]],
        geometry: Sequence[str] = (),
        options: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        temperature: float = 0.15,
        identity_weight: float = 0.3,
        geometry_weight: float = 3.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.reader = Reader(backbone, image_size, attributes, geometry, options=options)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        spoilt = _noised if self.hparams["backbone"] == LATENTS else degraded
        reading = self.reader(spoilt(batch["images"]))
        attributes = attribute_loss(reading, batch["labels"]).mean()
        geometry = F.mse_loss(reading.geometry.float(), batch["geometry"])
        identity = _supervised_contrast(reading.identity.float(), batch["subject"], self.hparams["temperature"])
        self.log_dict({"train/attributes": attributes, "train/identity": identity, "train/geometry": geometry})
        return attributes + self.hparams["geometry_weight"] * geometry + self.hparams["identity_weight"] * identity

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        reading = self.reader(batch["images"])
        n = len(batch["subject"])
        for name, logits in reading.logits.items():
            seen = batch["labels"][name] != UNSEEN
            if seen.any():
                right = (logits.argmax(-1) == batch["labels"][name])[seen].float().mean()
                self.log(f"val/{name}", right, batch_size=int(seen.sum()))
        self.log("val/geometry_mse", F.mse_loss(reading.geometry.float(), batch["geometry"]), batch_size=n)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.reader.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"])


def attribute_loss(reading: Reading, labels: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy per sample [n], summed over the attributes of ``labels`` ({attribute: [n]}; ``UNSEEN`` is 0)."""
    logits = {name: reading.logits[name].float() for name in labels}
    parts = [F.cross_entropy(logits[k], v, ignore_index=UNSEEN, reduction="none") for k, v in labels.items()]
    return torch.stack(parts).sum(0)


def _supervised_contrast(identity: Tensor, subject: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2: pull an identity's portraits together, push all others away."""
    similarity = identity @ identity.mT / temperature
    itself = torch.eye(len(subject), dtype=torch.bool, device=subject.device)
    positive = (subject[:, None] == subject[None]) & ~itself
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()


def _noised(latents: Tensor) -> Tensor:
    """Half of the latents blurred, all with noise of random size: what a denoiser expects is like that."""
    n, _, h, w = latents.shape
    small = F.interpolate(
        latents, scale_factor=float(torch.empty(1).uniform_(0.4, 0.9)), mode="bilinear", antialias=True
    )
    share = torch.rand(n, 1, 1, 1, device=latents.device) * (torch.rand(n, 1, 1, 1, device=latents.device) < 0.5)
    blurred = latents + share * (F.interpolate(small, (h, w), mode="bilinear") - latents)
    return blurred + torch.randn_like(latents) * torch.rand(n, 1, 1, 1, device=latents.device) * 0.5
