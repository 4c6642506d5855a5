"""Qwen-Image: masks of prompts, input images that the text encoder sees, branches of guidance."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.errors import InvalidArgumentError
from tests.diffusion.families.calls import record_batch_sizes
from tests.tiny_pipelines import get_tiny_pipeline
from tests.tiny_pipelines.base import PROMPTS, make_image

EDIT_NAMES = ["qwen_image_edit", "qwen_image_edit_plus"]


def test_no_mask_is_passed_where_nothing_is_padded() -> None:
    tiny = get_tiny_pipeline("qwen_image")
    family = get_pipeline_family(tiny.pipe)
    prompts = ["cat", "dog"]  # of the same length
    conditions = family.encode_text(prompts)
    assert conditions["prompt_embeds_mask"].all()
    record = tiny.record_calls(prompts, steps=1)[0]
    inputs = family.make_inputs(tiny.unpack(record.sample), record.timestep, conditions)
    assert record.inputs["encoder_hidden_states_mask"] is None
    assert inputs["encoder_hidden_states_mask"] is None


def test_padding_does_not_change_the_prediction() -> None:
    family = get_pipeline_family(get_tiny_pipeline("qwen_image").pipe)
    conditions: Any = family.encode_text(["dog"])
    padded: Any = {
        "prompt_embeds": F.pad(conditions["prompt_embeds"], (0, 0, 0, 5), value=3.0),
        "prompt_embeds_mask": F.pad(conditions["prompt_embeds_mask"], (0, 5)),
    }
    latents, timesteps = torch.randn(1, 4, 2, 6), torch.tensor([500.0])
    with torch.no_grad():
        expected = family.predict(latents, timesteps, conditions)
        actual = family.predict(latents, timesteps, padded)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EDIT_NAMES)
def test_each_instruction_sees_its_own_image(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    images = torch.cat([make_image(seed=1), make_image(seed=2)])
    both = family.encode_text(list(PROMPTS), images)
    for i, prompt in enumerate(PROMPTS):
        single = family.encode_text([prompt], images[i : i + 1])["prompt_embeds"]
        mask = both["prompt_embeds_mask"][i]
        torch.testing.assert_close(both["prompt_embeds"][i][mask], single[0])
    other = family.encode_text(list(PROMPTS), images.flip(0))
    assert not torch.allclose(other["prompt_embeds"], both["prompt_embeds"], atol=1e-3)


@pytest.mark.parametrize("name", EDIT_NAMES)
def test_instruction_without_its_image_is_refused(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    with pytest.raises(InvalidArgumentError, match="one for each of 2 instructions, got 1"):
        family.encode_text(list(PROMPTS), make_image())
    with pytest.raises(InvalidArgumentError, match="one for each of 2 instructions, got 0"):
        family.encode_text(list(PROMPTS))


@pytest.mark.parametrize("name", EDIT_NAMES)
def test_input_image_changes_the_prediction(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    conditions: Any = family.encode_text(["dog"], make_image())
    latents, timesteps = torch.randn(1, 4, 4, 4), torch.tensor([500.0])
    with torch.no_grad():
        without = family.predict(latents, timesteps, conditions)
        conditions["image_latents"] = torch.randn(1, 4, 2, 6)
        assert family.predict(latents, timesteps, conditions).shape == latents.shape
        assert not torch.allclose(family.predict(latents, timesteps, conditions), without)


@pytest.mark.parametrize("name", ["qwen_image", *EDIT_NAMES])
def test_guidance_calls_the_transformer_once_for_each_branch(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    family = get_pipeline_family(tiny.pipe)
    assert tiny.guidance is not None
    with record_batch_sizes(tiny.denoiser) as batch_sizes:
        records = tiny.record_calls(tiny.prompts, steps=1, **tiny.guidance)
    assert batch_sizes == 2 * len(records) * [len(tiny.prompts)]
    assert family.count_branches(len(tiny.prompts)) == 1


def test_pipeline_takes_the_prompt_arguments() -> None:
    pipe = get_tiny_pipeline("qwen_image").pipe
    family = get_pipeline_family(pipe)
    conditions = family.encode_text(list(PROMPTS))
    embeds, mask = pipe.encode_prompt(None, **family.make_prompt_arguments(conditions))
    torch.testing.assert_close(embeds, conditions["prompt_embeds"])
    torch.testing.assert_close(mask, conditions["prompt_embeds_mask"])


def test_long_prompts_are_cut_as_in_the_pipeline() -> None:
    tiny = get_tiny_pipeline("qwen_image")
    prompt = "cat " * 200  # one token for each byte
    conditions = get_pipeline_family(tiny.pipe).encode_text([prompt])
    record = tiny.record_calls([prompt], steps=1)[0]
    torch.testing.assert_close(conditions["prompt_embeds"], record.inputs["encoder_hidden_states"])
