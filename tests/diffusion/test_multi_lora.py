"""Composition against merged weights and ``set_adapters``, on every class of pipeline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperlora.diffusion.denoiser_calls import DenoiserCall, predict_per_lora
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights

KINDS = ("sd", "ip2p", "sdxl", "sd3", "flux")
ONE_STEP = {"num_inference_steps": 1}
TOLERANCES = {"rtol": 0.0, "atol": 1e-3}


def max_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def plain_loop(
    tiny: Any, loras: Sequence[LoraWeights], folder: Path, active: Callable[[int], list[int]]
) -> Tensor:
    """One forward per active adapter and step, the predictions' mean, then guidance: what the papers' code does."""
    pipe, given = tiny.pipe, tiny.arguments
    names = []
    for i, lora in enumerate(loras):
        pipe.load_lora_weights(save_lora(lora, folder / f"{i}.safetensors"), adapter_name=f"l{i}")
        names.append(f"l{i}")
    text = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    more = {}
    if "pooled_prompt_embeds" in given:
        ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(2, 1)
        pooled = torch.cat([given["negative_pooled_prompt_embeds"], given["pooled_prompt_embeds"]])
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(given["num_inference_steps"])
    x = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        * scheduler.init_noise_sigma
    )
    for step, t in enumerate(scheduler.timesteps):
        made = []
        for i in active(step):
            pipe.set_adapters([names[i]])
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            made.append(pipe.unet(both, t, encoder_hidden_states=text, **more).sample)
        unconditional, conditional = torch.stack(made).mean(0).chunk(2)
        guided = unconditional + given["guidance_scale"] * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    pipe.unload_lora_weights()
    return x


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("strategy", ["composite", "switch"])
def test_equals_a_plain_loop_with_set_adapters(
    make_tiny_pipeline: Any, tmp_path: Path, kind: str, strategy: Any
) -> None:
    tiny = make_tiny_pipeline(kind)
    loras = [
        tiny.make_lora(seed, preset)
        for seed, preset in ((1, "attention"), (2, "attention+mlp"), (3, "attention+conv"))
    ]
    order = [2, 0, 1]
    active = (
        (lambda step: [0, 1, 2])
        if strategy == "composite"
        else (lambda step: [order[step // 2 % 3]])
    )
    expected = plain_loop(t, loras, tmp_path, active)
    with compose_loras(tiny.pipe, loras, strategy, every=2, order=order):
        found = tiny.sample_latents()
    torch.testing.assert_close(found, expected, **TOLERANCES)
    assert max_difference(found, tiny.sample_latents()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_merged_weights(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    a, b = tiny.make_lora(1), tiny.make_lora(2, "attention", rank=2)
    with compose_loras(tiny.pipe, [a, b], "merge", [0.7, -0.4]):
        found = tiny.sample_latents()
    torch.testing.assert_close(found, tiny.merge_lora(merge([a, b], [0.7, -0.4])).sample_latents(), **TOLERANCES)
    assert max_difference(found, tiny.sample_latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_composites_of_one_lora_are_that_lora(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    lora, other = tiny.make_lora(1), tiny.make_lora(2)
    alone = tiny.merge_lora(lora).sample_latents()
    whole = (0.0, 0.0, 1.0, 1.0)
    for options in (
        {"loras": [lora, lora], "strategy": "composite"},
        {"loras": [lora, other], "strategy": "composite", "shares": [1.0, 0.0]},
        {"loras": [lora, lora], "strategy": "composite", "chunk": 1},
        {"loras": [lora, other], "strategy": "switch", "order": [0]},
        {"loras": [lora, other], "strategy": "merge", "schedule": lambda step, steps: [1.0, 0.0]},
        {"loras": [lora], "strategy": "spatial", "regions": [whole]},
        {"loras": [lora], "strategy": "spatial", "regions": [whole], "window": True},
    ):
        with compose_loras(tiny.pipe, **options):
            torch.testing.assert_close(tiny.sample_latents(), alone, **TOLERANCES)
    assert max_difference(alone, tiny.sample_latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_in_regions_is_each_lora_in_its_own(make_tiny_pipeline: Any, kind: str) -> None:
    tiny = make_tiny_pipeline(kind)
    left, right = tiny.make_lora(1), tiny.make_lora(2)
    with compose_loras(
        tiny.pipe, [left, right], "spatial", regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)]
    ):
        found = tiny.sample_latents(**ONE_STEP)
    pictures = [
        _as_grid(x) for x in (found, tiny.merge_lora(left).sample_latents(**ONE_STEP), tiny.merge_lora(right).sample_latents(**ONE_STEP))
    ]
    base = _as_grid(tiny.sample_latents(**ONE_STEP))
    found, of_left, of_right = pictures
    h, w = found.shape[-2:]
    torch.testing.assert_close(found[..., : w // 2], of_left[..., : w // 2], **TOLERANCES)
    torch.testing.assert_close(
        found[..., : h // 2, w // 2 :], of_right[..., : h // 2, w // 2 :], **TOLERANCES
    )
    torch.testing.assert_close(
        found[..., h // 2 :, w // 2 :], base[..., h // 2 :, w // 2 :], **TOLERANCES
    )
    assert max_difference(of_left, of_right) > 0.01


def _as_grid(latents: Tensor) -> Tensor:
    """[1, channels, h, w], also of FLUX's packed latents (here a square)."""
    if latents.ndim == 4:
        return latents
    side = round(latents.shape[1] ** 0.5)
    return latents.mT.unflatten(-1, (side, side))


def test_windows_are_pictures_of_their_own(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    a, b = tiny.make_lora(1), tiny.make_lora(2)
    wide = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    with compose_loras(tiny.pipe, [a, b], "spatial", regions=boxes, window=True):
        found = tiny.sample_latents(latents=wide, width=16)
    halves = [
        tiny.merge_lora(lora).sample_latents(latents=half.clone())
        for lora, half in zip((a, b), wide.chunk(2, 3), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(halves, 3), **TOLERANCES)


def test_masks_share_their_edge(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    a, b = tiny.make_lora(1), tiny.make_lora(2)
    half = torch.full((16, 16), 0.5)
    as_picture = Image.fromarray(half.mul(255).byte().numpy())
    with compose_loras(tiny.pipe, [a, b], "spatial", regions=[half, half]):
        found = tiny.sample_latents(**ONE_STEP)
    with compose_loras(tiny.pipe, [a, b], "composite"):
        torch.testing.assert_close(found, tiny.sample_latents(**ONE_STEP), **TOLERANCES)
    with compose_loras(tiny.pipe, [a], "spatial", regions=[as_picture]):
        mixed = tiny.sample_latents(**ONE_STEP)
    expected = (tiny.merge_lora(a).sample_latents(**ONE_STEP) * 127 + tiny.sample_latents(**ONE_STEP) * 128) / 255
    torch.testing.assert_close(mixed, expected, **TOLERANCES)


def test_a_schedule_sees_every_step_once_and_starts_again(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    seen: list[tuple[int, int]] = []

    def schedule(step: int, steps: int) -> list[float]:
        seen.append((step, steps))
        return [1.0 if step < 2 else 0.0]

    with compose_loras(tiny.pipe, [tiny.make_lora(1)], schedule=schedule):
        first = tiny.sample_latents()
        second = tiny.sample_latents()
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)] * 2
    assert torch.equal(first, second)
    assert max_difference(first, tiny.sample_latents()) > 0.01


def test_text_encoder_parts_are_added(pipe: Any, bundle: Any) -> None:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout

    base = load_diffusion_base(bundle.base)
    layout = make_layout(
        {k: base.modules[k] for k in ("unet", "text_encoder")}, "attention", 2, base.id
    )
    a, b = (
        LoraWeights.unflatten(
            layout, 0.3 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(s))
        )
        for s in (0, 1)
    )

    def encoded() -> Tensor:
        return base.encode_prompts(["a portrait"])["encoder_hidden_states"]

    plain = encoded()
    with compose_loras(base.pipeline, [a, b], "composite", [1.0, 0.5]):
        both = encoded()
    with compose_loras(base.pipeline, [merge([a, b], [1.0, 0.5])]):
        torch.testing.assert_close(encoded(), both)
    assert max_difference(both, plain) > 0.01


def test_falls_back_to_smaller_forwards_when_memory_runs_out(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    loras = LoraWeights.stack([tiny.make_lora(s) for s in range(5)])
    sizes: list[int] = []

    def limited(sample: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(len(sample))
        if len(sample) > 4:
            raise torch.OutOfMemoryError("as a GPU would")
        return forward(sample, *rest, **more)

    forward = tiny.denoiser.forward
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 16))
    found = predict_per_lora(DenoiserCall(limited, inputs, {}), {"unet": tiny.denoiser}, loras)
    expected = predict_per_lora(DenoiserCall(forward, inputs, {}), {"unet": tiny.denoiser}, loras)
    assert sizes == [10, 6, 4, 4, 2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_leaves_the_pipeline_as_it_was(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    before = tiny.sample_latents()
    with pytest.raises(RuntimeError), compose_loras(tiny.pipe, [tiny.make_lora(1)] * 2, "composite"):
        raise RuntimeError
    assert "forward" not in vars(tiny.denoiser)
    assert torch.equal(tiny.sample_latents(), before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"strategy": "blend"},
            "unknown strategy 'blend'; known: merge, switch, composite, spatial",
        ),
        ({"weights": [1.0]}, "2 LoRAs need as many weights, got 1"),
        ({"weights": [1.0, float("nan")]}, "must be finite numbers, got nan"),
        ({"strategy": "switch", "every": 0}, "at least 1 step, got 0"),
        ({"strategy": "switch", "order": [0, 2]}, "order must name LoRAs 0 to 1"),
        ({"strategy": "composite", "shares": [0.0, 0.0]}, "positive sum"),
        ({"strategy": "spatial"}, "one region per LoRA: 2 LoRAs, 0 regions"),
        (
            {"strategy": "spatial", "regions": [(0, 0, 1, 1), (0.5, 0, 0.2, 1)]},
            "region 2 must be left < right",
        ),
        (
            {"strategy": "spatial", "regions": [torch.ones(8, 8), torch.ones(8, 12)]},
            "mask 2 is 12x8",
        ),
    ],
)
def test_says_what_is_wrong(make_tiny_pipeline: Any, options: dict[str, Any], sentence: str) -> None:
    tiny = make_tiny_pipeline("sd")
    with (
        pytest.raises(InvalidArgumentError, match=sentence.replace("(", r"\(")),
        compose_loras(tiny.pipe, [tiny.make_lora(1), tiny.make_lora(2)], **options),
    ):
        tiny.sample_latents()


def test_refuses_a_lora_of_another_base(make_tiny_pipeline: Any) -> None:
    sd, sdxl = tiny("sd"), tiny("sdxl")
    with (
        pytest.raises(LayoutMismatchError),
        compose_loras(sd.pipe, [sd.lora(1), sdxl.lora(1)], "composite"),
    ):
        sd.sample_latents()
    with (
        pytest.raises(LayoutMismatchError, match="which StableDiffusion3Pipeline lacks"),
        compose_loras(tiny("sd3").pipe, [sd.lora(1)]),
    ):
        pass
