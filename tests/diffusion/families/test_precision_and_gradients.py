"""Families in bfloat16 and in training, also with checkpointed blocks."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.families.registry import get_pipeline_family
from tests.diffusion.families.calls import make_conditions
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

ROUNDING = (
    "instruct_pix2pix",
    "instruct_pix2pix_xl",
    "flux_kontext",
    "flux2_edit",
    "flux2_klein_edit",
    "qwen_image_edit",
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


# not with the images of FLUX.2, whose pixels are channels-last in the pipeline, nor with the
# prompts of Edit, which are one batch there: convolutions and attention then round differently
# InstructPix2Pix scales its input image and the adapter scales it back, a rounding apart
@pytest.mark.parametrize("name", [name for name in FACTORIES if name not in ROUNDING])
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
                torch.testing.assert_close(
                    inputs[key], value.expand_as(inputs[key]), atol=0, rtol=0
                )


@pytest.mark.parametrize("name", ["stable_diffusion", "z_image", "flux2_klein"])
def test_denoiser_in_bfloat16_takes_float32_latents(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    conditions = map_tensors(
        lambda value: value.bfloat16() if value.is_floating_point() else value,
        make_conditions(tiny),
    )
    record = tiny.record_calls(tiny.prompts, steps=1)[0]
    family = get_pipeline_family(deepcopy(tiny.pipe).to(dtype=torch.bfloat16))
    latents = tiny.unpack(record.sample)
    with torch.no_grad():
        prediction = family.predict(latents.float(), record.timestep, conditions)
        expected = family.predict(latents.bfloat16(), record.timestep, conditions)
    assert prediction.dtype == torch.bfloat16 and torch.equal(prediction, expected)
    size = float(tiny.unpack(record.prediction).abs().max())
    torch.testing.assert_close(
        prediction.float(), tiny.unpack(record.prediction), atol=0.05 * size, rtol=0
    )


@pytest.mark.parametrize("name", FACTORIES)
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
    gradients = torch.autograd.grad(prediction.square().sum(), [latents, embeds])
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.flatten(1).norm(dim=1).gt(0).all()

    family.denoiser.enable_gradient_checkpointing()
    checkpoint = getattr(family.denoiser, "_gradient_checkpointing_func", None)
    try:
        prediction = family.predict(
            latents, record.timestep, conditions | {"prompt_embeds": embeds}
        )
        assert getattr(family.denoiser, "_gradient_checkpointing_func", None) is checkpoint
    finally:
        family.denoiser.disable_gradient_checkpointing()
    torch.testing.assert_close(prediction, tiny.unpack(record.prediction), **CLOSE)
    actual = torch.autograd.grad(prediction.square().sum(), [latents, embeds])
    torch.testing.assert_close(actual, gradients, atol=1e-4, rtol=1e-4)
