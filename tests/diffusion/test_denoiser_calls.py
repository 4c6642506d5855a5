"""Calls of a denoiser that are intercepted, repeated for several LoRAs and counted as steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.denoiser_calls import (
    DenoiserCall,
    intercept_denoiser,
    predict_per_lora,
)
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.multi_lora import StepCounter
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

ONE_STEP = {"num_inference_steps": 1}


def test_denoiser_call_repeats_samples_wherever_they_are() -> None:
    family: Any = SimpleNamespace(
        latents_input="sample",
        timestep_input="timestep",
        time_runs_upward=True,
        unbatched_inputs=frozenset({"ids"}),
        listed_inputs=frozenset({"prompts"}),
        batch_axis_1_inputs=frozenset({"layers"}),
    )
    samples, text = torch.arange(6.0).view(2, 3), torch.tensor([[1.0], [2.0]])
    inputs = {
        "sample": samples,
        "timestep": 0.25,
        "ids": torch.arange(2),
        "prompts": ["a", "b"],
        "layers": torch.arange(6).view(3, 2),
        "extra": {"text": text, "ids": torch.arange(2), "prompts": ["c", "d"], "size": 7},
        "residuals": (samples, [text]),
        "other": torch.arange(3),  # not of 2 samples
        "scalar": torch.tensor(5.0),
    }
    call = DenoiserCall(family, lambda **_: None, inputs)
    assert call.timestep == -0.25, "as a pipeline may give it, and falling"
    repeated = call.repeat_samples(2).inputs
    assert repeated.keys() == inputs.keys()
    two = [0, 0, 1, 1]
    assert torch.equal(repeated["sample"], samples[two])
    assert repeated["timestep"] == 0.25 and repeated["scalar"].item() == 5
    assert repeated["ids"] is inputs["ids"] and repeated["other"] is inputs["other"]
    assert repeated["prompts"] == ["a", "a", "b", "b"]
    assert torch.equal(repeated["layers"], inputs["layers"][:, two])
    extra = repeated["extra"]
    assert torch.equal(extra["text"], text[two]) and torch.equal(extra["ids"], torch.arange(2))
    assert extra["prompts"] == ["c", "c", "d", "d"] and extra["size"] == 7
    first, (second,) = repeated["residuals"]
    assert torch.equal(first, samples[two]) and torch.equal(second, text[two])
    assert isinstance(repeated["residuals"], tuple)


def test_step_counter_knows_the_steps_of_a_run() -> None:
    pipe: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=range(8)))
    counter = StepCounter(pipe)
    times = [900.0, 900.0, 500.0, 20.0, 20.0, 700.0, 700.0, 10.0]  # two calls of a step, two runs
    assert [counter.count_step(time) for time in times] == [0, 0, 1, 2, 2, 0, 0, 1]
    assert counter.num_steps == 8
    pipe.num_timesteps = 5  # of img2img, which skips the first
    assert counter.num_steps == 5


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(4, [10, 6, 4, 4, 2]), (2, [10, 6, 4, *[2] * 5]), (1, [10, 6, 4, 2])],
)
def test_predict_per_lora_halves_chunks_when_memory_runs_out(
    make_tiny_pipeline: Any, limit: int, expected: list[int]
) -> None:
    tiny = make_tiny_pipeline("sd")
    loras = LoraWeights.stack([tiny.make_lora(seed) for seed in range(5)])
    batch_sizes: list[int] = []

    def run_with_memory_limit(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch_sizes.append(len(sample))
        if len(sample) > limit:
            raise torch.OutOfMemoryError("as a GPU would")
        return forward(sample, *args, **kwargs)

    forward, modules = tiny.denoiser.forward, {"unet": tiny.denoiser}
    family = get_pipeline_family(tiny.pipe)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    limited = DenoiserCall(family, run_with_memory_limit, inputs)
    if limit < 2:  # not even one LoRA
        with pytest.raises(torch.OutOfMemoryError):
            predict_per_lora(limited, modules, loras)
    else:
        outputs = predict_per_lora(limited, modules, loras)
        at_once = predict_per_lora(DenoiserCall(family, forward, inputs), modules, loras)
        torch.testing.assert_close(outputs, at_once, rtol=1e-4, atol=1e-5)
    assert batch_sizes == expected


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_intercepted_denoiser_returns_what_a_caller_expects(
    make_tiny_pipeline: Any, kind: str
) -> None:
    tiny = make_tiny_pipeline(kind)
    inputs: list[dict[str, Any]] = []

    def answer(call: DenoiserCall) -> Tensor:
        inputs.append(dict(call.inputs))
        return call() + 1

    with intercept_denoiser(tiny.pipe, answer):
        tiny.sample_latents(**ONE_STEP)
    assert not {"self", "return_dict"} & inputs[0].keys()
    arguments = {name: value for name, value in inputs[0].items() if value is not None}
    plain = tiny.denoiser(**arguments)
    with intercept_denoiser(tiny.pipe, answer):
        output = tiny.denoiser(**arguments)
        (first,) = tiny.denoiser(**arguments, return_dict=False)
    assert type(output) is type(plain)
    assert torch.equal(output.sample, plain.sample + 1) and torch.equal(first, output.sample)


def test_handlers_nest_and_leave_the_outer_one(make_tiny_pipeline: Any) -> None:
    tiny = make_tiny_pipeline("sd")
    forward = tiny.denoiser.forward
    answers: list[str] = []

    def make_handler(name: str) -> Any:
        def answer(call: DenoiserCall) -> Tensor:
            answers.append(name)
            return call()

        return answer

    plain = tiny.sample_latents(**ONE_STEP)
    with intercept_denoiser(tiny.pipe, make_handler("outer")):
        with intercept_denoiser(tiny.pipe, make_handler("inner")):
            nested = tiny.sample_latents(**ONE_STEP)
        outer = tiny.sample_latents(**ONE_STEP)
    assert answers == ["inner", "outer", "outer"]
    assert torch.equal(nested, plain) and torch.equal(outer, plain)
    assert tiny.denoiser.forward == forward and "forward" not in vars(tiny.denoiser)


def test_intercepted_denoiser_returns_a_list_where_it_takes_one() -> None:
    pipe = get_tiny_pipeline("z_image").pipe

    def answer(call: DenoiserCall) -> Tensor:
        return torch.stack([sample + 1 for sample in call.inputs["x"]])

    with intercept_denoiser(pipe, answer):
        samples = [torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)]
        (output,) = pipe.transformer(x=samples, t=None, cap_feats=None, return_dict=False)
    assert isinstance(output, list)
    for sample, returned in zip(samples, output, strict=True):
        assert torch.equal(returned, sample + 1)
