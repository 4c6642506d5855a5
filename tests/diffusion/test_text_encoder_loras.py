"""LoRAs that adapt text encoders and nothing else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.blocks import select_blocks
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

Apply = Callable[[DiffusionBase, LoraWeights], AbstractContextManager[None]]
STRATEGIES: dict[str, Apply] = {
    "merge": lambda base, lora: compose_loras(base.pipeline, [lora]),
    "schedule": lambda base, lora: compose_loras(
        base.pipeline, [lora], schedule=lambda step, num_steps: [1.0]
    ),
    "switch": lambda base, lora: compose_loras(base.pipeline, [lora], "switch"),
    "composite": lambda base, lora: compose_loras(base.pipeline, [lora], "composite"),
    "spatial": lambda base, lora: compose_loras(
        base.pipeline, [lora], "spatial", config=CompositionConfig(regions=[(0, 0, 0.5, 1)])
    ),
    "guidance": lambda base, lora: apply_autolora_guidance(base.pipeline, lora, 1.7),
    "branches": lambda base, lora: inject_lora_by_branch(base.pipeline, lora),
    "injection": lambda base, lora: base.inject_lora(lora),
}


def make_loras(base: DiffusionBase) -> tuple[LoraWeights, LoraWeights]:
    """A LoRA of the text encoders alone, and one of the denoiser alone."""
    layout = base.make_layout("attention", 3, text_encoders=True)
    generator = torch.Generator().manual_seed(9)
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator))
    name = base.family.denoiser_name
    components = [component for component in layout.components if component != name]
    return select_blocks(lora, components), select_blocks(lora, [name])


def sample(base: DiffusionBase, name: str) -> Tensor:
    tiny = get_tiny_pipeline(name)
    arguments = deepcopy(tiny.arguments) | deepcopy(tiny.guidance or {})
    return base.pipeline(
        prompt=list(tiny.prompts),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_every_strategy_samples_as_diffusers_does(name: str, format: str, tmp_path: Path) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    plain = sample(base, name)
    lora, _ = make_loras(base)
    path = save_lora(lora, tmp_path / "x.safetensors", format=format)  # type: ignore[arg-type]
    base.pipeline.load_lora_weights(str(path))
    expected = sample(base, name)
    base.pipeline.unload_lora_weights()
    assert (expected - plain).abs().max() > 1e-3
    loaded = load_lora(path, modules=base.modules).weights
    for strategy, apply in STRATEGIES.items():
        with apply(base, loaded):
            output = sample(base, name)
        torch.testing.assert_close(
            output, expected, atol=1e-5, rtol=1e-5, msg=partial("{}: {}".format, strategy)
        )
    torch.testing.assert_close(sample(base, name), plain, atol=0, rtol=0)


def test_a_lora_of_the_denoiser_composes_with_one_of_the_text_encoders() -> None:
    name = "stable_diffusion"
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    text_lora, denoiser_lora = make_loras(base)
    with base.inject_lora(text_lora):
        outside = sample(base, name)
        with base.inject_lora(denoiser_lora):
            both = sample(base, name)
    assert (both - outside).abs().max() > 1e-3
    loras = [text_lora, denoiser_lora]
    with compose_loras(base.pipeline, loras):
        torch.testing.assert_close(sample(base, name), both, atol=1e-5, rtol=1e-5)
    # a region of the text LoRA is the base with the changed prompt
    regions = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    with compose_loras(base.pipeline, loras, "spatial", config=CompositionConfig(regions=regions)):
        halves = sample(base, name)
    assert (halves - outside).abs().max() > 1e-3 and (halves - both).abs().max() > 1e-3
    config = CompositionConfig(switch_order=[0])  # always the text LoRA's turn
    with compose_loras(base.pipeline, loras, "switch", config=config):
        torch.testing.assert_close(sample(base, name), outside, atol=1e-5, rtol=1e-5)


def test_what_cannot_act_is_refused() -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline("stable_diffusion").pipe))
    text_lora, denoiser_lora = make_loras(base)
    negative = inject_lora_by_branch(base.pipeline, denoiser_lora, text_lora)
    with pytest.raises(InvalidArgumentError, match=r"text_encoder alone, but all prompts"):
        negative.__enter__()
    with pytest.raises(InvalidArgumentError, match="one region per LoRA"):
        compose_loras(base.pipeline, [text_lora], "spatial").__enter__()
    other = DiffusionBase("tiny/other", get_tiny_pipeline("z_image").pipe)
    with pytest.raises(LayoutMismatchError, match="the LoRA changes unet, which ZImagePipeline"):
        compose_loras(other.pipeline, [denoiser_lora]).__enter__()
