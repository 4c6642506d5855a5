"""Train an ``AttributeClassifier``: an evaluator, a photo encoder, or a classifier of latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import LATENT_BACKBONE, AttributeClassifier
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.augmentation import apply_random_degradation
from hyperlora.training.auxiliary_losses import IGNORE_INDEX, compute_attribute_loss
from hyperlora.training.batches import AttributeBatch
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine


class AttributeClassifierTraining(L.LightningModule):
    """Train on cross-entropy per attribute, squared error of geometry and a contrastive loss.

    The supervised contrastive loss (2004.11362) shapes the identity space. Its weight is small: at
    the same weight as the mean over attributes, training learns the contrast alone.

    Training images are blurred and noised at random, so that generated images are classified as
    well as drawn ones. With the backbone ``latents`` the input is scaled latents, degraded too:
    such a classifier serves as a loss on the clean latents that a denoiser predicts.

    Args:
        output_dir: Folder that receives the classifier when training ends.
        backbone: A timm id, or ``latents``.
        image_size: Side of the input in pixels (latent pixels with the backbone ``latents``).
        attributes: Class names by attribute, or a YAML file that holds them.
        geometry: Names of the measures of the face.
        options: Arguments of the backbone.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        temperature: Of the contrastive loss.
        identity_weight: Weight of the contrastive loss.
        geometry_weight: Weight of the squared error of geometry.
    """

    def __init__(
        self,
        output_dir: str,
        backbone: str,
        image_size: int,
        attributes: str | Mapping[str, Sequence[str]],
        geometry: Sequence[str] = (),
        options: Options | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        temperature: float = 0.15,
        identity_weight: float = 0.3,
        geometry_weight: float = 3.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if isinstance(attributes, str):
            attributes = load_attributes(attributes)
        self.classifier = AttributeClassifier(
            backbone, image_size, attributes, geometry, options=options
        )

    def training_step(self, batch: AttributeBatch, batch_idx: int) -> Tensor:
        """Compute the loss of degraded images.

        Args:
            batch: Images with their attributes; two images of each subject.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        is_latent = self.hparams["backbone"] == LATENT_BACKBONE
        degrade = _apply_latent_degradation if is_latent else apply_random_degradation
        prediction = self.classifier(degrade(batch.images))
        attribute_loss = compute_attribute_loss(prediction, batch.labels).mean()  # over [n]
        geometry_loss = F.mse_loss(prediction.geometry.float(), batch.geometry)
        identity_loss = _compute_supcon_loss(
            prediction.identity.float(), batch.subject_ids, self.hparams["temperature"]
        )
        self.log_dict(
            {
                "train/attribute_loss": attribute_loss,
                "train/identity_loss": identity_loss,
                "train/geometry_loss": geometry_loss,
            }
        )
        return (
            attribute_loss
            + self.hparams["geometry_weight"] * geometry_loss
            + self.hparams["identity_weight"] * identity_loss
        )

    def validation_step(self, batch: AttributeBatch, batch_idx: int) -> None:
        """Log the accuracy of every attribute, where it is visible, and the error of geometry.

        Args:
            batch: Images with their attributes.
            batch_idx: Not used.
        """
        prediction = self.classifier(batch.images)
        for name, logits in prediction.logits.items():  # [n, num_classes]
            labels = batch.labels[name]  # [n]
            is_labeled = labels != IGNORE_INDEX
            if is_labeled.any():
                accuracy = (logits.argmax(-1) == labels)[is_labeled].float().mean()
                self.log(f"val/accuracy_{name}", accuracy, batch_size=int(is_labeled.sum()))
        geometry_mse = F.mse_loss(prediction.geometry.float(), batch.geometry)
        self.log("val/geometry_mse", geometry_mse, batch_size=len(batch.subject_ids))

    def on_train_end(self) -> None:
        """Write the classifier."""
        if self.trainer.is_global_zero:
            self.classifier.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(
            self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"]
        )


def load_attributes(path: str) -> dict[str, list[str]]:
    """Load class names by attribute from a YAML file.

    Args:
        path: The file, relative to the working directory.

    Returns:
        Class names by attribute.

    Raises:
        InvalidArgumentError: The file is missing or holds something else.
    """
    try:
        attributes = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidArgumentError(
            f"attributes {path!r}: no YAML file can be read there; run from the repository root, "
            "or give another path"
        ) from error
    if not isinstance(attributes, dict) or not all(
        isinstance(v, list) for v in attributes.values()
    ):
        raise InvalidArgumentError(
            f"attributes {path!r}: a mapping of attributes to lists of classes is expected"
        )
    return attributes


def _compute_supcon_loss(identity: Tensor, subject_ids: Tensor, temperature: float) -> Tensor:
    """Compute the supervised contrastive loss (Khosla et al. 2020, eq. 2).

    -1 / |P(i)| Σ_p log(exp(z_i·z_p / τ) / Σ_a≠i exp(z_i·z_a / τ)), with the positives P(i) of i.

    Args:
        identity: Embeddings z of unit length [n, width].
        subject_ids: [n]; samples of the same subject are positives.
        temperature: τ.

    Returns:
        The mean over samples, a scalar.
    """
    similarity = identity @ identity.mT / temperature  # [n, n]
    is_self = torch.eye(len(subject_ids), dtype=torch.bool, device=subject_ids.device)
    is_positive = (subject_ids[:, None] == subject_ids[None]) & ~is_self  # [n, n]
    log_denominator = similarity.masked_fill(is_self, -torch.inf).logsumexp(1, keepdim=True)
    log_prob = similarity - log_denominator  # [n, n]
    positive_sum = log_prob.masked_fill(~is_positive, 0).sum(1)  # [n]
    return -(positive_sum / is_positive.sum(1).clamp_min(1)).mean()


def _apply_latent_degradation(latents: Tensor) -> Tensor:
    """Blur half of the latents [n, c, h, w] and add noise of random size to all of them.

    The clean latents that a denoiser predicts are blurred and noisy in this way.
    """
    n, _, h, w = latents.shape
    downsampled = F.interpolate(
        latents,
        scale_factor=float(torch.empty(1).uniform_(0.4, 0.9)),
        mode="bilinear",
        antialias=True,
    )  # [n, c, h * scale, w * scale]
    blur_strength = torch.rand(n, 1, 1, 1, device=latents.device) * (
        torch.rand(n, 1, 1, 1, device=latents.device) < 0.5
    )  # [n, 1, 1, 1], 0 for half of them
    upsampled = F.interpolate(downsampled, (h, w), mode="bilinear")  # [n, c, h, w]
    blurred = latents + blur_strength * (upsampled - latents)
    return blurred + torch.randn_like(latents) * torch.rand(n, 1, 1, 1, device=latents.device) * 0.5
