"""Losses beside the denoising loss, on the clean latents that a denoiser predicts."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.losses import AuxLoss
from hyperlora.encoders.attribute_classifier import AttributeClassifier, AttributePrediction
from hyperlora.errors import InvalidArgumentError

IGNORE_INDEX: Final = -100
"""Label of an attribute that an image does not show: neither trained on nor counted."""
_KERNEL_SIZE: Final = 3
"""Side of the square of latent pixels that the image pixels of one latent pixel depend on."""


class LatentPreviewLoss(nn.Module):
    """Squared error of a linear preview: of the small RGB image that latents stand for.

    The preview is a convolution from latents to RGB in [-1, 1], fitted by least squares to the
    autoencoder's decoder. (ComfyUI's latent previews use a 1x1 kernel.) An error of the latents
    weights all channels alike, while only a few of them carry the color of a latent pixel. The
    kernel is fitted once and stored in checkpoints, so a resumed run uses the same one.

    Letters of shapes: B batch, C ``channels``, h and w of the latents, u ``upscale``, H and W of
    the decoded images.

    Args:
        channels: Of the latents.
        upscale: Image pixels per latent pixel, along each axis.
    """

    kernel: Tensor

    def __init__(self, channels: int, upscale: int = 2) -> None:
        super().__init__()
        self.upscale = upscale
        # 3·u² outputs: the u x u RGB pixels of one latent pixel, as F.pixel_shuffle orders them
        self.register_buffer(
            "kernel", torch.zeros(3 * upscale**2, channels, _KERNEL_SIZE, _KERNEL_SIZE)
        )

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel is fitted."""
        return bool(self.kernel.any())

    @torch.no_grad()
    def fit_kernel(self, base: DiffusionBase, latents: Tensor) -> None:
        """Fit the kernel by least squares to what a base decodes.

        The fit has a constant term, which is then dropped: differences of previews do not need it.

        Args:
            base: Base diffusion model whose decoder is approximated.
            latents: Scaled examples, [batch, channels, h, w]; together at least
                9 * ``channels`` + 1 latent pixels.
        """
        height, width = (self.upscale * size for size in latents.shape[-2:])
        pixels = base.decode_latents(latents).float() * 2 - 1  # [B, 3, H, W] in [-1, 1]
        pixels = F.adaptive_avg_pool2d(pixels, (height, width))  # [B, 3, u·h, u·w]

        # One row per latent pixel. Y: its u² image pixels; X: the latents around it, and 1.
        targets = F.pixel_unshuffle(pixels, self.upscale)  # [B, 3·u², h, w]
        targets = targets.movedim(1, -1).flatten(0, 2)  # Y [B·h·w, 3·u²]
        # [B, C·9, h·w], with zeros around the border as in the convolution of compute_error
        patches = F.unfold(latents.float(), _KERNEL_SIZE, padding=_KERNEL_SIZE // 2)
        patches = patches.mT.flatten(0, 1)  # [B·h·w, C·9]
        design_matrix = F.pad(patches, (0, 1), value=1.0)  # X [B·h·w, C·9 + 1]

        # K = argmin |X K - Y|²  [C·9 + 1, 3·u²], on the CPU: not every accelerator has float64
        solution = torch.linalg.lstsq(design_matrix.double().cpu(), targets.double().cpu()).solution
        # [:-1] drops the constant term; unfold has channels before positions, as weights of conv2d
        self.kernel.copy_(solution[:-1].mT.reshape(self.kernel.shape))  # [3·u², C, 3, 3]

    def compute_error(self, latents: Tensor, target_latents: Tensor, weight: Tensor) -> Tensor:
        """Compute the squared difference of two previews.

        Args:
            latents: [batch, channels, h, w].
            target_latents: Of the same shape.
            weight: Loss weight of each latent pixel, [batch, 1, h, w].

        Returns:
            Mean squared error per sample, [batch].
        """
        # The preview is linear, so the preview of a difference is the difference of previews.
        difference = latents.float() - target_latents.float()  # [B, C, h, w]
        preview_diff = F.conv2d(difference, self.kernel, padding=_KERNEL_SIZE // 2)
        # [B, 3·u², h, w] times [B, 1, h, w], mean to [B]
        return (preview_diff.square() * weight).mean((1, 2, 3))


class AttributeLoss:
    """Cross-entropy of the attributes that a classifier of latents predicts.

    Args:
        classifier_dir: Folder of a released ``AttributeClassifier`` of latents; None for no loss.
        weight: Factor of the cross-entropy.
    """

    def __init__(self, classifier_dir: str | None, weight: float) -> None:
        self.classifier = (
            AttributeClassifier.from_pretrained(classifier_dir) if classifier_dir else None
        )
        self.weight = weight

    def to(self, device: torch.device) -> None:
        """Move the classifier to ``device``."""
        if self.classifier is not None:
            self.classifier.to(device)

    def make_aux_loss(
        self, labels: Mapping[str, Tensor] | None, weight: float | Tensor | None = None
    ) -> AuxLoss | None:
        """Make the loss that ``compute_denoising_loss`` adds for a batch.

        Args:
            labels: {attribute: [batch]}, ``IGNORE_INDEX`` where it is unknown. None if the data
                have none.
            weight: ``AuxLoss.weight``, which multiplies this loss' own weight.

        Returns:
            The loss, or None without a classifier.

        Raises:
            InvalidArgumentError: If there is a classifier, but no labels.
        """
        classifier = self.classifier
        if classifier is None:
            return None
        if labels is None:
            raise InvalidArgumentError(
                "an attribute classifier is given, but the data have no labels: "
                "leave it out, or use drawn portraits"
            )
        # latents [B, C, h, w] to [B]; AuxLoss.weight multiplies self.weight per sample
        return AuxLoss(
            lambda latents: self.weight * compute_attribute_loss(classifier(latents), labels),
            weight,
        )


def compute_attribute_loss(prediction: AttributePrediction, labels: Mapping[str, Tensor]) -> Tensor:
    """Compute the cross-entropy of predicted attributes, summed over the attributes.

    Args:
        prediction: With ``logits`` [batch, classes] of each attribute.
        labels: {attribute: class indices [batch]}; ``IGNORE_INDEX`` adds 0.

    Returns:
        Loss per sample, [batch].
    """
    # each [B]; reduction "none", since each sample is weighted by its own noise level later
    losses = [
        F.cross_entropy(
            prediction.logits[name].float(), classes, ignore_index=IGNORE_INDEX, reduction="none"
        )
        for name, classes in labels.items()
    ]
    # a sum: a sample with fewer known attributes weighs less, as it holds less to learn from
    return torch.stack(losses).sum(0)  # over [attributes, B], [B]
