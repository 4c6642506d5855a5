"""AutoLoRA's identities and its formula on every class of pipeline; LoRAs on one branch of guidance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance, inject_branch_loras
from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError

KINDS = ("sd", "ip2p", "sdxl", "sd3", "flux")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ONE = {"num_inference_steps": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_0_is_the_base_and_1_the_lora(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    lora = t.lora(1, size=0.1)
    base, plain = t.latents(), t.merged(lora).latents()
    for gamma, expected in ((0.0, base), (1.0, plain)):
        with apply_autolora_guidance(t.pipe, lora, gamma):
            torch.testing.assert_close(t.latents(), expected, **CLOSE)
    assert (plain - base).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_is_linear_in_gamma(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    lora = t.lora(1, size=0.1)
    found = []
    for gamma in (0.0, 0.25, 1.0, 1.75):
        with apply_autolora_guidance(t.pipe, lora, gamma):
            found.append(t.latents(**ONE))
    base, quarter, whole, beyond = found
    torch.testing.assert_close(quarter, base + 0.25 * (whole - base), **CLOSE)
    torch.testing.assert_close(beyond, base + 1.75 * (whole - base), **CLOSE)


def seen_by_scheduler(tiny: Any, **more: Any) -> Tensor:
    """What the first step of a run hands to the scheduler."""
    made: list[Tensor] = []
    step = tiny.pipe.scheduler.step

    def spy(prediction: Tensor, *rest: Any, **named: Any) -> Any:
        made.append(prediction)
        return step(prediction, *rest, **named)

    tiny.pipe.scheduler.step = spy
    tiny.latents(**ONE, **more)
    tiny.pipe.scheduler.step = step
    return made[0]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ip2p", "sd3"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_formula_whatever_the_pipeline_does_afterwards(
    tiny: Any, kind: str, rescale: float
) -> None:
    if rescale and kind not in ("sd", "sdxl"):
        pytest.skip("this pipeline has no guidance_rescale")
    t = tiny(kind)
    lora = t.lora(1, size=0.1)
    branches: list[Tensor] = []

    def spy(call: DenoiserCall) -> Tensor:
        plain = call()
        with inject_lora({t.name: t.denoiser}, lora):
            branches.extend([plain, call()])
        return plain

    with intercept_denoiser(t.pipe, spy):
        t.latents(**ONE)
    guided = []
    for made, w in zip(branches, (2.0, 5.0), strict=True):
        if kind == "ip2p":
            text, image, nothing = made.chunk(3)
            guided.append(nothing + w * (text - image) + 1.5 * (image - nothing))
        else:
            nothing, text = made.chunk(2)
            guided.append(nothing + w * (text - nothing))
    expected = guided[0] + 1.3 * (guided[1] - guided[0])
    with apply_autolora_guidance(t.pipe, lora, 1.3, base_scale=2.0, lora_scale=5.0):
        found = seen_by_scheduler(t, **({"guidance_rescale": rescale} if rescale else {}))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ip2p", "sd3"])
def test_a_lora_on_one_branch_leaves_the_others(tiny: Any, kind: str) -> None:
    t = tiny(kind)
    a, b = t.lora(1, size=0.1), t.lora(2, "attention", rank=2, size=0.1)
    seen: list[Tensor] = []

    def spy(call: DenoiserCall) -> Tensor:
        seen.append(call())
        return seen[-1]

    def branch_outputs(lora: Any = None) -> tuple[Tensor, ...]:
        target = t.merged(lora) if lora is not None else t
        with intercept_denoiser(target.pipe, spy):
            target.latents(**ONE)
        return seen.pop().chunk(3 if kind == "ip2p" else 2)

    plain, with_a, with_b = branch_outputs(), branch_outputs(a), branch_outputs(b)
    text = 0 if kind == "ip2p" else 1
    for positive, negative in ((a, b), (a, None), (None, b)):
        with (
            intercept_denoiser(t.pipe, lambda call: call()),
            inject_branch_loras(t.pipe, positive, negative),
        ):
            own = t.denoiser.forward
            recorded: list[Tensor] = []

            def record(
                *args: Any, own: Any = own, recorded: list[Tensor] = recorded, **kwargs: Any
            ) -> Any:
                made = own(*args, **kwargs)
                recorded.append(made[0])
                return made

            t.denoiser.forward = record
            t.latents(**ONE)
            t.denoiser.forward = own
        parts = recorded[0].chunk(len(plain))
        for i, part in enumerate(parts):
            lora, adapted = (positive, with_a) if i == text else (negative, with_b)
            torch.testing.assert_close(part, adapted[i] if lora is not None else plain[i], **CLOSE)


def test_says_what_is_wrong(tiny: Any) -> None:
    t = tiny("sd")
    with (
        pytest.raises(InvalidArgumentError, match="gamma must be a finite number, got nan"),
        apply_autolora_guidance(t.pipe, t.lora(1), float("nan")),
    ):
        pass
    with pytest.raises(InvalidArgumentError, match="none given"), inject_branch_loras(t.pipe):
        pass
    for context in (
        apply_autolora_guidance(t.pipe, t.lora(1), 1.0, lora_scale=3.0),
        inject_branch_loras(t.pipe, t.lora(1)),
    ):
        with context, pytest.raises(InvalidArgumentError, match="guidance scale above 1"):
            t.latents(guidance_scale=1.0)
    assert t.latents().isfinite().all()
