"""The frozen denoiser itself as an encoder of photos."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures


class DenoiserEncoder(nn.Module):
    """Decoder features of a diffusers UNet that looks at a slightly noised photo (DIFT, 2306.03881).

    The features name what the LoRA has to steer in the base's own terms, and cost no further network: on the avatar
    world a linear probe on those of a half-trained base reads 56 % of hair types (``docs/results.md``).
    All decoder blocks are brought to one ``grid`` and concatenated: tokens [batch, views, grid², Σ channels].
    ``text`` [1, tokens, width] is the empty prompt. The same noise is used for every photo. The base's modules are
    held, not owned: they are in no state dict.
    """

    text: Tensor
    noise: Tensor

    def __init__(self, vae: Any, unet: Any, schedule: Any, text: Tensor, timestep: int = 60, grid: int = 8) -> None:
        super().__init__()
        self._base: tuple[Any, Any, Any] = (vae, unet, schedule)  # a tuple: not registered as submodules
        self.config = {"name": "denoiser", "timestep": timestep, "grid": grid}
        self.timestep, self.grid = timestep, grid
        self.image_size = int(unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1))
        self.licence = "as the base model"
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    @property
    def width(self) -> int:
        unet: Any = self._base[1]
        channels = unet.config.block_out_channels
        return int(channels[-1] + sum(channels))

    @torch.no_grad()
    def forward(self, images: Tensor) -> ImageFeatures:
        """images [batch, views, 3, h, w] in [0, 1]."""
        vae: Any = self._base[0]
        flat = images.flatten(0, 1)
        if flat.shape[-2:] != (self.image_size, self.image_size):
            flat = F.interpolate(flat, (self.image_size, self.image_size), mode="bicubic", antialias=True).clamp(0, 1)
        latents = vae.encode(flat * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        return ImageFeatures(self.from_latents(latents).unflatten(0, images.shape[:2]))

    @torch.no_grad()
    def from_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [n, c, h, w] to tokens [n, grid², width]."""
        unet: Any = self._base[1]
        schedule = self._base[2]
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in (unet.mid_block, *unet.up_blocks)]
        try:
            times = torch.full((len(latents),), self.timestep, device=latents.device)
            noised = schedule.add_noise(latents, self.noise.expand_as(latents), times)
            unet(noised, times, encoder_hidden_states=self.text.expand(len(latents), -1, -1))
        finally:
            for handle in handles:
                handle.remove()
        maps = [_on_grid(x, self.grid) for x in seen]
        return torch.cat(maps, 1).flatten(2).mT


def _on_grid(x: Tensor, grid: int) -> Tensor:
    if x.shape[-1] >= grid:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, (grid, grid), mode="bilinear", align_corners=False)
