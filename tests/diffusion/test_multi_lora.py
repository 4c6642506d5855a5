"""Composition against merged weights and against a plain loop with ``set_adapters``, on every class of pipeline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperlora.diffusion.denoiser_calls import DenoiserCall, predict_per_lora
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights

KINDS = ("sd", "ip2p", "sdxl", "sd3", "flux")
CLOSE = {"rtol": 0.0, "atol": 1e-3}


def apart(a: Tensor, b: Tensor) -> float:
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
    tiny: Any, tmp_path: Path, kind: str, strategy: Any
) -> None:
    t = tiny(kind)
    loras = [
        t.lora(seed, preset)
        for seed, preset in ((1, "attention"), (2, "attention+mlp"), (3, "attention+conv"))
    ]
    order = [2, 0, 1]
    active = (
        (lambda step: [0, 1, 2])
        if strategy == "composite"
        else (lambda step: [order[step // 2 % 3]])
    )
    expected = plain_loop(t, loras, tmp_path, active)
    with compose_loras(t.pipe, loras, strategy, every=2, order=order):
        found = t.latents()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert apart(found, t.latents()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_merged_weights(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    a, b = t.lora(1), t.lora(2, "attention", rank=2)
    with compose_loras(t.pipe, [a, b], "merge", [0.7, -0.4]):
        found = t.latents()
    torch.testing.assert_close(found, t.merged(merge([a, b], [0.7, -0.4])).latents(), **CLOSE)
    assert apart(found, t.latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_composites_of_one_lora_are_that_lora(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    lora, other = t.lora(1), t.lora(2)
    alone = t.merged(lora).latents()
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
        with compose_loras(t.pipe, **options):
            torch.testing.assert_close(t.latents(), alone, **CLOSE)
    assert apart(alone, t.latents()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_in_regions_is_each_lora_in_its_own(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    left, right = t.lora(1), t.lora(2)
    one = {"num_inference_steps": 1}
    with compose_loras(
        t.pipe, [left, right], "spatial", regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)]
    ):
        found = t.latents(**one)
    pictures = [
        _as_grid(x) for x in (found, t.merged(left).latents(**one), t.merged(right).latents(**one))
    ]
    base = _as_grid(t.latents(**one))
    found, of_left, of_right = pictures
    h, w = found.shape[-2:]
    torch.testing.assert_close(found[..., : w // 2], of_left[..., : w // 2], **CLOSE)
    torch.testing.assert_close(
        found[..., : h // 2, w // 2 :], of_right[..., : h // 2, w // 2 :], **CLOSE
    )
    torch.testing.assert_close(
        found[..., h // 2 :, w // 2 :], base[..., h // 2 :, w // 2 :], **CLOSE
    )
    assert apart(of_left, of_right) > 0.01


def _as_grid(latents: Tensor) -> Tensor:
    """[1, channels, h, w], also of FLUX's packed latents (here a square)."""
    if latents.ndim == 4:
        return latents
    side = round(latents.shape[1] ** 0.5)
    return latents.mT.unflatten(-1, (side, side))


def test_windows_are_pictures_of_their_own(tiny: Any) -> None:
    t = tiny("sd")
    a, b = t.lora(1), t.lora(2)
    wide = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    with compose_loras(t.pipe, [a, b], "spatial", regions=boxes, window=True):
        found = t.latents(latents=wide, width=16)
    halves = [
        t.merged(lora).latents(latents=half.clone())
        for lora, half in zip((a, b), wide.chunk(2, 3), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(halves, 3), **CLOSE)


def test_masks_share_their_edge(tiny: Any) -> None:
    t = tiny("sd")
    a, b = t.lora(1), t.lora(2)
    half = torch.full((16, 16), 0.5)
    as_picture = Image.fromarray(half.mul(255).byte().numpy())
    one = {"num_inference_steps": 1}
    with compose_loras(t.pipe, [a, b], "spatial", regions=[half, half]):
        found = t.latents(**one)
    with compose_loras(t.pipe, [a, b], "composite"):
        torch.testing.assert_close(found, t.latents(**one), **CLOSE)
    with compose_loras(t.pipe, [a], "spatial", regions=[as_picture]):
        mixed = t.latents(**one)
    expected = (t.merged(a).latents(**one) * 127 + t.latents(**one) * 128) / 255
    torch.testing.assert_close(mixed, expected, **CLOSE)


def test_a_schedule_sees_every_step_once_and_starts_again(tiny: Any) -> None:
    t = tiny("sd")
    seen: list[tuple[int, int]] = []

    def schedule(step: int, steps: int) -> list[float]:
        seen.append((step, steps))
        return [1.0 if step < 2 else 0.0]

    with compose_loras(t.pipe, [t.lora(1)], schedule=schedule):
        first = t.latents()
        second = t.latents()
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)] * 2
    assert torch.equal(first, second)
    assert apart(first, t.latents()) > 0.01


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
    assert apart(both, plain) > 0.01


def test_falls_back_to_smaller_forwards_when_memory_runs_out(tiny: Any) -> None:
    t = tiny("sd")
    loras = LoraWeights.stack([t.lora(s) for s in range(5)])
    sizes: list[int] = []

    def limited(sample: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(len(sample))
        if len(sample) > 4:
            raise torch.OutOfMemoryError("as a GPU would")
        return forward(sample, *rest, **more)

    forward = t.denoiser.forward
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 16))
    found = predict_per_lora(DenoiserCall(limited, inputs, {}), {"unet": t.denoiser}, loras)
    expected = predict_per_lora(DenoiserCall(forward, inputs, {}), {"unet": t.denoiser}, loras)
    assert sizes == [10, 6, 4, 4, 2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_leaves_the_pipeline_as_it_was(tiny: Any) -> None:
    t = tiny("sd")
    before = t.latents()
    with pytest.raises(RuntimeError), compose_loras(t.pipe, [t.lora(1)] * 2, "composite"):
        raise RuntimeError
    assert "forward" not in vars(t.denoiser)
    assert torch.equal(t.latents(), before)


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
def test_says_what_is_wrong(tiny: Any, options: dict[str, Any], sentence: str) -> None:
    t = tiny("sd")
    with (
        pytest.raises(InvalidArgumentError, match=sentence.replace("(", r"\(")),
        compose_loras(t.pipe, [t.lora(1), t.lora(2)], **options),
    ):
        t.latents()


def test_refuses_a_lora_of_another_base(tiny: Any) -> None:
    sd, sdxl = tiny("sd"), tiny("sdxl")
    with (
        pytest.raises(LayoutMismatchError),
        compose_loras(sd.pipe, [sd.lora(1), sdxl.lora(1)], "composite"),
    ):
        sd.latents()
    with (
        pytest.raises(LayoutMismatchError, match="which StableDiffusion3Pipeline lacks"),
        compose_loras(tiny("sd3").pipe, [sd.lora(1)]),
    ):
        pass
