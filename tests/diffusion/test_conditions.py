"""Operations on batches of conditions, by hand-computed values."""

import torch

from hyperlora.diffusion.conditions import (
    Conditions,
    blend_conditions,
    cat_conditions,
    map_tensors,
    pad_tokens,
)


def make_conditions(num_prompts: int, num_tokens: int, **extra: torch.Tensor) -> Conditions:
    conditions: Conditions = {
        "prompt_embeds": torch.randn(num_prompts, num_tokens, 3),
        "pooled_prompt_embeds": torch.randn(num_prompts, 5),
    }
    return {**conditions, **extra}  # type: ignore[typeddict-item]


def test_map_tensors_pairs_the_tensors_of_a_key() -> None:
    first, second = make_conditions(2, 4), make_conditions(2, 4)
    result = map_tensors(torch.sub, first, second)
    assert result.keys() == first.keys()
    for key in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(result[key], first[key] - second[key])
    assert torch.equal(map_tensors(torch.neg, first)["prompt_embeds"], -first["prompt_embeds"])


def test_pad_tokens_adds_zeros_at_the_end_and_masks_them() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    short = make_conditions(2, 2, prompt_embeds_mask=mask)
    longer = make_conditions(1, 5, prompt_embeds_mask=torch.ones(1, 5, dtype=torch.bool))
    padded, same = pad_tokens([short, longer])
    assert padded["prompt_embeds"].shape == (2, 5, 3)
    assert torch.equal(padded["prompt_embeds"][:, :2], short["prompt_embeds"])
    assert not padded["prompt_embeds"][:, 2:].any()
    assert padded["prompt_embeds_mask"].tolist() == [[True, True, False, False, False]] * 2
    assert torch.equal(padded["pooled_prompt_embeds"], short["pooled_prompt_embeds"])
    assert torch.equal(same["prompt_embeds"], longer["prompt_embeds"])
    assert short["prompt_embeds"].shape == (2, 2, 3), "the arguments stay as they are"
    assert "prompt_embeds_mask" not in pad_tokens([make_conditions(1, 1)])[0]


def test_cat_conditions_keeps_the_order_along_its_axis() -> None:
    parts = [make_conditions(2, 2), make_conditions(1, 4), make_conditions(3, 3)]
    rows = cat_conditions(parts)
    assert rows["prompt_embeds"].shape == (6, 4, 3)
    assert torch.equal(rows["pooled_prompt_embeds"][2], parts[1]["pooled_prompt_embeds"][0])
    assert torch.equal(rows["prompt_embeds"][3:, :3], parts[2]["prompt_embeds"])
    subjects = [map_tensors(lambda tensor: tensor[None], make_conditions(2, n)) for n in (3, 2)]
    columns = cat_conditions(subjects, dim=1)
    assert columns["prompt_embeds"].shape == (1, 4, 3, 3)
    assert torch.equal(columns["prompt_embeds"][0, 2:, :2], subjects[1]["prompt_embeds"][0])


def test_blend_conditions_is_linear_and_masks_what_all_its_prompts_mask() -> None:
    masks = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    conditions = make_conditions(3, 3, prompt_embeds_mask=masks)
    weights = torch.tensor([[0.25, 0.75, 0.0], [-2.0, 0.0, 3.0]])
    blend = blend_conditions(conditions, weights)
    first, second, third = conditions["prompt_embeds"]
    torch.testing.assert_close(blend["prompt_embeds"][0], 0.25 * first + 0.75 * second)
    torch.testing.assert_close(blend["prompt_embeds"][1], 3 * third - 2 * first)
    assert blend["pooled_prompt_embeds"].shape == (2, 5)
    assert blend["prompt_embeds_mask"].tolist() == [[True, True, False], [True, False, True]]


def test_blend_conditions_sums_half_precision_in_float32() -> None:
    """1000 + 0.25 - 1000 is 0 in half precision."""
    values = torch.tensor([1000.0, 0.25, 1000.0]).view(3, 1, 1)
    weights = torch.tensor([[1.0, 1.0, -1.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            blend = blend_conditions({"prompt_embeds": values.to(dtype)}, weights)
        assert blend["prompt_embeds"].dtype == dtype
        assert float(blend["prompt_embeds"]) == 0.25
