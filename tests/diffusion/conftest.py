"""Tiny pipelines of every supported class, each with the arguments of one short run."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.weights import LoraWeights


class TinyPipeline:
    """A pipeline and the arguments of one run from fixed noise."""

    def __init__(self, pipe: Any, **arguments: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.arguments = pipe, arguments

    @property
    def name(self) -> str:
        return get_pipeline_family(self.pipe).denoiser_name

    @property
    def denoiser(self) -> nn.Module:
        return get_pipeline_family(self.pipe).denoiser

    def sample_latents(self, **overrides: Any) -> Tensor:
        return self.pipe(
            **(self.arguments | overrides),
            output_type="latent",
            generator=torch.Generator().manual_seed(5),
        ).images

    def make_lora(
        self, seed: int, preset: str = "attention+mlp", rank: int = 3, size: float = 0.2
    ) -> LoraWeights:
        layout = make_layout({self.name: self.denoiser}, preset, rank, "tiny/base")
        generator = torch.Generator().manual_seed(seed)
        return LoraWeights.unflatten(layout, size * torch.randn(layout.numel, generator=generator))

    def merge_lora(self, lora: LoraWeights) -> "TinyPipeline":
        """Copy the pipeline with ΔW added to its weights."""
        pipe = deepcopy(self.pipe)
        module = get_pipeline_family(pipe).denoiser
        for target, delta in zip(lora.layout.targets, lora.get_delta_weights(), strict=True):
            weight = module.get_submodule(target.path).weight
            weight.data += delta.reshape(weight.shape)
        return TinyPipeline(pipe, **self.arguments)


def _make_embeds(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _make_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels)


def _make_sd(pipe: Any) -> TinyPipeline:
    pipe = deepcopy(pipe)
    embeds = {
        "prompt_embeds": _make_embeds(1, 5, 16, seed=1),
        "negative_prompt_embeds": _make_embeds(1, 5, 16, seed=2),
    }
    return TinyPipeline(
        pipe, **embeds, num_inference_steps=4, guidance_scale=3.0, height=8, width=8
    )


def _make_ip2p(pipe: Any) -> TinyPipeline:
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    unet = UNet2DConditionModel.from_config(config | {"in_channels": 8}).requires_grad_(False)
    components = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"unet": unet}
    edit_pipe = StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)
    embeds = {
        "prompt_embeds": _make_embeds(1, 5, 16, seed=1),
        "negative_prompt_embeds": _make_embeds(1, 5, 16, seed=2),
    }
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    return TinyPipeline(
        edit_pipe, **embeds, **scales, image=torch.rand(1, 3, 8, 8), num_inference_steps=4
    )


def _make_sdxl() -> TinyPipeline:
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
    no_encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(
        vae=_make_vae(), unet=unet, scheduler=EulerDiscreteScheduler(), **no_encoders
    )
    embeds = {
        "prompt_embeds": _make_embeds(1, 5, 16, seed=1),
        "negative_prompt_embeds": _make_embeds(1, 5, 16, seed=2),
    }
    pooled_embeds = {
        "pooled_prompt_embeds": _make_embeds(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _make_embeds(1, 16, seed=4),
    }
    return TinyPipeline(
        pipe,
        **embeds,
        **pooled_embeds,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=8,
        width=8,
    )


def _make_sd3(transformer: nn.Module) -> TinyPipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    no_encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    no_encoders |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **no_encoders,
    )
    embeds = {
        "prompt_embeds": _make_embeds(1, 5, 16, seed=1),
        "negative_prompt_embeds": _make_embeds(1, 5, 16, seed=2),
    }
    pooled_embeds = {
        "pooled_prompt_embeds": _make_embeds(1, 8, seed=3),
        "negative_pooled_prompt_embeds": _make_embeds(1, 8, seed=4),
    }
    return TinyPipeline(
        pipe,
        **embeds,
        **pooled_embeds,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=8,
        width=8,
    )


def _make_flux() -> TinyPipeline:
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
    no_encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=transformer,
        vae=_make_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **no_encoders,
    )
    embeds = {
        "prompt_embeds": _make_embeds(1, 5, 16, seed=1),
        "pooled_prompt_embeds": _make_embeds(1, 8, seed=3),
    }
    return TinyPipeline(
        pipe, **embeds, num_inference_steps=4, guidance_scale=3.0, height=16, width=16
    )


@pytest.fixture
def make_tiny_pipeline(pipe: Any, transformer: nn.Module) -> Callable[[str], TinyPipeline]:
    """Make a pipeline of the kind ``sd``, ``ip2p``, ``sdxl``, ``sd3`` or ``flux``."""
    factories: dict[str, Callable[[], TinyPipeline]] = {
        "sd": lambda: _make_sd(pipe),
        "ip2p": lambda: _make_ip2p(pipe),
        "sdxl": _make_sdxl,
        "sd3": lambda: _make_sd3(transformer),
        "flux": _make_flux,
    }
    return lambda kind: factories[kind]()
