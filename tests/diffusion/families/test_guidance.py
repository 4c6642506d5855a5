"""Branches of guidance: their number in each denoiser call, and how the pipeline combines them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.data.images import stack_images
from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.errors import InvalidArgumentError
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

NUM_BATCHED_BRANCHES = {
    "stable_diffusion": 2,
    "stable_diffusion_xl": 2,
    "instruct_pix2pix": 3,
    "stable_diffusion_3": 2,
    "z_image": 2,
    "hidream": 2,
}
"""Families whose branches are one batch; others call the denoiser for each."""
TELLING = [name for name in FACTORIES if name != "instruct_pix2pix_xl"]
"""Families whose pipeline tells its guidance scale."""
GUIDED = [name for name in TELLING if get_tiny_pipeline(name).guidance is not None]


def record_branches(name: str, **arguments: Any) -> list[tuple[int, int]]:
    """Return batch size and counted branches of each denoiser call of one run."""
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    counts: list[tuple[int, int]] = []

    def record_counts(call: DenoiserCall) -> Tensor:
        counts.append((call.num_samples, family.count_branches(call.num_samples)))
        return call()

    with intercept_denoiser(tiny.pipe, record_counts):
        tiny.pipe(
            prompt=list(tiny.prompts),
            num_inference_steps=2,
            output_type="latent",
            **(tiny.arguments | arguments),
        )
    return counts


@pytest.mark.parametrize("name", TELLING)
def test_count_branches_is_one_without_guidance(name: str) -> None:
    n = len(get_tiny_pipeline(name).prompts)
    assert record_branches(name) == [(n, 1)] * 2


@pytest.mark.parametrize("name", GUIDED)
def test_count_branches_counts_those_of_one_batch(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    n, num_branches = len(tiny.prompts), NUM_BATCHED_BRANCHES.get(name, 1)
    counts = record_branches(name, **(tiny.guidance or {}))
    assert set(counts) == {(num_branches * n, num_branches)}
    assert len(counts) == (2 if num_branches > 1 else 4)


def test_count_branches_refuses_a_pipeline_that_does_not_tell_its_guidance() -> None:
    family = get_pipeline_family(get_tiny_pipeline("instruct_pix2pix_xl").pipe)
    with pytest.raises(InvalidArgumentError, match="does not tell its guidance scale"):
        family.count_branches(2)


@pytest.mark.parametrize("name", NUM_BATCHED_BRANCHES)
def test_combine_branches_equals_the_pipeline(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    guided: list[Tensor] = []

    def record_guided(call: DenoiserCall) -> Tensor:
        output = call()
        guided.append(family.combine_branches(output))
        return output

    with intercept_denoiser(tiny.pipe, record_guided):
        records = tiny.record_calls(tiny.prompts, **(tiny.guidance or {}))
    sign = -1 if name in ("z_image", "hidream") else 1  # these pipelines negate afterwards
    for output, record in zip(guided, records, strict=True):
        prediction = sign * output.reshape(record.prediction.shape)
        torch.testing.assert_close(prediction, record.prediction, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NUM_BATCHED_BRANCHES)
def test_combine_branches_takes_another_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoLoRA guidance has a scale of its own for each LoRA."""
    pipe = get_tiny_pipeline(name).pipe
    monkeypatch.setattr(pipe, "_guidance_scale", 7.0, raising=False)
    monkeypatch.setattr(pipe, "_image_guidance_scale", 1.5, raising=False)
    family = get_pipeline_family(pipe)
    first, second, third = torch.randn(3, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for scale, argument in ((7.0, None), (0.5, 0.5), (0.0, 0.0)):
        if name == "instruct_pix2pix":  # both conditions, the image alone, none
            outputs = [first, second, third]
            expected = third + 1.5 * (second - third) + scale * (first - second)
        elif name == "z_image":  # the prompt first, and a scale that is smaller by 1
            outputs = [first, second]
            expected = second + (scale + 1) * (first - second)
        else:
            outputs = [first, second]
            expected = first + scale * (second - first)
        combined = family.combine_branches(torch.cat(outputs), argument)
        torch.testing.assert_close(combined, expected)


@pytest.mark.parametrize("name", FACTORIES)
def test_guidance_arguments_have_the_scale_of_the_pipeline(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    for scale in (1.0, 1.5, 4.0):
        expected = scale
        if name in ("z_image", "krea_2", "krea_2_turbo"):
            expected = max(scale - 1, 0.0)
        elif name == "flux2_klein_distilled":
            expected = 1.0  # one branch, whatever the scale
        arguments = family.make_guidance_arguments(scale, [""])
        told = arguments.get("true_cfg_scale", arguments.get("guidance_scale"))
        assert told == expected
    if name in NUM_BATCHED_BRANCHES:
        assert family.make_guidance_arguments(2.0, ["blurry"])["negative_prompt"] == ["blurry"]


@pytest.mark.parametrize("name", ["flux2_edit", "qwen_image_edit", "qwen_image_edit_plus"])
def test_edit_arguments_hold_each_image(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    images = torch.rand(2, 3, 64, 80)
    arguments = family.make_edit_arguments(images, 2.0, 1.0)
    assert [image.size for image in arguments["image"]] == [(80, 64)] * 2
    torch.testing.assert_close(stack_images(arguments["image"]), images, atol=1 / 255, rtol=0)
    assert (arguments["height"], arguments["width"]) == (64, 80)
    if name.startswith("qwen"):  # without a negative prompt there would be no guidance
        assert arguments["negative_prompt"] == ["", ""]
        assert arguments["true_cfg_scale"] == 2.0


@pytest.mark.parametrize("name", ["instruct_pix2pix", "instruct_pix2pix_xl"])
def test_edits_have_two_scales_of_guidance(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    images = torch.rand(2, 3, 16, 24)
    arguments = family.make_edit_arguments(images, 5.0, 1.25)
    size = {"height": 16, "width": 24} if name.endswith("xl") else {}
    assert arguments.pop("image") is images
    assert arguments == {"guidance_scale": 5.0, "image_guidance_scale": 1.25, **size}
