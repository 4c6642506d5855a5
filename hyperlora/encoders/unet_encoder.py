"""``UNetFeatureEncoder``: the frozen denoiser itself as an encoder of photos."""

from typing import TYPE_CHECKING, Final, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_NOISE_SEED: Final = 0


class UNetEncoderConfig(TypedDict):
    """The arguments that rebuild a ``UNetFeatureEncoder`` from its base."""

    name: str
    timestep: int
    grid_size: int


class UNetFeatureEncoder(nn.Module):
    """Decoder features of a diffusers UNet for slightly noisy photos (DIFT, 2306.03881).

    The features are those with which the base itself denoises, and need no further network. All
    decoder blocks are resized to one grid and concatenated. Every photo gets the same noise. The
    modules of the base are not registered: they are in no state dict, and stay where they are.

    Args:
        pipeline: The pipeline of the base, whose VAE and UNet encode on its own device.
        noise_scheduler: Its ``add_noise`` makes noisy latents.
        empty_prompt_embeds: Text embeddings of the empty prompt, [1, tokens, width].
        timestep: The timestep of the noise.
        grid_size: Height and width of the grid of tokens.

    Attributes:
        config: The arguments that rebuild the encoder from its base.
        noise: [1, channels, height, width] of latents.
    """

    empty_prompt_embeds: Tensor
    noise: Tensor

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        noise_scheduler: "SchedulerMixin",
        empty_prompt_embeds: Tensor,
        timestep: int = 60,
        grid_size: int = 8,
    ) -> None:
        super().__init__()
        self._pipeline, self._noise_scheduler = pipeline, noise_scheduler
        vae, unet = pipeline.vae, pipeline.unet
        self.config: UNetEncoderConfig = {
            "name": "unet",
            "timestep": timestep,
            "grid_size": grid_size,
        }
        self.timestep, self.grid_size = timestep, grid_size
        vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = int(unet.config.sample_size * vae_scale_factor)
        self.license = "as the base model"
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
        self.register_buffer("empty_prompt_embeds", empty_prompt_embeds, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    @property
    def width(self) -> int:
        """Numbers per token: channels of the middle block and all decoder blocks."""
        channels = self._pipeline.unet.config.block_out_channels
        return int(channels[-1] + sum(channels))

    @torch.no_grad()
    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode photos.

        Args:
            images: [batch, views, 3, height, width] in [0, 1], on any device.

        Returns:
            Tokens [batch, views, grid_size², width] in float32, on the device of the encoder.
        """
        vae, size = self._pipeline.vae, (self.image_size, self.image_size)
        pixels = images.flatten(0, 1)  # [n, 3, h, w]
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = pixels.to(self._pipeline._execution_device, vae.dtype)
        latents = vae.encode(pixels * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        tokens = self.encode_latents(latents)  # [n, grid_size², width]
        return ImageFeatures(tokens.unflatten(0, images.shape[:2]))

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """Encode scaled latents.

        Args:
            latents: [n, channels, height, width], on any device.

        Returns:
            Tokens [n, grid_size², width] in float32, on the device of the encoder.
        """
        unet = self._pipeline.unet
        latents = latents.to(self._pipeline._execution_device, unet.dtype)
        block_outputs: list[Tensor] = []

        def _save_output(
            module: nn.Module, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
        ) -> None:
            block_outputs.append(output[0] if isinstance(output, tuple) else output)

        blocks = (unet.mid_block, *unet.up_blocks)
        handles = [block.register_forward_hook(_save_output) for block in blocks]
        try:
            timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
            noise = self.noise.to(latents).expand_as(latents)  # [n, c, h, w]
            noisy_latents = self._noise_scheduler.add_noise(latents, noise, timesteps)
            prompt_embeds = self.empty_prompt_embeds.to(latents).expand(len(latents), -1, -1)
            unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds)
        finally:
            for handle in handles:
                handle.remove()
        feature_maps = [
            _resize_feature_map(x.to(self.noise), self.grid_size) for x in block_outputs
        ]
        return torch.cat(feature_maps, 1).flatten(2).mT  # [n, grid², width]


def _resize_feature_map(x: Tensor, grid_size: int) -> Tensor:
    """[n, c, h, w] to [n, c, grid_size, grid_size]: average where smaller, else bilinear."""
    if x.shape[-1] >= grid_size:
        return F.adaptive_avg_pool2d(x, grid_size)
    return F.interpolate(x, (grid_size, grid_size), mode="bilinear", align_corners=False)
