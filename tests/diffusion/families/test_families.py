"""Every family calls its denoiser exactly as diffusers' own pipeline does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.families.registry import FAMILIES, get_pipeline_family
from tests.diffusion.families.calls import make_conditions
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline


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
