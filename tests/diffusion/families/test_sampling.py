"""What a user asks of samples: schedulers, guidance, sizes, LoRAs by branch, edits, few steps."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from hyperlora.data.images import to_image
from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.diffusion.schedulers import use_scheduler
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline, mark_heavy

EDITING = [
    name for name in FACTORIES if get_pipeline_family(get_tiny_pipeline(name).pipe).edits_images
]
GENERATING = [name for name in FACTORIES if get_tiny_pipeline(name).arguments.get("image") is None]
FLOW_MATCHING = [
    name
    for name in GENERATING
    if get_pipeline_family(get_tiny_pipeline(name).pipe).denoiser_name == "transformer"
]
PROMPTS = ["a red hat", "dog"]
STOCHASTIC = ("FlowMatchLCM",)


def as_tensor(image: Image.Image) -> Tensor:
    return pil_to_tensor(image).float() / 255


def make_base(name: str) -> DiffusionBase:
    return DiffusionBase("tiny/base", get_tiny_pipeline(name).pipe)


def make_lora(base: DiffusionBase, seed: int = 0) -> LoraWeights:
    layout = base.make_layout("attention", 2)
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, 0.3 * torch.randn(layout.numel, generator=generator))


def generate(base: DiffusionBase, lora: LoraWeights | None = None, **options: Any) -> Tensor:
    """Generate two small images as a tensor."""
    images = generate_images(
        base,
        PROMPTS,
        lora,
        seeds=[0, 1],
        **({"num_inference_steps": 2, "width": 32, "height": 32} | options),
    )
    return torch.stack([as_tensor(image) for image in images])


@pytest.mark.parametrize("name", GENERATING)
def test_generate_images_on_every_family(name: str) -> None:
    base = make_base(name)
    plain = generate(base)
    # Lumina 2 assumes a VAE of factor 8, whatever its own is
    assert plain.shape == ((2, 3, 8, 8) if name == "lumina_2" else (2, 3, 32, 32))
    loras = LoraWeights.stack([make_lora(base, 0), make_lora(base, 1)])
    images = generate(base, loras)
    assert (images - plain).abs().amax((1, 2, 3)).min() > 0.002
    for i in range(2):
        torch.testing.assert_close(generate(base, loras[i])[i], images[i], atol=0.01, rtol=0)


@pytest.mark.parametrize("name", GENERATING)
def test_guidance_of_1_is_one_branch(name: str) -> None:
    base, num_samples = make_base(name), []

    def record_samples(call: DenoiserCall) -> Tensor:
        num_samples.append(call.num_samples)
        return call()

    with intercept_denoiser(base.pipeline, record_samples):
        generate(base, guidance_scale=1.0)
        assert num_samples == [2, 2]
        if get_tiny_pipeline(name).guidance is not None:
            generate(base, guidance_scale=4.0, negative_prompt="blurry")
            assert sum(num_samples) == 4 + 8


@pytest.mark.parametrize("name", GENERATING)
def test_negative_prompt_is_followed_or_refused(name: str) -> None:
    base = make_base(name)
    if not base.family.takes_negative_prompts:
        with pytest.raises(InvalidArgumentError, match="distilled and takes no negative prompt"):
            generate(base, negative_prompt="blurry")
    elif get_tiny_pipeline(name).guidance is not None:
        guided = [generate(base, guidance_scale=4.0, negative_prompt=n) for n in ("", "blurry")]
        assert (guided[0] - guided[1]).abs().max() > 0.002


@pytest.mark.parametrize("name", mark_heavy(GENERATING))
def test_each_scheduler_of_a_family_samples(name: str) -> None:
    base, results = make_base(name), {}
    for scheduler in base.family.schedulers:
        results[scheduler] = generate(base, scheduler=scheduler, num_inference_steps=4)
        assert results[scheduler].isfinite().all()
    original = type(base.pipeline.scheduler).__name__
    assert original.removesuffix("Scheduler") in base.family.schedulers
    torch.testing.assert_close(
        generate(base, scheduler=original, num_inference_steps=4),
        generate(base, num_inference_steps=4),
    )
    with pytest.raises(InvalidArgumentError, match=r"scheduler 'Magic' is not for a .* known: "):
        generate(base, scheduler="Magic")
    assert type(base.pipeline.scheduler).__name__ == original


@pytest.mark.parametrize("name", mark_heavy(FLOW_MATCHING))
def test_solvers_of_a_flow_agree_where_steps_are_many(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)

    def sample(scheduler: str, num_steps: int) -> Tensor:
        with use_scheduler(family, scheduler):
            return tiny.pipe(
                prompt=list(tiny.prompts),
                generator=torch.Generator().manual_seed(1),
                num_inference_steps=num_steps,
                output_type="latent",
                **deepcopy(tiny.arguments),
            ).images

    expected = sample("FlowMatchEulerDiscrete", 160)
    for scheduler in set(family.schedulers) - set(STOCHASTIC):
        difference = (sample(scheduler, 40) - expected).norm() / expected.norm()
        assert difference < 0.03, (scheduler, difference)


@pytest.mark.parametrize("name", [n for n in GENERATING if get_tiny_pipeline(n).guidance])
def test_inject_lora_by_branch_leaves_the_negative_branch_alone(name: str) -> None:
    tiny, base = get_tiny_pipeline(name), make_base(name)
    lora, other = make_lora(base, 0), make_lora(base, 1)
    outputs: list[Tensor] = []

    def record_outputs(call: DenoiserCall) -> Tensor:
        outputs.append(call())
        return outputs[-1]

    def predict(context: Any) -> tuple[Tensor, Tensor]:
        """Return the positive and the negative prediction of the first step."""
        outputs.clear()
        with intercept_denoiser(tiny.pipe, record_outputs), context:
            generate(base, guidance_scale=3.0, num_inference_steps=1)
        if len(outputs) == 2:
            return outputs[0], outputs[1]
        branches = outputs[0].chunk(2)
        negative = base.family.negative_branches.index(True)
        return branches[1 - negative], branches[negative]

    positive, negative = predict(inject_lora_by_branch(tiny.pipe, lora))
    torch.testing.assert_close(positive, predict(base.inject_lora(lora))[0], atol=1e-4, rtol=1e-4)
    unchanged = predict(base.inject_lora(lora * 0.0))[1]
    torch.testing.assert_close(negative, unchanged, atol=1e-4, rtol=1e-4)
    negative = predict(inject_lora_by_branch(tiny.pipe, lora, other))[1]
    torch.testing.assert_close(negative, predict(base.inject_lora(other))[1], atol=1e-4, rtol=1e-4)
    assert (negative - unchanged).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITING)
def test_edit_images_with_a_lora_for_each_image(name: str) -> None:
    base = make_base(name)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images: list[Image.Image] = [to_image(image) for image in pixels]
    loras = LoraWeights.stack([make_lora(base, 0), make_lora(base, 1)])
    options: Any = {"instructions": ["red hat", "no hat"], "num_inference_steps": 2}
    stacked = torch.stack([as_tensor(image) for image in images])
    edited = edit_images(base, stacked, loras, seeds=[0, 1], **options)
    plain = edit_images(base, stacked, seeds=[0, 1], **options)
    assert [image.size for image in edited] == [(64, 64)] * 2
    for i in range(2):
        alone = edit_images(
            base,
            stacked[i : i + 1],
            loras[i],
            seeds=[i],
            **(options | {"instructions": options["instructions"][i]}),
        )[0]
        difference = as_tensor(alone) - as_tensor(edited[i])
        assert difference.abs().max() < 0.02
        assert (as_tensor(plain[i]) - as_tensor(edited[i])).abs().max() > 0.002


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_few_step_lora_runs_beside_a_generated_one(name: str) -> None:
    """An LCM-LoRA adapts convolutions and time projections, too."""
    base = make_base(name)
    subject_lora = make_lora(base)
    layout = base.make_layout("attention+conv", 4)
    lcm_lora = LoraWeights.unflatten(layout, 0.02 * torch.randn(layout.numel))
    with compose_loras(base.pipeline, [subject_lora, lcm_lora], "merge", [0.8, 1.0]):
        images = generate(base, scheduler="LCM", num_inference_steps=4, guidance_scale=1.0)
    assert images.isfinite().all()
    assert (images - generate(base, scheduler="LCM", num_inference_steps=4)).abs().max() > 0.01


class StopError(Exception):
    """Ends a sampling run."""


@pytest.mark.parametrize("name", FACTORIES)
def test_sampling_ends_between_its_steps(name: str) -> None:
    base, steps = make_base(name), list[int]()

    def stop_at_the_second(step: int) -> None:
        steps.append(step)
        if step == 2:
            raise StopError

    options: Any = {"num_inference_steps": 4, "on_step": stop_at_the_second}
    sample: Callable[[], object] = partial(generate, base, make_lora(base), **options)
    if name in EDITING:
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        sample = partial(edit_images, base, pixels, make_lora(base), seeds=[0], **options)
    with pytest.raises(StopError):
        sample()
    assert steps == [1, 2]
    assert not any(module._forward_hooks for module in base.denoiser.modules())
