"""The frozen denoiser itself as an encoder of photos."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures


class UNetFeatureEncoder(nn.Module):
    """Decoder features of a diffusers UNet that looks at a slightly noised photo (DIFT, 2306.03881).

    The features name what the LoRA has to steer in the base's own terms, and cost no further network: on the avatar
    world a linear probe on those of a half-trained base reads 56 % of hair types (``docs/results.md``).
    All decoder blocks are brought to one ``grid_size`` and concatenated: tokens [batch, views, grid², Σ channels].
    ``empty_prompt_embeds`` [1, tokens, width] is the empty prompt. The same noise is used for every photo. The base's modules are
    held, not owned: they are in no state dict.
    """

    empty_prompt_embeds: Tensor
    noise: Tensor

    def __init__(
        self,
        vae: Any,
        unet: Any,
        noise_scheduler: Any,
        empty_prompt_embeds: Tensor,
        timestep: int = 60,
        grid_size: int = 8,
    ) -> None:
        super().__init__()
        self._base_components: tuple[Any, Any, Any] = (
            vae,
            unet,
            noise_scheduler,
        )  # a tuple: not registered as submodules
        self.config = {"name": "denoiser", "timestep": timestep, "grid": grid_size}
        self.timestep, self.grid_size = timestep, grid_size
        self.image_size = int(
            unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        )
        self.license = "as the base model"
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("text", empty_prompt_embeds, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    @property
    def width(self) -> int:
        unet: Any = self._base_components[1]
        channels = unet.config.block_out_channels
        return int(channels[-1] + sum(channels))

    @torch.no_grad()
    def forward(self, images: Tensor) -> ImageFeatures:
        """images [batch, views, 3, h, w] in [0, 1]."""
        vae: Any = self._base_components[0]
        flat_images = images.flatten(0, 1)
        if flat_images.shape[-2:] != (self.image_size, self.image_size):
            flat_images = F.interpolate(
                flat_images, (self.image_size, self.image_size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        latents = vae.encode(flat_images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        return ImageFeatures(self.encode_latents(latents).unflatten(0, images.shape[:2]))

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [n, c, h, w] to tokens [n, grid², width]."""
        unet: Any = self._base_components[1]
        noise_scheduler = self._base_components[2]
        block_outputs: list[Tensor] = []

        def save_output(module: nn.Module, inputs: Any, output: Any) -> None:
            block_outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [
            block.register_forward_hook(save_output) for block in (unet.mid_block, *unet.up_blocks)
        ]
        try:
            timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
            noisy_latents = noise_scheduler.add_noise(
                latents, self.noise.expand_as(latents), timesteps
            )
            unet(
                noisy_latents,
                timesteps,
                encoder_hidden_states=self.empty_prompt_embeds.expand(len(latents), -1, -1),
            )
        finally:
            for handle in handles:
                handle.remove()
        feature_maps = [_resize_feature_map(x, self.grid_size) for x in block_outputs]
        return torch.cat(feature_maps, 1).flatten(2).mT


def _resize_feature_map(x: Tensor, grid_size: int) -> Tensor:
    if x.shape[-1] >= grid_size:
        return F.adaptive_avg_pool2d(x, grid_size)
    return F.interpolate(x, (grid_size, grid_size), mode="bilinear", align_corners=False)
