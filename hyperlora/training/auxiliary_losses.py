"""``LatentPreviewLoss``: how far what latents look like is off, seen through a linear preview of the autoencoder."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.modules.attribute_classifier import compute_attribute_loss

_KERNEL_SIZE: Final = 3
"""Latents across that the pixels of one place are made from."""


class LatentPreviewLoss(nn.Module):
    """A small picture of latents [n, ``channels``, h, w], ``upscale`` pixels across for each place: the map to RGB from
    -1 to 1 that is nearest to what a base decodes, linear in the place and those around it (ComfyUI's latent previews
    look at the place alone).

    The error of latents counts all channels alike, while few of them say which colour a place is. The map is fitted
    once; it goes into checkpoints, so that training resumes with the same.
    """

    kernel: Tensor

    def __init__(self, channels: int, upscale: int = 2) -> None:
        super().__init__()
        self.upscale = upscale
        self.register_buffer(
            "kernel", torch.zeros(3 * upscale**2, channels, _KERNEL_SIZE, _KERNEL_SIZE)
        )

    @property
    def has_kernel(self) -> bool:
        return bool(self.kernel.any())

    @torch.no_grad()
    def fit_kernel(self, base: DiffusionBase, latents: Tensor) -> None:
        """The least squares of what ``base`` decodes of ``latents`` [n, channels, h, w]; the constant is left out, as
        differences have none."""
        height, width = (self.upscale * size for size in latents.shape[-2:])
        pixels = F.adaptive_avg_pool2d(
            base.decode_latents(latents).float() * 2 - 1, (height, width)
        )
        target_pixels = F.pixel_unshuffle(pixels, self.upscale).movedim(1, -1).flatten(0, 2)
        latent_patches = F.unfold(
            latents.float(), _KERNEL_SIZE, padding=_KERNEL_SIZE // 2
        ).mT.flatten(0, 1)
        design_matrix = F.pad(latent_patches, (0, 1), value=1.0)
        solution = torch.linalg.lstsq(
            design_matrix.double().cpu(), target_pixels.double().cpu()
        ).solution[:-1]
        self.kernel.copy_(solution.mT.reshape(self.kernel.shape))

    def compute_error(self, latents: Tensor, target_latents: Tensor, weight: Tensor) -> Tensor:
        """Squared error of the preview per sample [n]; ``weight`` [n, 1, h, w]: how much each place counts."""
        preview_diff = F.conv2d(
            latents.float() - target_latents.float(), self.kernel, padding=_KERNEL_SIZE // 2
        )
        return (preview_diff.square() * weight).mean((1, 2, 3))


class AttributeLoss:
    """``weight`` times what a released reader of latents (a folder; None for no such loss) misreads."""

    def __init__(self, classifier_dir: str | None, weight: float) -> None:
        self.classifier = (
            AttributeClassifier.from_pretrained(classifier_dir) if classifier_dir else None
        )
        self.weight = weight

    def to(self, device: torch.device) -> None:
        if self.classifier is not None:
            self.classifier.to(device)

    def make_loss_fn(
        self, labels: Mapping[str, Tensor] | None
    ) -> Callable[[Tensor], Tensor] | None:
        """A loss per sample of latents [n, c, h, w], as ``compute_denoising_loss`` takes it. Raises ``InvalidArgumentError`` if there is
        a reader, but the data do not say what it should read."""
        classifier = self.classifier
        if classifier is None:
            return None
        if labels is None:
            raise InvalidArgumentError(
                "a reader is given, but the data have no labels: leave it out, or use drawn portraits"
            )
        return lambda latents: self.weight * compute_attribute_loss(classifier(latents), labels)
