"""Pipelines in which diffusers has already loaded or fused a LoRA."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

NAMES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "z_image"]


def make_lora(base: DiffusionBase, seed: int, preset: str) -> LoraWeights:
    layout = base.make_layout(preset, 2)
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, 0.3 * torch.randn(layout.numel, generator=generator))


def sample(name: str, pipe: Any) -> Tensor:
    tiny = get_tiny_pipeline(name)
    return pipe(
        prompt=list(tiny.prompts),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **deepcopy(tiny.arguments),
    ).images


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_is_added_to_one_that_diffusers_loaded(
    name: str, fused: bool, tmp_path: Path
) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    pipe = base.pipeline
    loaded = make_lora(base, 0, "attention")
    other = make_lora(base, 1, "attention+mlp")
    with compose_loras(pipe, [loaded, other]):
        expected = sample(name, pipe)
    path = save_lora(loaded, tmp_path / "loaded.safetensors")
    other_path = save_lora(other, tmp_path / "other.safetensors")

    pipe.load_lora_weights(str(path), adapter_name="loaded")
    if fused:
        pipe.fuse_lora()
    assert base.make_layout("attention+mlp", 2) == other.layout
    reloaded = load_lora(other_path, modules=base.modules).weights
    assert reloaded.layout.targets == other.layout.targets
    with compose_loras(pipe, [other]):
        torch.testing.assert_close(sample(name, pipe), expected, atol=1e-3, rtol=1e-3)
    with apply_autolora_guidance(pipe, other, 1.0):
        torch.testing.assert_close(sample(name, pipe), expected, atol=1e-3, rtol=1e-3)
    assert (sample(name, pipe) - expected).abs().max() > 0.01


def test_convolutions_of_a_loaded_lora_take_another(tmp_path: Path) -> None:
    name = "stable_diffusion"
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    first, second = (make_lora(base, seed, "attention+conv") for seed in (0, 1))
    with compose_loras(base.pipeline, [first, second], weights=[0.3, 0.3]):
        expected = sample(name, base.pipeline)
    path = save_lora(first * 0.3, tmp_path / "first.safetensors")
    base.pipeline.load_lora_weights(str(path))
    with compose_loras(base.pipeline, [second], weights=[0.3]):
        torch.testing.assert_close(sample(name, base.pipeline), expected, atol=1e-2, rtol=1e-2)
