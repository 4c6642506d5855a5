"""``Preview``: how far what latents look like is off, seen through a linear preview of the autoencoder."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.errors import BadRequest
from hyperlora.training.modules.attribute_classifier import attribute_loss

_AROUND: Final = 3
"""Latents across that the pixels of one place are made from."""


class Preview(nn.Module):
    """A small picture of latents [n, ``channels``, h, w], ``detail`` pixels across for each place: the map to RGB from
    -1 to 1 that is nearest to what a base decodes, linear in the place and those around it (ComfyUI's latent previews
    look at the place alone).

    The error of latents counts all channels alike, while few of them say which colour a place is. The map is fitted
    once; it goes into checkpoints, so that training resumes with the same.
    """

    kernel: Tensor

    def __init__(self, channels: int, detail: int = 2) -> None:
        super().__init__()
        self.detail = detail
        self.register_buffer("kernel", torch.zeros(3 * detail**2, channels, _AROUND, _AROUND))

    @property
    def fitted(self) -> bool:
        return bool(self.kernel.any())

    @torch.no_grad()
    def fit(self, base: Base, examples: Tensor) -> None:
        """The least squares of what ``base`` decodes of ``examples`` [n, channels, h, w]; the constant is left out, as
        differences have none."""
        height, width = (self.detail * size for size in examples.shape[-2:])
        pixels = F.adaptive_avg_pool2d(base.decode_latents(examples).float() * 2 - 1, (height, width))
        wanted = F.pixel_unshuffle(pixels, self.detail).movedim(1, -1).flatten(0, 2)
        around = F.unfold(examples.float(), _AROUND, padding=_AROUND // 2).mT.flatten(0, 1)
        given = F.pad(around, (0, 1), value=1.0)
        fitted = torch.linalg.lstsq(given.double().cpu(), wanted.double().cpu()).solution[:-1]
        self.kernel.copy_(fitted.mT.reshape(self.kernel.shape))

    def error(self, latents: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        """Squared error of the preview per sample [n]; ``weight`` [n, 1, h, w]: how much each place counts."""
        off = F.conv2d(latents.float() - wanted.float(), self.kernel, padding=_AROUND // 2)
        return (off.square() * weight).mean((1, 2, 3))


class Misreading:
    """``weight`` times what a released reader of latents (a folder; None for no such loss) misreads."""

    def __init__(self, reader: str | None, weight: float) -> None:
        self.reader = Reader.from_pretrained(reader) if reader else None
        self.weight = weight

    def to(self, device: torch.device) -> None:
        if self.reader is not None:
            self.reader.to(device)

    def of(self, labels: Mapping[str, Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        """A loss per sample of latents [n, c, h, w], as ``denoising_loss`` takes it. Raises ``BadRequest`` if there is
        a reader, but the data do not say what it should read."""
        reader = self.reader
        if reader is None:
            return None
        if labels is None:
            raise BadRequest("a reader is given, but the data have no labels: leave it out, or use drawn portraits")
        return lambda latents: self.weight * attribute_loss(reader(latents), labels)
