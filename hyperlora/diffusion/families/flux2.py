"""FLUX.2: dev and klein, which generate images and edit them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from hyperlora.data.images import to_image
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs, broadcast_timesteps
from hyperlora.diffusion.families.positioned_tokens import PositionedTokensFamily


class Flux2Family(PositionedTokensFamily):
    """Adapter of FLUX.2 dev: latent positions as tokens, Mistral 3, embedded guidance.

    Latents are the normalized 2x2 patches of the VAE's, [n, 4 c, h/2, w/2]: noise is added to
    those. One position is one token and spans twice ``vae_scale_factor`` pixels.

    Input images follow the noisy latents as further tokens. Without ``image_latents`` the same
    base generates. The pipeline gives all its input images to each prompt; here each prompt has
    one of its own.
    """

    modelspec_name = "Flux.2-dev"
    denoiser_class_name = "Flux2Transformer2DModel"
    edits_images = True
    size_multiple = 1
    # the fused projections of a single block hold its feed-forward layer too
    attention_pattern = (
        r"(^|\.)attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$"
        r"|^single_transformer_blocks\.\d+\.attn\.to_out$"
    )
    feed_forward_pattern = r"(^|\.)ff(_context)?\.linear_(in|out)$"
    default_guidance_scale = 4.0
    edits_in_batches = False

    @property
    @override
    def pixel_multiple(self) -> int:
        """A latent position is a patch of 2x2 positions of the VAE's."""
        return int(2 * self.pipeline.vae_scale_factor)

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with layers of the language model, which does not see ``images``.

        Prompts fill a fixed number of tokens, and the transformer attends to their padding.
        """
        prompt_embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        return {"prompt_embeds": prompt_embeds}

    @torch.no_grad()
    @override
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to normalized patches [n, 4 c, h', w'].

        Sides must be multiples of twice ``vae_scale_factor``. The pipeline crops input images to
        such sides, and first shrinks those of more than 1024² pixels.
        """
        vae = self.pipeline.vae
        pixels = (images * 2 - 1).to(self.device, vae.dtype)  # [n, 3, h, w] in [-1, 1]
        patches = F.pixel_unshuffle(vae.encode(pixels).latent_dist.mean, 2)  # [n, 4 c, h', w']
        mean, std = self._get_patch_statistics(patches)
        return (patches - mean) / std

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode normalized patches to images [n, 3, h, w] in [0, 1], differentiably."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype)
        mean, std = self._get_patch_statistics(latents)
        raw = F.pixel_shuffle(latents * std + mean, 2)  # [n, c, 2 h', 2 w']
        return (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    @override
    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make one input image, of 64 pixels or more, that keeps its size."""
        height, width = images.shape[-2:]
        pil_images = [to_image(image) for image in images]
        scale = {"guidance_scale": guidance_scale}
        return {"image": pil_images, "height": height, "width": width, **scale}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        prompt_embeds = conditions["prompt_embeds"]
        tokens, position_ids = _flatten_latents(latents, time=0)
        if "image_latents" in conditions:
            image_latents = conditions["image_latents"].to(latents)
            # the pipeline counts its input images in tens: 10, 20, ...
            image_tokens, image_ids = _flatten_latents(image_latents, time=10)
            tokens = torch.cat([tokens, image_tokens], 1)  # [n, h w + h' w', c]
            position_ids = torch.cat([position_ids, image_ids], 1)
        return {
            "hidden_states": tokens,
            "timestep": broadcast_timesteps(timesteps, latents) / 1000,  # σ
            "guidance": self.make_guidance(latents, guidance_scale),
            "encoder_hidden_states": prompt_embeds,  # [n, tokens, width]
            "txt_ids": make_position_ids(prompt_embeds, num_tokens=prompt_embeds.shape[1]),
            "img_ids": position_ids,
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Take the tokens of the noisy latents, which come first, as [n, c, h, w]."""
        size = latents.shape[-2:]
        return output[:, : size.numel()].mT.unflatten(-1, size)

    def _get_patch_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation per channel [4 c, 1, 1] of the VAE's batch norm."""
        vae = self.pipeline.vae
        mean = vae.bn.running_mean[:, None, None].to(patches)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None].to(patches)
        return mean, std


class Flux2KleinFamily(Flux2Family):
    """Adapter of FLUX.2 klein: Qwen3 instead of Mistral 3, and no embedded guidance.

    Guidance calls the transformer once for each branch, so that a call has one branch. Distilled
    checkpoints have no guidance at all.
    """

    modelspec_name = "Flux.2-klein-4b"

    @property
    @override
    def takes_negative_prompts(self) -> bool:  # type: ignore[override]
        """Whether the checkpoint has guidance at all: distilled ones have none."""
        return not self.pipeline.config.is_distilled

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and encoded negative prompts; distilled checkpoints have no guidance."""
        if self.pipeline.config.is_distilled:
            return {"guidance_scale": 1.0}
        arguments: dict[str, Any] = {"guidance_scale": guidance_scale}
        if any(negative_prompts):
            embeds = self.encode_text(negative_prompts)["prompt_embeds"]
            arguments["negative_prompt_embeds"] = embeds
        return arguments

    @property
    @override
    def architecture(self) -> str:
        """Architecture name in modelspec metadata: a LoRA fits one of the two sizes alone."""
        return f"Flux.2-klein-{'9b' if self.denoiser.config.num_attention_heads > 24 else '4b'}"


def make_position_ids(
    samples: Tensor, *, time: int = 0, size: tuple[int, int] = (1, 1), num_tokens: int = 1
) -> Tensor:
    """Make position ids (time, row, column, token) of a grid, equal for all samples.

    Args:
        samples: [n, ...].
        time: 0 for prompts and noisy latents, else the number of the input image.
        size: Rows and columns of latents.
        num_tokens: Of a prompt.

    Returns:
        Integers [n, rows * columns * num_tokens, 4].
    """
    axes = (torch.tensor([time]), *(torch.arange(length) for length in (*size, num_tokens)))
    return torch.cartesian_prod(*axes).to(samples.device).expand(len(samples), -1, -1)


def _flatten_latents(latents: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Return latents [n, c, h, w] as tokens [n, h w, c], and their position ids [n, h w, 4]."""
    height, width = latents.shape[-2:]
    return latents.flatten(2).mT, make_position_ids(latents, time=time, size=(height, width))
