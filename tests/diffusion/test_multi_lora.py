"""Composition against merged weights and ``set_adapters``, on every class of pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights

KINDS = ("sd", "ip2p", "sdxl", "sd3", "flux")
TOLERANCES = {"rtol": 0.0, "atol": 1e-3}
ONE_STEP = {"num_inference_steps": 1}


def max_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def sample_with_set_adapters(
    tiny: Any, loras: Sequence[LoraWeights], folder: Path, get_active: Callable[[int], list[int]]
) -> Tensor:
    """Sample as the code of the papers does.

    One forward pass per active adapter and step, the mean of the predictions, then guidance.
    """
    pipe, arguments = tiny.pipe, tiny.arguments
    adapter_names = []
    for i, lora in enumerate(loras):
        pipe.load_lora_weights(save_lora(lora, folder / f"{i}.safetensors"), adapter_name=f"l{i}")
        adapter_names.append(f"l{i}")
    embeds = torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
    conditions = {}
    if "pooled_prompt_embeds" in arguments:
        time_ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(2, 1)
        pooled_embeds = torch.cat(
            [arguments["negative_pooled_prompt_embeds"], arguments["pooled_prompt_embeds"]]
        )
        conditions = {"added_cond_kwargs": {"text_embeds": pooled_embeds, "time_ids": time_ids}}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(arguments["num_inference_steps"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latents = noise * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        model_outputs = []
        for i in get_active(step):
            pipe.set_adapters([adapter_names[i]])
            sample = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            output = pipe.unet(sample, t, encoder_hidden_states=embeds, **conditions)
            model_outputs.append(output.sample)
        uncond, text = torch.stack(model_outputs).mean(0).chunk(2)
        guided = uncond + arguments["guidance_scale"] * (text - uncond)
        latents = scheduler.step(guided, t, latents).prev_sample
    pipe.unload_lora_weights()
    return latents


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("strategy", ["composite", "switch"])
def test_compose_loras_equals_loop_with_set_adapters(
    make_tiny_pipeline: Any, tmp_path: Path, kind: str, strategy: Any
) -> None:
    tiny = make_tiny_pipeline(kind)
    loras = [
        tiny.make_lora(seed, preset)
        for seed, preset in ((1, "attention"), (2, "attention+mlp"), (3, "attention+conv"))
    ]
    order = [2, 0, 1]
    get_active = (
        (lambda step: [0, 1, 2])
        if strategy == "composite"
        else (lambda step: [order[step // 2 % 3]])
    )
    expected = sample_with_set_adapters(tiny, loras, tmp_path, get_active)
    config = CompositionConfig(switch_every=2, switch_order=order)
    with compose_loras(tiny.pipe, loras, strategy, config=config):
        latents = tiny.sample_latents()
    torch.testing.assert_close(latents, expected, **TOLERANCES)
    assert max_difference(latents, tiny.sample_latents()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_compose_loras_merge_equals_merged_weights(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    a, b = tiny.make_lora(1), tiny.make_lora(2, "attention", rank=2)
    with compose_loras(tiny.pipe, [a, b], "merge", [0.7, -0.4]):
        latents = tiny.sample_latents()
    expected = tiny.merge_lora(merge([a, b], [0.7, -0.4])).sample_latents()
    torch.testing.assert_close(latents, expected, **TOLERANCES)
    assert max_difference(latents, tiny.sample_latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_compose_loras_of_one_lora_equals_it(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    lora, other = tiny.make_lora(1), tiny.make_lora(2)
    expected = tiny.merge_lora(lora).sample_latents()
    full_box = (0.0, 0.0, 1.0, 1.0)
    for loras, strategy, options in (
        ([lora, lora], "composite", {}),
        ([lora, other], "composite", {"composite_weights": [1.0, 0.0]}),
        ([lora, lora], "composite", {"chunk_size": 1}),
        ([lora, other], "switch", {"switch_order": [0]}),
        ([lora], "spatial", {"regions": [full_box]}),
        ([lora], "spatial", {"regions": [full_box], "windowed": True}),
    ):
        with compose_loras(tiny.pipe, loras, strategy, config=CompositionConfig(**options)):
            torch.testing.assert_close(tiny.sample_latents(), expected, **TOLERANCES)
    with compose_loras(tiny.pipe, [lora, other], schedule=lambda step, num_steps: [1.0, 0.0]):
        torch.testing.assert_close(tiny.sample_latents(), expected, **TOLERANCES)
    assert max_difference(expected, tiny.sample_latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_compose_loras_spatial_predicts_each_region_with_its_lora(
    make_tiny_pipeline: Any, kind: str
) -> None:
    tiny = make_tiny_pipeline(kind)
    left_lora, right_lora = tiny.make_lora(1), tiny.make_lora(2)
    config = CompositionConfig(regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)])
    with compose_loras(tiny.pipe, [left_lora, right_lora], "spatial", config=config):
        latents = to_grid(tiny.sample_latents(**ONE_STEP))
    left = to_grid(tiny.merge_lora(left_lora).sample_latents(**ONE_STEP))
    right = to_grid(tiny.merge_lora(right_lora).sample_latents(**ONE_STEP))
    base = to_grid(tiny.sample_latents(**ONE_STEP))
    h, w = latents.shape[-2:]
    torch.testing.assert_close(latents[..., : w // 2], left[..., : w // 2], **TOLERANCES)
    torch.testing.assert_close(
        latents[..., : h // 2, w // 2 :], right[..., : h // 2, w // 2 :], **TOLERANCES
    )
    torch.testing.assert_close(
        latents[..., h // 2 :, w // 2 :], base[..., h // 2 :, w // 2 :], **TOLERANCES
    )
    assert max_difference(left, right) > 0.01


def to_grid(latents: Tensor) -> Tensor:
    """Reshape latents to [1, channels, h, w], also FLUX's packed latents of a square."""
    if latents.ndim == 4:
        return latents
    side = round(latents.shape[1] ** 0.5)
    return latents.mT.unflatten(-1, (side, side))


@pytest.mark.parametrize("side", ["width", "height"])
def test_compose_loras_windowed_equals_separate_images(make_tiny_pipeline: Any, side: str) -> None:
    tiny = make_tiny_pipeline("sd")
    a, b, c = (tiny.make_lora(seed) for seed in (1, 2, 3))
    axis, size = (3, (8, 24)) if side == "width" else (2, (24, 8))
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    boxes = [(0.0, 0.0, 1 / 3, 1.0), (1 / 3, 0.0, 2 / 3, 1.0), (2 / 3, 0.0, 1.0, 1.0)]
    if side == "height":
        boxes = [(left, top, right, bottom) for top, left, bottom, right in boxes]
    config = CompositionConfig(regions=boxes, windowed=True)
    with compose_loras(tiny.pipe, [a, b, c], "spatial", config=config):
        latents = tiny.sample_latents(latents=noise, **{side: 24})
    parts = [
        tiny.merge_lora(lora).sample_latents(latents=part.clone())
        for lora, part in zip((a, b, c), noise.chunk(3, axis), strict=True)
    ]
    torch.testing.assert_close(latents, torch.cat(parts, axis), **TOLERANCES)


def test_compose_loras_windowed_leaves_the_rest_to_the_base(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    config = CompositionConfig(regions=[(0.0, 0.0, 0.5, 1.0)], windowed=True)
    with compose_loras(tiny.pipe, [tiny.make_lora(1)], "spatial", config=config):
        latents = tiny.sample_latents(**ONE_STEP)
    base = tiny.sample_latents(**ONE_STEP)
    torch.testing.assert_close(latents[..., 4:], base[..., 4:], **TOLERANCES)
    assert max_difference(latents[..., :4], base[..., :4]) > 0.01


@pytest.mark.parametrize("strategy", ["composite", "spatial"])
def test_chunks_bound_the_batch_of_a_call(make_tiny_pipeline: Any, strategy: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    batch_sizes: list[int] = []
    handle = tiny.denoiser.conv_in.register_forward_pre_hook(
        lambda module, args: batch_sizes.append(len(args[0]))
    )
    regions = [(0, 0, 0.5, 1), (0.5, 0, 1, 0.4)] if strategy == "spatial" else None
    loras = [tiny.make_lora(1), tiny.make_lora(2)]  # and the base beside two regions
    try:
        for chunk_size in (None, 1):
            config = CompositionConfig(regions=regions, chunk_size=chunk_size)
            with compose_loras(tiny.pipe, loras, strategy, config=config):
                tiny.sample_latents(**ONE_STEP)
    finally:
        handle.remove()
    num_predictions = 3 if strategy == "spatial" else 2
    assert batch_sizes == [2 * num_predictions] + [2] * num_predictions


def test_compose_loras_spatial_averages_by_masks(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    a, b = tiny.make_lora(1), tiny.make_lora(2)
    mask = torch.full((16, 16), 0.5)
    mask_image = Image.fromarray(mask.mul(255).byte().numpy())
    config = CompositionConfig(regions=[mask, mask])
    with compose_loras(tiny.pipe, [a, b], "spatial", config=config):
        latents = tiny.sample_latents(**ONE_STEP)
    with compose_loras(tiny.pipe, [a, b], "composite"):
        torch.testing.assert_close(latents, tiny.sample_latents(**ONE_STEP), **TOLERANCES)
    config = CompositionConfig(regions=[mask_image])
    with compose_loras(tiny.pipe, [a], "spatial", config=config):
        latents = tiny.sample_latents(**ONE_STEP)
    lora_latents = tiny.merge_lora(a).sample_latents(**ONE_STEP)
    expected = (lora_latents * 127 + tiny.sample_latents(**ONE_STEP) * 128) / 255
    torch.testing.assert_close(latents, expected, **TOLERANCES)


@pytest.mark.parametrize("strategy", ["merge", "switch", "composite", "spatial"])
def test_schedule_scales_each_lora_at_each_step(make_tiny_pipeline: Any, strategy: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    a, b = tiny.make_lora(1), tiny.make_lora(2)
    regions = [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)] if strategy == "spatial" else None
    config = CompositionConfig(regions=regions, switch_every=1)
    steps = {"num_inference_steps": 2}
    with compose_loras(tiny.pipe, [a * 0.5, b * -0.25], strategy, config=config):
        expected = tiny.sample_latents(**steps)
    with compose_loras(
        tiny.pipe, [a, b], strategy, schedule=lambda step, num_steps: [0.5, -0.25], config=config
    ):
        torch.testing.assert_close(tiny.sample_latents(**steps), expected, **TOLERANCES)
    with compose_loras(
        tiny.pipe, [a, b], strategy, schedule=lambda step, num_steps: [step, step], config=config
    ):
        once = tiny.sample_latents(**ONE_STEP)
        twice = tiny.sample_latents(**steps)
    torch.testing.assert_close(once, tiny.sample_latents(**ONE_STEP), **TOLERANCES)
    assert max_difference(twice, tiny.sample_latents(**steps)) > 2e-3


def test_schedule_scales_a_lora_of_one_layer(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    whole = tiny.make_lora(1)
    layout = replace(whole.layout, targets=whole.layout.targets[:1])
    lora = LoraWeights(layout, whole.down[:1], whole.up[:1])
    with compose_loras(tiny.pipe, [lora * 0.5], "composite"):
        expected = tiny.sample_latents(**ONE_STEP)
    with compose_loras(tiny.pipe, [lora], "composite", schedule=lambda step, num_steps: [0.5]):
        torch.testing.assert_close(tiny.sample_latents(**ONE_STEP), expected, **TOLERANCES)


def test_compose_loras_calls_schedule_once_per_step(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    calls: list[tuple[int, int]] = []

    def schedule(step: int, num_steps: int) -> list[float]:
        calls.append((step, num_steps))
        return [1.0 if step < 2 else 0.0]

    with compose_loras(tiny.pipe, [tiny.make_lora(1)], schedule=schedule):
        first_latents = tiny.sample_latents()
        second_latents = tiny.sample_latents()
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4)] * 2
    assert torch.equal(first_latents, second_latents)
    assert max_difference(first_latents, tiny.sample_latents()) > 0.01


def test_compose_loras_sums_text_encoder_loras(bundle: Any) -> None:
    base = load_diffusion_base(bundle.base)
    layout = make_layout(
        {name: base.modules[name] for name in ("unet", "text_encoder")}, "attention", 2, base.id
    )
    a, b = (
        LoraWeights.unflatten(
            layout, 0.3 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (0, 1)
    )

    def encode_prompt() -> Tensor:
        return base.encode_prompts(["a portrait"])["prompt_embeds"]

    base_embeds = encode_prompt()
    with compose_loras(base.pipeline, [a, b], "composite", [1.0, 0.5]):
        embeds = encode_prompt()
    with compose_loras(base.pipeline, [merge([a, b], [1.0, 0.5])]):
        torch.testing.assert_close(encode_prompt(), embeds)
    assert max_difference(embeds, base_embeds) > 0.01


def test_compose_loras_restores_pipeline_after_error(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    latents = tiny.sample_latents()
    loras = [tiny.make_lora(1)] * 2
    with pytest.raises(RuntimeError), compose_loras(tiny.pipe, loras, "composite"):
        raise RuntimeError
    assert "forward" not in vars(tiny.denoiser)
    assert torch.equal(tiny.sample_latents(), latents)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("blend", {}, "unknown strategy 'blend'; known: merge, switch, composite, spatial"),
        ("switch", {"switch_every": 0}, "at least 1 step, got 0"),
        ("switch", {"switch_order": [0, 2]}, "switch_order must name LoRAs 0 to 1"),
        ("composite", {"composite_weights": [0.0, 0.0]}, "positive sum"),
        ("spatial", {}, "one region per LoRA: 2 LoRAs, 0 regions"),
        (
            "spatial",
            {"regions": [(0, 0, 1, 1), (0.5, 0, 0.2, 1)]},
            "region 2 must be left < right",
        ),
        ("spatial", {"regions": [torch.ones(8, 8), torch.ones(8, 12)]}, "mask 2 is 12x8"),
    ],
)
def test_compose_loras_refuses_wrong_settings(
    make_tiny_pipeline: Any, strategy: Any, options: dict[str, Any], message: str
) -> None:
    tiny = make_tiny_pipeline("sd")
    loras, config = [tiny.make_lora(1), tiny.make_lora(2)], CompositionConfig(**options)
    with (
        pytest.raises(InvalidArgumentError, match=message.replace("(", r"\(")),
        compose_loras(tiny.pipe, loras, strategy, config=config),
    ):
        tiny.sample_latents()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 LoRAs need as many weights, got 1"),
        ([1.0, float("nan")], "must be finite numbers, got nan"),
    ],
)
def test_compose_loras_refuses_wrong_weights(
    make_tiny_pipeline: Any, weights: list[float], message: str
) -> None:
    tiny = make_tiny_pipeline("sd")
    loras = [tiny.make_lora(1), tiny.make_lora(2)]
    with (
        pytest.raises(InvalidArgumentError, match=message),
        compose_loras(tiny.pipe, loras, "merge", weights),
    ):
        tiny.sample_latents()


def test_compose_loras_refuses_lora_of_another_base(make_tiny_pipeline: Any) -> None:
    sd, sdxl, sd3 = (make_tiny_pipeline(kind) for kind in ("sd", "sdxl", "sd3"))
    with (
        pytest.raises(LayoutMismatchError),
        compose_loras(sd.pipe, [sd.make_lora(1), sdxl.make_lora(1)], "composite"),
    ):
        sd.sample_latents()
    with (
        pytest.raises(LayoutMismatchError, match="which StableDiffusion3Pipeline lacks"),
        compose_loras(sd3.pipe, [sd.make_lora(1)]),
    ):
        pass
