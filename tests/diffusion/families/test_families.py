"""Every family calls its denoiser exactly as diffusers' own pipeline does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.families.registry import FAMILIES, get_pipeline_family
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline
from tests.tiny_pipelines.base import TinyPipeline


def make_conditions(tiny: TinyPipeline) -> Any:
    """Encode the prompts, and the input image where the family takes one."""
    family = get_pipeline_family(tiny.pipe)
    images = tiny.arguments.get("image") if tiny.images is None else tiny.images
    with torch.no_grad():
        conditions: Any = family.encode_text(list(tiny.prompts), images)
        if family.edits_images and images is not None:
            conditions["image_latents"] = family.encode_images(images)
    return conditions


def assert_same_inputs(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare arguments; None, empty dicts and a time for all samples are what they stand for."""
    actual, expected = (
        {k: v for k, v in d.items() if v not in ({},) and v is not None}
        if not any(isinstance(v, Tensor) for v in d.values())
        else {k: v for k, v in d.items() if v is not None and not (isinstance(v, dict) and not v)}
        for d in (actual, expected)
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
