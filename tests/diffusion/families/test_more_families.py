"""Chroma, Lumina 2, HiDream, Krea 2 and Qwen-Image 2.1: what goes beyond one prediction."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import get_pipeline_family
from tests.tiny_pipelines import get_tiny_pipeline
from tests.tiny_pipelines.base import PROMPTS, TinyPipeline, make_image

NAMES = ["chroma", "lumina_2", "hidream", "krea_2", "krea_2_turbo", "qwen_image_21"]
FRAME_VAES = ["krea_2", "qwen_image_21"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def encode(family: PipelineFamily, prompts: list[str] = PROMPTS) -> Any:
    with torch.no_grad():
        return family.encode_text(list(prompts))


def sample(tiny: TinyPipeline, **arguments: Any) -> Tensor:
    """Sample latents with the pipeline itself."""
    generator = torch.Generator().manual_seed(5)
    return tiny.pipe(
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
        **(tiny.arguments | arguments),
    ).images


@pytest.mark.parametrize("name", [*NAMES, "z_image"])
def test_pipeline_takes_encoded_prompts(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    arguments = family.make_prompt_arguments(encode(family))
    torch.testing.assert_close(sample(tiny, **arguments), sample(tiny, prompt=list(PROMPTS)))


def test_encode_images_of_qwen_image_21_equals_the_pipeline() -> None:
    from torchvision.transforms.functional import to_pil_image

    tiny = get_tiny_pipeline("qwen_image_21")
    family = get_pipeline_family(tiny.pipe)
    image = (make_image()[0] * 255).round() / 255  # as a file holds it
    pixels = tiny.pipe.image_processor.preprocess(to_pil_image(image).convert("RGBA"))
    expected = tiny.pipe._encode_vae_image(pixels.unsqueeze(2), None).squeeze(2)
    torch.testing.assert_close(family.encode_images(image[None]), expected, **CLOSE)


@pytest.mark.parametrize("name", FRAME_VAES)
def test_encode_images_normalizes_each_channel(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    vae = tiny.pipe.vae
    latents = family.encode_images(make_image())
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.decode((latents * std + mean).unsqueeze(2)).sample[:, :3, 0]
        torch.testing.assert_close(family.decode_latents(latents), (pixels / 2 + 0.5).clamp(0, 1))


def test_qwen_image_21_predicts_what_the_cached_pipeline_predicts() -> None:
    tiny = get_tiny_pipeline("qwen_image_21")
    family = get_pipeline_family(tiny.pipe)
    conditions = encode(family)
    records = tiny.record_calls(PROMPTS, use_kv_cache=True)
    assert [record.inputs["kv_cache_mode"] for record in records] == ["extract", "cached", "cached"]
    for record in records:
        with torch.no_grad():
            prediction = family.predict(tiny.unpack(record.sample), record.timestep, conditions)
        torch.testing.assert_close(prediction, tiny.unpack(record.prediction), **CLOSE)


def test_qwen_image_21_ignores_padding_that_all_prompts_share() -> None:
    tiny = get_tiny_pipeline("qwen_image_21")
    family = get_pipeline_family(tiny.pipe)
    short = {key: value[1:] for key, value in encode(family).items()}  # padded to the longer prompt
    latents = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = family.predict(latents, torch.tensor(500.0), encode(family, PROMPTS[1:]))
        padded = family.predict(latents, torch.tensor(500.0), short)
    torch.testing.assert_close(padded, alone, **CLOSE)

    both = encode(family)
    longest = int(both["prompt_embeds_mask"].sum(1).max())
    wider = {key: F.pad(value, [0, 0] * (value.ndim - 2) + [0, 3]) for key, value in both.items()}
    inputs = family.make_inputs(torch.cat([latents] * 2), torch.tensor(500.0), wider)
    assert inputs["encoder_hidden_states"].shape[1] == longest


def test_hidream_experts_pass_gradients_on() -> None:
    tiny = get_tiny_pipeline("hidream")
    family = get_pipeline_family(tiny.pipe)
    record = tiny.record_calls(PROMPTS)[1]
    conditions = encode(family)
    experts = family.denoiser.double_stream_blocks[0].block.ff_i.experts
    weights = [expert.w2.weight for expert in experts]
    for weight in weights:
        weight.requires_grad_()
    try:
        loss = family.predict(record.sample, record.timestep, conditions).square().sum()
        gradients = torch.autograd.grad(loss, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    assert max(float(gradient.norm()) for gradient in gradients) > 0

    # along the gradient: far above rounding, and too short a step to change which expert is taken
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    losses = []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += step * gradient / norm
            prediction = family.predict(record.sample, record.timestep, conditions)
            losses.append(float(prediction.double().square().sum()))
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= step * gradient / norm
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(norm, rel=0.01)


def test_hidream_predicts_the_same_in_training_mode() -> None:
    tiny = get_tiny_pipeline("hidream")
    family = get_pipeline_family(tiny.pipe)
    record = tiny.record_calls(PROMPTS)[1]
    family.denoiser.train()
    try:
        with torch.no_grad():
            prediction = family.predict(record.sample, record.timestep, encode(family))
    finally:
        family.denoiser.eval()
    torch.testing.assert_close(prediction, record.prediction, **CLOSE)


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("chroma", 256),
        ("lumina_2", 64),
        ("hidream", 32),
        ("krea_2", 1024),
        ("qwen_image_21", 1024),
        ("z_image", 1024),
    ],
)
def test_resolution(name: str, resolution: int) -> None:
    assert get_pipeline_family(get_tiny_pipeline(name).pipe).resolution == resolution
