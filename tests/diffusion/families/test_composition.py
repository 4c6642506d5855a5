"""Composition, AutoLoRA guidance and LoRAs per sample while each family's own pipeline samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights
from tests.diffusion.families.calls import WITHOUT_REGIONS
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}
FULL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def sample(name: str, **arguments: Any) -> Tensor:
    """Sample latents with guidance, where the family has any."""
    tiny = get_tiny_pipeline(name)
    options = {"num_inference_steps": 2} | tiny.arguments | (tiny.guidance or {}) | arguments
    options = deepcopy(options)  # Z-Image's pipeline writes into its list of negative prompts
    return tiny.pipe(
        prompt=list(tiny.prompts),
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **options,
    ).images


def predict_first_step(name: str) -> Tensor:
    """Return the prediction [n, c, h, w] that the scheduler gets in the first step."""
    tiny = get_tiny_pipeline(name)
    return tiny.unpack(tiny.record_calls(tiny.prompts, steps=1)[0].prediction)


def make_loras(name: str, count: int, preset: str = "attention") -> list[LoraWeights]:
    layout = DiffusionBase("tiny", get_tiny_pipeline(name).pipe).make_layout(preset, 2)
    generator = torch.Generator().manual_seed(1)
    return [
        LoraWeights.unflatten(layout, 0.3 * torch.randn(layout.numel, generator=generator))
        for _ in range(count)
    ]


@contextmanager
def merged_lora(name: str, lora: LoraWeights) -> Iterator[None]:
    """Add ΔW to the weights of the denoiser."""
    denoiser = DiffusionBase("tiny", get_tiny_pipeline(name).pipe).denoiser
    weights = [denoiser.get_submodule(t.path).weight for t in lora.layout.targets]
    originals = [weight.data for weight in weights]
    for weight, delta in zip(weights, lora.get_delta_weights(), strict=True):
        weight.data = weight.data + delta.reshape(weight.shape)
    try:
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original


@pytest.mark.parametrize("name", FACTORIES)
def test_merge_and_composite_equal_merged_weights(name: str) -> None:
    tiny, (a, b) = get_tiny_pipeline(name), make_loras(name, 2)
    with merged_lora(name, merge([a, b], [0.7, -0.4])):
        expected = sample(name)
    with compose_loras(tiny.pipe, [a, b], "merge", [0.7, -0.4]):
        torch.testing.assert_close(sample(name), expected, **TOLERANCES)
    with merged_lora(name, a):
        expected = sample(name)
    with compose_loras(tiny.pipe, [a, a], "composite"):
        torch.testing.assert_close(sample(name), expected, **TOLERANCES)
    with compose_loras(tiny.pipe, [b, a], "switch", config=CompositionConfig(switch_order=[1])):
        torch.testing.assert_close(sample(name), expected, **TOLERANCES)
    assert (expected - sample(name)).abs().max() > 0.01


@pytest.mark.parametrize("name", FACTORIES)
def test_switch_and_schedules_count_the_steps_of_the_pipeline(name: str) -> None:
    tiny, (a, b) = get_tiny_pipeline(name), make_loras(name, 2)
    calls: list[tuple[int, int]] = []

    def record_steps(step: int, num_steps: int) -> list[float]:
        calls.append((step, num_steps))
        return [1.0, 1.0]

    config = CompositionConfig(switch_every=1)
    with compose_loras(tiny.pipe, [a, b], "switch", schedule=record_steps, config=config):
        sample(name, num_inference_steps=4)
        sample(name, num_inference_steps=3)
    counted = [call for i, call in enumerate(calls) if i == 0 or call != calls[i - 1]]
    assert counted == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("name", FACTORIES)
def test_spatial_equals_the_lora_of_each_region(name: str, windowed: bool) -> None:
    tiny, (a, b) = get_tiny_pipeline(name), make_loras(name, 2)
    full_config = CompositionConfig(regions=[FULL], windowed=windowed)
    if name in WITHOUT_REGIONS:
        with (
            compose_loras(tiny.pipe, [a], "spatial", config=full_config),
            pytest.raises(InvalidArgumentError, match="regions are not supported on a"),
        ):
            sample(name)
        return
    with merged_lora(name, a):
        expected = sample(name)
    with compose_loras(tiny.pipe, [a], "spatial", config=full_config):
        torch.testing.assert_close(sample(name), expected, **TOLERANCES)
    config = CompositionConfig(regions=[LEFT, RIGHT], windowed=windowed)
    with compose_loras(tiny.pipe, [a, b], "spatial", config=config):
        mixed = predict_first_step(name)  # [n, c, h, w]
    if windowed:  # a window does not see the other, nor the LoRA of the other
        with compose_loras(tiny.pipe, [a, b * 2.0], "spatial", config=config):
            changed = predict_first_step(name)
        difference = (changed - mixed).abs().amax((0, 1, 2))  # [w]
        half_width = len(difference) // 2
        assert difference[: max(1, half_width - 1)].max() < 1e-5
        assert difference[-1] > 1e-4
        return
    width = mixed.shape[-1]
    num_inside = max(1, width // 2 - 1)  # a token in the middle belongs to both regions
    for lora, columns in ((a, slice(None, num_inside)), (b, slice(width - num_inside, None))):
        with merged_lora(name, lora):
            alone = predict_first_step(name)
        torch.testing.assert_close(mixed[..., columns], alone[..., columns], **TOLERANCES)


@pytest.mark.parametrize("name", FACTORIES)
def test_autolora_guidance_is_the_base_at_0_and_the_lora_at_1(name: str) -> None:
    tiny, (lora,) = get_tiny_pipeline(name), make_loras(name, 1)
    if name == "instruct_pix2pix_xl":
        with (
            apply_autolora_guidance(tiny.pipe, lora),
            pytest.raises(InvalidArgumentError, match="does not tell its guidance scale"),
        ):
            sample(name)
        return
    with merged_lora(name, lora):
        lora_latents = sample(name)
    for gamma, expected in ((0.0, sample(name)), (1.0, lora_latents)):
        with apply_autolora_guidance(tiny.pipe, lora, gamma):
            torch.testing.assert_close(sample(name), expected, **TOLERANCES)


@pytest.mark.parametrize("name", FACTORIES)
def test_each_sample_has_its_own_lora_in_the_pipeline(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    # HiDream's routed experts see the tokens of all samples as one list
    preset = "attention" if name == "hidream" else "attention+mlp"
    loras = make_loras(name, len(tiny.prompts), preset)
    base = DiffusionBase("tiny", tiny.pipe)
    with inject_lora(base.denoiser, LoraWeights.stack(loras)):
        batch = sample(name)
    for i, lora in enumerate(loras):
        with merged_lora(name, lora):
            alone = sample(name)
        torch.testing.assert_close(batch[i], alone[i], **TOLERANCES)
