"""AutoLoRA's identities and its formula on every class of pipeline."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError

KINDS = ("sd", "ip2p", "sdxl", "sd3", "flux")
TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}
ONE_STEP = {"num_inference_steps": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_apply_autolora_guidance_equals_base_at_0_and_lora_at_1(
    make_tiny_pipeline: Any, kind: str
) -> None:
    tiny = make_tiny_pipeline(kind)
    lora = tiny.make_lora(1, size=0.1)
    base_latents = tiny.sample_latents()
    lora_latents = tiny.merge_lora(lora).sample_latents()
    for gamma, expected in ((0.0, base_latents), (1.0, lora_latents)):
        with apply_autolora_guidance(tiny.pipe, lora, gamma):
            torch.testing.assert_close(tiny.sample_latents(), expected, **TOLERANCES)
    assert (lora_latents - base_latents).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_apply_autolora_guidance_is_linear_in_gamma(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    lora = tiny.make_lora(1, size=0.1)
    latents = {}
    for gamma in (0.0, 0.25, 1.0, 1.75):
        with apply_autolora_guidance(tiny.pipe, lora, gamma):
            latents[gamma] = tiny.sample_latents(**ONE_STEP)
    difference = latents[1.0] - latents[0.0]
    for gamma in (0.25, 1.75):
        expected = latents[0.0] + gamma * difference
        torch.testing.assert_close(latents[gamma], expected, **TOLERANCES)
    with apply_autolora_guidance(tiny.pipe, lora):
        default = tiny.sample_latents(**ONE_STEP)
    torch.testing.assert_close(default, latents[0.0] + 1.5 * difference, **TOLERANCES)


def record_scheduler_input(tiny: Any, **overrides: Any) -> Tensor:
    """Return the prediction that the pipeline hands to its scheduler in the first step."""
    model_outputs: list[Tensor] = []
    step = tiny.pipe.scheduler.step

    def record_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        model_outputs.append(model_output)
        return step(model_output, *args, **kwargs)

    tiny.pipe.scheduler.step = record_step
    tiny.sample_latents(**ONE_STEP, **overrides)
    tiny.pipe.scheduler.step = step
    return model_outputs[0]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ip2p", "sd3"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_apply_autolora_guidance_is_kept_by_pipeline_guidance(
    make_tiny_pipeline: Any, kind: str, rescale: float
) -> None:
    if rescale and kind not in ("sd", "sdxl"):
        pytest.skip("this pipeline has no guidance_rescale")
    tiny = make_tiny_pipeline(kind)
    lora = tiny.make_lora(1, size=0.1)
    model_outputs: list[Tensor] = []

    def record_with_and_without_lora(call: DenoiserCall) -> Tensor:
        base_output = call()
        with inject_lora({tiny.name: tiny.denoiser}, lora):
            model_outputs.extend([base_output, call()])
        return base_output

    with intercept_denoiser(tiny.pipe, record_with_and_without_lora):
        tiny.sample_latents(**ONE_STEP)
    guided = []
    for model_output, w in zip(model_outputs, (2.0, 5.0), strict=True):
        if kind == "ip2p":
            text, image, uncond = model_output.chunk(3)
            guided.append(uncond + w * (text - image) + 1.5 * (image - uncond))
        else:
            uncond, text = model_output.chunk(2)
            guided.append(uncond + w * (text - uncond))
    expected = guided[0] + 1.3 * (guided[1] - guided[0])
    overrides = {"guidance_rescale": rescale} if rescale else {}
    with apply_autolora_guidance(tiny.pipe, lora, 1.3, base_scale=2.0, lora_scale=5.0):
        scheduler_input = record_scheduler_input(tiny, **overrides)
    torch.testing.assert_close(scheduler_input, expected, **TOLERANCES)


def test_apply_autolora_guidance_refuses_wrong_numbers(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    for name in ("gamma", "base_scale", "lora_scale"):
        for value in (float("nan"), float("-inf")):
            numbers: dict[str, Any] = {name: value}
            with (
                pytest.raises(InvalidArgumentError, match=f"^{name} must be a finite number, got"),
                apply_autolora_guidance(tiny.pipe, tiny.make_lora(1), **numbers),
            ):
                pass
    with (
        apply_autolora_guidance(tiny.pipe, tiny.make_lora(1), 1.0, lora_scale=3.0),
        pytest.raises(InvalidArgumentError, match="guidance scale above 1"),
    ):
        tiny.sample_latents(guidance_scale=1.0)
    assert tiny.sample_latents().isfinite().all()
