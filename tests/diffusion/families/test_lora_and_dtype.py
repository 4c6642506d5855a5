"""FLUX.2 and Qwen-Image in bfloat16, in training, and with one LoRA for each sample."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline
from tests.tiny_pipelines.base import TinyPipeline

NAMES = ["flux2", "flux2_edit", "flux2_klein", "flux2_klein_edit", "qwen_image"]
EDIT_NAMES = ["qwen_image_edit", "qwen_image_edit_plus"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def make_conditions(tiny: TinyPipeline) -> Any:
    """Encode the prompts, and the input images where there are some."""
    family = get_pipeline_family(tiny.pipe)
    conditions: Any = family.encode_text(list(tiny.prompts), tiny.images)
    if tiny.images is not None:
        conditions["image_latents"] = family.encode_images(tiny.images)
    return conditions


# not with the images of FLUX.2, whose pixels are channels-last in the pipeline, nor with the
# prompts of Edit, which are one batch there: convolutions and attention then round differently
@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "qwen_image", "qwen_image_edit_plus"])
def test_inputs_in_bfloat16_equal_the_pipeline(name: str) -> None:
    tiny = FACTORIES[name]()  # not the shared one: it changes its dtype
    tiny.pipe.set_progress_bar_config(disable=True)
    tiny.pipe.to(dtype=torch.bfloat16)
    for module in tiny.pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
    family = get_pipeline_family(tiny.pipe)
    conditions = make_conditions(tiny)
    for record in tiny.record_calls(tiny.prompts):
        inputs = family.make_inputs(tiny.unpack(record.sample), record.timestep, conditions)
        for key, value in record.inputs.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(inputs[key], value, atol=0, rtol=0)


@pytest.mark.parametrize("name", [*NAMES, *EDIT_NAMES])
def test_gradients_reach_latents_and_prompts(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    record = tiny.record_calls(tiny.prompts)[1]
    conditions = make_conditions(tiny)
    embeds = conditions["prompt_embeds"].clone().requires_grad_()
    latents = tiny.unpack(record.sample).clone().requires_grad_()
    prediction = family.predict(latents, record.timestep, conditions | {"prompt_embeds": embeds})
    # kernels of training differ
    torch.testing.assert_close(prediction, tiny.unpack(record.prediction), **CLOSE)
    for gradient in torch.autograd.grad(prediction.square().sum(), [latents, embeds]):
        assert gradient.isfinite().all()
        assert gradient.flatten(1).norm(dim=1).gt(0).all()


@pytest.mark.parametrize("name", [*NAMES, "qwen_image_edit"])
def test_one_lora_for_each_sample_equals_each_alone(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    record = tiny.record_calls(tiny.prompts)[1]
    latents, conditions = tiny.unpack(record.sample), make_conditions(tiny)
    pattern = re.compile(family.get_target_pattern("attention+mlp"))
    layout = LoraLayout.from_module(
        family.denoiser, "transformer", lambda path: bool(pattern.search(path)), 2, "tiny"
    )
    generator = torch.Generator().manual_seed(0)
    flat = 0.3 * torch.randn(len(tiny.prompts), layout.numel, generator=generator)
    loras = LoraWeights.unflatten(layout, flat)
    with torch.no_grad():
        with inject_lora(family.denoiser, loras):
            together = family.predict(latents, record.timestep, conditions)
        for i, prediction in enumerate(together):
            with inject_lora(family.denoiser, loras[i]):
                alone = family.predict(latents, record.timestep, conditions)
            torch.testing.assert_close(prediction, alone[i], atol=1e-4, rtol=1e-4)
    base = tiny.unpack(record.prediction)
    assert (together - base).flatten(1).norm(dim=1).gt(1e-3).all()
