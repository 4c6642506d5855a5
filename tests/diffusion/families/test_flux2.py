"""FLUX.2: prompts of a fixed length, branches of guidance, names of its sizes."""

import pytest
import torch

from hyperlora.diffusion.families.base import broadcast_timesteps
from hyperlora.diffusion.families.flux2 import make_position_ids
from hyperlora.diffusion.families.registry import get_pipeline_family
from tests.diffusion.families.calls import record_batch_sizes
from tests.mock_cuda import CUDA, mock_cuda
from tests.tiny_pipelines import get_tiny_pipeline
from tests.tiny_pipelines.base import PROMPTS


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_pipeline_takes_the_prompt_arguments(name: str) -> None:
    pipe = get_tiny_pipeline(name).pipe
    family = get_pipeline_family(pipe)
    conditions = family.encode_text(list(PROMPTS))
    assert conditions["prompt_embeds"].shape[1] == 512
    arguments = family.make_prompt_arguments(conditions)
    torch.testing.assert_close(
        pipe.encode_prompt(None, **arguments)[0], conditions["prompt_embeds"]
    )


def test_guidance_of_klein_calls_the_transformer_once_for_each_branch() -> None:
    tiny = get_tiny_pipeline("flux2_klein")
    family = get_pipeline_family(tiny.pipe)
    assert tiny.guidance is not None
    with record_batch_sizes(tiny.denoiser) as batch_sizes:
        records = tiny.record_calls(PROMPTS, **tiny.guidance)
    assert batch_sizes == 2 * len(records) * [len(PROMPTS)]
    assert family.count_branches(len(PROMPTS)) == 1

    conditions = [family.encode_text(prompts) for prompts in ([""] * len(PROMPTS), list(PROMPTS))]
    for record in records:
        latents = tiny.unpack(record.sample)
        with torch.no_grad():
            branches = [family.predict(latents, record.timestep, item) for item in conditions]
        guided = family.combine_branches(torch.cat(branches), tiny.guidance["guidance_scale"])
        torch.testing.assert_close(guided, tiny.unpack(record.prediction), atol=1e-5, rtol=1e-5)


def test_distilled_klein_ignores_guidance() -> None:
    tiny = get_tiny_pipeline("flux2_klein_distilled")
    with record_batch_sizes(tiny.denoiser) as batch_sizes:
        records = tiny.record_calls(PROMPTS, guidance_scale=3.0)
    assert batch_sizes == len(records) * [len(PROMPTS)]


def test_guidance_scale_reaches_dev() -> None:
    tiny = get_tiny_pipeline("flux2")
    family = get_pipeline_family(tiny.pipe)
    conditions = family.encode_text(list(PROMPTS))
    record = tiny.record_calls(PROMPTS, steps=1, guidance_scale=2.5)[0]
    latents = tiny.unpack(record.sample)
    with torch.no_grad():
        prediction = family.predict(latents, record.timestep, conditions, guidance_scale=2.5)
    torch.testing.assert_close(prediction, tiny.unpack(record.prediction), atol=1e-5, rtol=1e-5)


def test_positions_and_times_are_on_the_device_of_the_latents() -> None:
    with mock_cuda():
        latents = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(CUDA)
        position_ids = make_position_ids(latents, time=10, size=(3, 5))
        assert position_ids.device == CUDA and position_ids.shape == (2, 15, 4)
        assert position_ids[1, 7].tolist() == [10, 1, 2, 0]
        for timesteps, dtype in (
            (torch.tensor(7), torch.int64),
            (torch.tensor([7, 7]), torch.int64),
            (torch.tensor(7.0), torch.float64),
        ):
            times = broadcast_timesteps(timesteps, latents)
            assert times.device == CUDA and times.dtype == dtype
            assert times.tolist() == [7, 7]
