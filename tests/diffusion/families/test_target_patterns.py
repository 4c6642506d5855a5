"""LoRA targets of the presets at real size: every projection of every block, and nothing else."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import pytest
from torch import nn

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import FAMILIES
from tests.diffusion.test_target_modules import SDXL

SD_1_5 = {"cross_attention_dim": 768}
SD_3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD_3_5_MEDIUM = SD_3_MEDIUM | {
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
FLUX_2, QWEN_IMAGE = "Flux2Transformer2DModel", "QwenImageTransformer2DModel"
HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "llama_layers": [*range(32), *[31] * 16],
    "axes_dims_rope": (64, 32, 32),
}


class Base(NamedTuple):
    """A pretrained base: what its denoiser is made of, and how many targets it has.

    Attributes:
        pipeline_name: Class of the pipeline.
        denoiser_name: Class of the denoiser.
        config: Where the base differs from the defaults of the class.
        num_attention: Projections of attention.
        num_feed_forward: Feed-forward layers, with a UNet's projections of the time.
    """

    pipeline_name: str
    denoiser_name: str
    config: Mapping[str, Any]
    num_attention: int
    num_feed_forward: int


BASES = {
    "SD 1.5": Base("StableDiffusionPipeline", "UNet2DConditionModel", SD_1_5, 128, 32 + 22),
    "SDXL": Base("StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL, 560, 140 + 17),
    # the last block has no output for the prompt: no to_add_out, no ff_context
    "SD 3 medium": Base(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", SD_3_MEDIUM, 24 * 8 - 1, 23 * 4 + 2
    ),
    "SD 3.5 medium": Base(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD_3_5_MEDIUM,
        24 * 8 - 1 + 13 * 4,
        23 * 4 + 2,
    ),
    "FLUX.1": Base("FluxPipeline", "FluxTransformer2DModel", {}, 19 * 8 + 38 * 3, 19 * 4 + 38 * 2),
    "Z-Image": Base("ZImagePipeline", "ZImageTransformer2DModel", {}, 34 * 4, 34 * 3),
    "Chroma": Base(
        "ChromaPipeline", "ChromaTransformer2DModel", {}, 19 * 8 + 38 * 3, 19 * 4 + 38 * 2
    ),
    "Lumina 2": Base("Lumina2Pipeline", "Lumina2Transformer2DModel", {}, 30 * 4, 30 * 3),
    # 4 routed experts and a shared one, of 3 layers each
    "HiDream": Base(
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        16 * 8 + 32 * 4,
        16 * 6 * 3 + 32 * 5 * 3,
    ),
    "Krea 2": Base("Krea2Pipeline", "Krea2Transformer2DModel", {}, 30 * 5, 30 * 3),
    "Qwen-Image 2.1": Base(
        "QwenImage21Pipeline", "QwenImage21Transformer2DModel", {}, 32 * 4, 32 * 3
    ),
    # a double block has 8 projections and 4 feed-forward layers, a single block 2 projections
    "FLUX.2 dev": Base("Flux2Pipeline", FLUX_2, {}, 8 * 8 + 48 * 2, 8 * 4),
    "FLUX.2 klein 4B": Base("Flux2KleinPipeline", FLUX_2, KLEIN_4B, 5 * 8 + 20 * 2, 5 * 4),
    "FLUX.2 klein 9B": Base("Flux2KleinPipeline", FLUX_2, KLEIN_9B, 8 * 8 + 24 * 2, 8 * 4),
    "Qwen-Image": Base("QwenImagePipeline", QWEN_IMAGE, {}, 60 * 8, 60 * 4),
    "Qwen-Image-Edit": Base("QwenImageEditPipeline", QWEN_IMAGE, {}, 60 * 8, 60 * 4),
    "Qwen-Image-Edit-2511": Base(
        "QwenImageEditPlusPipeline", QWEN_IMAGE, {"zero_cond_t": True}, 60 * 8, 60 * 4
    ),
}
EXCLUDED = {"Krea 2": r"^text_fusion\.layerwise_blocks\."}
"""Blocks that take no LoRA."""


def make_denoiser(base: Base) -> nn.Module:
    """Make the denoiser on the meta device, without memory for its weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return getattr(diffusers, base.denoiser_name)(**base.config)


def find_layers(denoiser: nn.Module, is_owner: Callable[[str], bool]) -> set[str]:
    """Find the Linear layers inside modules whose class name ``is_owner`` accepts."""
    owners = [path for path, module in denoiser.named_modules() if is_owner(type(module).__name__)]
    return {
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{owner}.") for owner in owners)
    }


def find_matches(denoiser: nn.Module, pattern: str) -> set[str]:
    """Find the modules whose path matches."""
    return {path for path, _ in denoiser.named_modules() if re.search(pattern, path)}


def drop_excluded(name: str, paths: set[str]) -> set[str]:
    """Drop the blocks of a base that take no LoRA."""
    return {path for path in paths if name not in EXCLUDED or not re.search(EXCLUDED[name], path)}


@pytest.mark.parametrize("name", BASES)
def test_presets_hit_every_projection_and_nothing_else(name: str) -> None:
    base = BASES[name]
    family: type[PipelineFamily] = FAMILIES[base.pipeline_name]
    denoiser = make_denoiser(base)

    attention = find_layers(denoiser, lambda kind: kind.endswith("Attention"))
    assert find_matches(denoiser, family.attention_pattern) == drop_excluded(name, attention)
    assert len(drop_excluded(name, attention)) == base.num_attention

    feed_forward = find_layers(denoiser, lambda kind: bool(re.search("FeedForward|SwiGLU", kind)))
    # layers of feed-forward and time that are attributes of the blocks themselves
    feed_forward |= find_matches(denoiser, r"\.time_emb_proj$|^single_.*\.proj_(mlp|out)$")
    assert find_matches(denoiser, family.feed_forward_pattern) == drop_excluded(name, feed_forward)
    assert len(drop_excluded(name, feed_forward)) == base.num_feed_forward


def test_convolutions_of_a_unet_are_all_hit() -> None:
    base = BASES["SD 1.5"]
    family = FAMILIES[base.pipeline_name]
    denoiser = make_denoiser(base)
    convolutions = {
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d) and path not in ("conv_in", "conv_out")
    }
    assert family.convolution_pattern is not None
    assert find_matches(denoiser, family.convolution_pattern) == convolutions
