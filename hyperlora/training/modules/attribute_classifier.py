"""Train a ``AttributeClassifier`` (the evaluator of a world, or the encoder that conditions a hypernetwork)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import (
    LATENT_BACKBONE,
    AttributeClassifier,
    AttributePrediction,
)
from hyperlora.training.augmentation import apply_random_degradation
from hyperlora.training.optimizers import make_adamw_cosine

IGNORE_INDEX: Final = -100
"""The label of an attribute that cannot be seen in an image: neither trained on nor counted."""


class AttributeClassifierTraining(L.LightningModule):
    """Cross-entropy per attribute + squared error of geometry + a little supervised contrast (2004.11362).

    The contrast is kept small: at equal weight with the mean over attributes it alone was learned.

    Batches: ``images`` [n, 3, h, w] in [0, 1], ``labels`` {attribute: [n]} (``IGNORE_INDEX`` where there is nothing to see),
    ``geometry`` [n, measures] (standardised), ``subject`` [n]. Training images are degraded at random (blur, noise) so
    that pictures a model has painted are read as well as drawn ones. With the backbone ``latents``, ``images`` are
    scaled latents [n, c, h, w] (degraded too), for losses on what a denoiser expects (see ``TextToImageTraining``).
    """

    def __init__(
        self,
        output_dir: str,
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
        self.classifier = AttributeClassifier(
            backbone, image_size, attributes, geometry, options=options
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        degrade_fn = (
            _apply_latent_degradation
            if self.hparams["backbone"] == LATENT_BACKBONE
            else apply_random_degradation
        )
        prediction = self.classifier(degrade_fn(batch["images"]))
        classification_loss = compute_attribute_loss(prediction, batch["labels"]).mean()
        geometry_loss = F.mse_loss(prediction.geometry.float(), batch["geometry"])
        identity_loss = _compute_supcon_loss(
            prediction.identity.float(), batch["subject"], self.hparams["temperature"]
        )
        self.log_dict(
            {
                "train/attributes": classification_loss,
                "train/identity": identity_loss,
                "train/geometry": geometry_loss,
            }
        )
        return (
            classification_loss
            + self.hparams["geometry_weight"] * geometry_loss
            + self.hparams["identity_weight"] * identity_loss
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        prediction = self.classifier(batch["images"])
        n = len(batch["subject"])
        for name, logits in prediction.logits.items():
            is_labeled = batch["labels"][name] != IGNORE_INDEX
            if is_labeled.any():
                accuracy = (logits.argmax(-1) == batch["labels"][name])[is_labeled].float().mean()
                self.log(f"val/{name}", accuracy, batch_size=int(is_labeled.sum()))
        self.log(
            "val/geometry_mse",
            F.mse_loss(prediction.geometry.float(), batch["geometry"]),
            batch_size=n,
        )

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.classifier.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(
            self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"]
        )


def compute_attribute_loss(prediction: AttributePrediction, labels: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy per sample [n], summed over the attributes of ``labels`` ({attribute: [n]}; ``IGNORE_INDEX`` is 0)."""
    logits = {name: prediction.logits[name].float() for name in labels}
    losses = [
        F.cross_entropy(logits[k], v, ignore_index=IGNORE_INDEX, reduction="none")
        for k, v in labels.items()
    ]
    return torch.stack(losses).sum(0)


def _compute_supcon_loss(identity: Tensor, subject: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2: pull an identity's portraits together, push all others away."""
    similarity = identity @ identity.mT / temperature
    is_self = torch.eye(len(subject), dtype=torch.bool, device=subject.device)
    is_positive = (subject[:, None] == subject[None]) & ~is_self
    log_p = similarity - similarity.masked_fill(is_self, -torch.inf).logsumexp(1, keepdim=True)
    return -(log_p.masked_fill(~is_positive, 0).sum(1) / is_positive.sum(1).clamp_min(1)).mean()


def _apply_latent_degradation(latents: Tensor) -> Tensor:
    """Half of the latents blurred, all with noise of random size: what a denoiser expects is like that."""
    n, _, h, w = latents.shape
    downsampled = F.interpolate(
        latents,
        scale_factor=float(torch.empty(1).uniform_(0.4, 0.9)),
        mode="bilinear",
        antialias=True,
    )
    blur_strength = torch.rand(n, 1, 1, 1, device=latents.device) * (
        torch.rand(n, 1, 1, 1, device=latents.device) < 0.5
    )
    blurred = latents + blur_strength * (
        F.interpolate(downsampled, (h, w), mode="bilinear") - latents
    )
    return blurred + torch.randn_like(latents) * torch.rand(n, 1, 1, 1, device=latents.device) * 0.5
