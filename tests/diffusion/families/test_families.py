"""Every family calls its denoiser exactly as diffusers' own pipeline does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import FAMILIES, get_pipeline_family
from tests.diffusion.families.calls import WITHOUT_REGIONS, make_conditions
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

EDITORS = [name for name in FACTORIES if get_tiny_pipeline(name).images is not None]


def assert_same_inputs(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare arguments; None, empty dicts and a time for all samples are what they stand for."""
    actual, expected = (
        {name: value for name, value in inputs.items() if isinstance(value, Tensor) or value}
        for inputs in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                actual[name], value.expand_as(actual[name]), atol=1e-5, rtol=1e-5
            )
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            torch.testing.assert_close(list(actual[name]), value, atol=1e-5, rtol=1e-5)
        elif isinstance(value, dict):
            assert_same_inputs(actual[name], value)
        else:
            assert actual[name] == value


def make_call(name: str) -> tuple[PipelineFamily, Tensor, Any]:
    """The adapter, the latents of the pipeline's first step, and the conditions."""
    tiny = get_tiny_pipeline(name)
    latents = tiny.unpack(tiny.record_calls(tiny.prompts, steps=1)[0].sample)
    return get_pipeline_family(tiny.pipe), latents, make_conditions(tiny)


@pytest.mark.parametrize("name", FACTORIES)
def test_predict_equals_the_pipeline(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    conditions = make_conditions(tiny)
    records = tiny.record_calls(tiny.prompts)
    assert len(records) == 3
    for record in records:
        latents = tiny.unpack(record.sample)
        inputs = family.make_inputs(latents, record.timestep, conditions)
        assert_same_inputs(inputs, record.inputs)
        with torch.no_grad():
            prediction = family.predict(latents, record.timestep, conditions)
        torch.testing.assert_close(prediction, tiny.unpack(record.prediction), atol=1e-5, rtol=1e-5)


def test_every_family_has_a_tiny_pipeline() -> None:
    tested = {type(get_pipeline_family(get_tiny_pipeline(name).pipe)) for name in FACTORIES}
    assert tested == set(FAMILIES.values())


@pytest.mark.parametrize("name", FACTORIES)
def test_guidance_scale_is_told_to_distilled_denoisers_alone(name: str) -> None:
    family, latents, conditions = make_call(name)
    timestep = torch.tensor(500.0)
    inputs = family.make_inputs(latents, timestep, conditions, guidance_scale=2.25)
    guidance = inputs.get("guidance")
    is_distilled = getattr(family.denoiser.config, "guidance_embeds", False)
    assert (guidance is not None) == is_distilled
    if guidance is not None:
        assert (guidance == 2.25).all()
        other = family.make_inputs(latents, timestep, conditions)["guidance"]
        assert (other != 2.25).all()


@pytest.mark.parametrize("name", EDITORS)
def test_input_images_get_the_dtype_of_the_latents(name: str) -> None:
    family, latents, conditions = make_call(name)
    expected = family.make_inputs(latents, torch.tensor(500.0), conditions)
    doubled = conditions | {"image_latents": conditions["image_latents"].double()}
    assert_same_inputs(family.make_inputs(latents, torch.tensor(500.0), doubled), expected)


@pytest.mark.parametrize("name", FACTORIES)
def test_predict_runs_another_denoiser_with_the_scale(name: str) -> None:
    """A denoiser in training takes the place of the pipeline's own."""
    family, latents, conditions = make_call(name)
    calls: list[Any] = []

    class Recorder(torch.nn.Module):
        is_gradient_checkpointing = False
        dtype = latents.dtype

        def forward(self, **inputs: Any) -> Any:
            calls.append(inputs.get("guidance"))
            return family.denoiser(**inputs)

    with torch.no_grad():
        expected = family.predict(latents, torch.tensor(500.0), conditions, guidance_scale=2.25)
        prediction = family.predict(
            latents, torch.tensor(500.0), conditions, denoiser=Recorder(), guidance_scale=2.25
        )
    assert len(calls) == 1 and (calls[0] is None or (calls[0] == 2.25).all())
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("name", FACTORIES)
def test_one_sample_is_a_batch_of_one(name: str) -> None:
    family, latents, _ = make_call(name)
    tiny, latents, timesteps = get_tiny_pipeline(name), latents[:1], torch.tensor([500.0])
    images = None if tiny.images is None else tiny.images[:1]
    conditions = family.encode_text(list(tiny.prompts[:1]), images)
    if images is not None:
        conditions["image_latents"] = family.encode_images(images)
    if family.denoiser_name == "unet":
        timesteps = timesteps.long()
    with torch.no_grad():
        prediction = family.predict(latents, timesteps, conditions)
    assert prediction.shape == latents.shape and prediction.isfinite().all()
    if name not in WITHOUT_REGIONS:
        rows, columns = family.get_grid(family.make_inputs(latents, timesteps, conditions))
        assert latents.shape[-2] % rows == latents.shape[-1] % columns == 0


@pytest.mark.parametrize("name", [name for name in FACTORIES if name not in WITHOUT_REGIONS])
def test_crop_restricts_a_call_to_a_rectangle(name: str) -> None:
    family, latents, conditions = make_call(name)
    shape = latents.shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if "image_latents" not in conditions:  # of the input image's size
        latents = latents.repeat(1, 1, 1, 2)[..., : shape[-1] + 2 * family.grid_multiple]
    inputs = family.make_inputs(latents, torch.tensor(500.0), conditions)
    rows, columns = family.get_grid(inputs)
    side = latents.shape[-1] // columns  # of a token, in latents
    assert (rows * side, columns * side) == latents.shape[-2:]
    top, left, height, width = 1, 1, rows - 2, columns - 3
    cropped = family.crop_inputs(inputs, (top, left, height, width))
    part = latents[..., side * top : side * (top + height), side * left : side * (left + width)]
    if "image_latents" in conditions and family.latents_input == "sample":
        image = conditions["image_latents"]
        size = part.shape[-2:]
        conditions["image_latents"] = image[..., top:, left:][..., : size[0], : size[1]]
    expected = family.make_inputs(part, torch.tensor(500.0), conditions)
    actual_tokens, expected_tokens = cropped[family.latents_input], expected[family.latents_input]
    if isinstance(expected_tokens, Tensor):
        torch.testing.assert_close(actual_tokens, expected_tokens)
    else:
        torch.testing.assert_close(list(actual_tokens), list(expected_tokens))
