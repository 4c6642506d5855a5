"""Tiny pipelines of every class that composition must serve, each with the arguments of one short run."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import get_denoiser
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.weights import LoraWeights


class Tiny:
    """A pipeline and how to run it: ``latents(**more)`` are those of one run from fixed noise."""

    def __init__(self, pipe: Any, **arguments: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.arguments = pipe, arguments

    @property
    def name(self) -> str:
        return get_denoiser(self.pipe)[0]

    @property
    def denoiser(self) -> nn.Module:
        return get_denoiser(self.pipe)[1]

    def latents(self, **more: Any) -> Tensor:
        return self.pipe(
            **(self.arguments | more),
            output_type="latent",
            generator=torch.Generator().manual_seed(5),
        ).images

    def lora(
        self, seed: int, preset: str = "attention+mlp", rank: int = 3, size: float = 0.2
    ) -> LoraWeights:
        layout = make_layout({self.name: self.denoiser}, preset, rank, "tiny/base")
        generator = torch.Generator().manual_seed(seed)
        return LoraWeights.unflatten(layout, size * torch.randn(layout.numel, generator=generator))

    def merged(self, lora: LoraWeights) -> "Tiny":
        """The same with ΔW added to the weights."""
        other = deepcopy(self.pipe)
        module = get_denoiser(other)[1]
        for site, delta in zip(lora.layout.targets, lora.get_delta_weights(), strict=True):
            weight = module.get_submodule(site.path).weight
            weight.data += delta.reshape(weight.shape)
        return Tiny(other, **self.arguments)


def _text(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels)


def _sd(pipe: Any) -> Tiny:
    pipe = deepcopy(pipe)
    embeds = {
        "prompt_embeds": _text(1, 5, 16, seed=1),
        "negative_prompt_embeds": _text(1, 5, 16, seed=2),
    }
    return Tiny(pipe, **embeds, num_inference_steps=4, guidance_scale=3.0, height=8, width=8)


def _ip2p(pipe: Any) -> Tiny:
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    unet = UNet2DConditionModel.from_config(config | {"in_channels": 8}).requires_grad_(False)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"unet": unet}
    made = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    embeds = {
        "prompt_embeds": _text(1, 5, 16, seed=1),
        "negative_prompt_embeds": _text(1, 5, 16, seed=2),
    }
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    return Tiny(made, **embeds, **scales, image=torch.rand(1, 3, 8, 8), num_inference_steps=4)


def _sdxl() -> Tiny:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(6)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        transformer_layers_per_block=(1, 2),
    ).requires_grad_(False)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, scheduler=EulerDiscreteScheduler(), **nothing
    )
    embeds = {
        "prompt_embeds": _text(1, 5, 16, seed=1),
        "negative_prompt_embeds": _text(1, 5, 16, seed=2),
    }
    pooled = {
        "pooled_prompt_embeds": _text(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _text(1, 16, seed=4),
    }
    return Tiny(
        pipe, **embeds, **pooled, num_inference_steps=4, guidance_scale=3.0, height=8, width=8
    )


def _sd3(transformer: nn.Module) -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    nothing |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(), scheduler=FlowMatchEulerDiscreteScheduler(), **nothing
    )
    embeds = {
        "prompt_embeds": _text(1, 5, 16, seed=1),
        "negative_prompt_embeds": _text(1, 5, 16, seed=2),
    }
    pooled = {
        "pooled_prompt_embeds": _text(1, 8, seed=3),
        "negative_pooled_prompt_embeds": _text(1, 8, seed=4),
    }
    return Tiny(
        pipe, **embeds, **pooled, num_inference_steps=4, guidance_scale=3.0, height=8, width=8
    )


def _flux() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ).requires_grad_(False)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=transformer, vae=_vae(4), scheduler=FlowMatchEulerDiscreteScheduler(), **nothing
    )
    embeds = {"prompt_embeds": _text(1, 5, 16, seed=1), "pooled_prompt_embeds": _text(1, 8, seed=3)}
    return Tiny(pipe, **embeds, num_inference_steps=4, guidance_scale=3.0, height=16, width=16)


@pytest.fixture
def tiny(pipe: Any, transformer: nn.Module) -> Callable[[str], Tiny]:
    """``sd``, ``ip2p``, ``sdxl``, ``sd3`` or ``flux``."""
    makers: dict[str, Callable[[], Tiny]] = {
        "sd": lambda: _sd(pipe),
        "ip2p": lambda: _ip2p(pipe),
        "sdxl": _sdxl,
        "sd3": lambda: _sd3(transformer),
        "flux": _flux,
    }
    return lambda kind: makers[kind]()
