"""LoRA targets of FLUX.2 and Qwen-Image at real size: all projections, and nothing else."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import nn

from hyperlora.diffusion.families.registry import FAMILIES


class Base(NamedTuple):
    """A pretrained base.

    Attributes:
        pipeline_name: Class of the pipeline.
        denoiser_name: Class of the denoiser.
        config: Where it differs from the defaults of the denoiser's class.
        num_attention: Projections of attention.
        num_feed_forward: Feed-forward layers.
    """

    pipeline_name: str
    denoiser_name: str
    config: Mapping[str, Any]
    num_attention: int
    num_feed_forward: int


FLUX_2, QWEN_IMAGE = "Flux2Transformer2DModel", "QwenImageTransformer2DModel"
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
# a double block has 8 projections and 4 feed-forward layers, a single block 2 projections
BASES = {
    "FLUX.2 dev": Base("Flux2Pipeline", FLUX_2, {}, 8 * 8 + 48 * 2, 8 * 4),
    "FLUX.2 klein 4B": Base("Flux2KleinPipeline", FLUX_2, KLEIN_4B, 5 * 8 + 20 * 2, 5 * 4),
    "FLUX.2 klein 9B": Base("Flux2KleinPipeline", FLUX_2, KLEIN_9B, 8 * 8 + 24 * 2, 8 * 4),
    "Qwen-Image": Base("QwenImagePipeline", QWEN_IMAGE, {}, 60 * 8, 60 * 4),
    "Qwen-Image-Edit": Base("QwenImageEditPipeline", QWEN_IMAGE, {}, 60 * 8, 60 * 4),
    "Qwen-Image-Edit-2511": Base(
        "QwenImageEditPlusPipeline", QWEN_IMAGE, {"zero_cond_t": True}, 60 * 8, 60 * 4
    ),
}


def find_linear_layers(denoiser: nn.Module, class_suffix: str) -> set[str]:
    """Find the Linear layers in all modules whose class name ends with the suffix."""
    return {
        f"{owner_path}.{path}"
        for owner_path, owner in denoiser.named_modules()
        if type(owner).__name__.endswith(class_suffix)
        for path, module in owner.named_modules()
        if isinstance(module, nn.Linear)
    }


def find_matches(denoiser: nn.Module, pattern: str) -> set[str]:
    """Find the modules whose path matches."""
    return {path for path, _ in denoiser.named_modules() if re.search(pattern, path)}


@pytest.mark.parametrize("name", BASES)
def test_patterns_match_every_projection_and_nothing_else(name: str) -> None:
    base = BASES[name]
    family = FAMILIES[base.pipeline_name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, base.denoiser_name)(**base.config)

    attention = find_linear_layers(denoiser, "Attention")
    assert find_matches(denoiser, family.attention_pattern) == attention
    assert len(attention) == base.num_attention

    feed_forward = find_linear_layers(denoiser, "FeedForward")
    assert find_matches(denoiser, family.feed_forward_pattern) == feed_forward
    assert len(feed_forward) == base.num_feed_forward
