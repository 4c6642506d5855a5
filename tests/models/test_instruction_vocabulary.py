"""``InstructionVocabulary``: instructions, logits and targets mean the same."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.models.instruction_vocabulary import InstructionVocabulary
from hyperlora.prompt_blending import format_blend

SKY_PROMPTS = [
    format_blend({"red sky": 0.2, "blue sky": 0.3, "gray sky": 0.5}),
    format_blend({"red sky": 1.2, "blue sky": -0.1, "gray sky": -0.1}),
    format_blend({"red sky": -0.2, "blue sky": 1.0, "gray sky": 0.2}),
]
"""The origin of a color space and the ends of its axes."""
VOCABULARY = InstructionVocabulary(
    {"hair": ["a bob", "a bun"], "glasses": ["no glasses", "wearing glasses"]},
    {"sky": SKY_PROMPTS},
)


def blend_sky(x: float, y: float, other_prompts: dict[str, float] | None = None) -> str:
    """The instruction with the sky's color at (x, y)."""
    corners = torch.tensor([[0.2, 0.3, 0.5], [1.2, -0.1, -0.1], [-0.2, 1.0, 0.2]])
    weights = corners[0] + x * (corners[1] - corners[0]) + y * (corners[2] - corners[0])
    sky = dict(zip(("red sky", "blue sky", "gray sky"), weights.tolist(), strict=True))
    return format_blend(sky | (other_prompts or {}))


def make_logits(hair: int, glasses: int, point: list[float] | None) -> torch.Tensor:
    """Logits of an instruction, [1, 9]."""
    category_logits = [10.0 * (i == hair) for i in range(3)]
    category_logits += [10.0 * (i == glasses) for i in range(3)]
    return torch.tensor(
        [category_logits + ([-10.0, 0.4, 0.4] if point is None else [10.0, *point])]
    )


def test_encode_reads_categories_and_colors() -> None:
    two_prompts = format_blend({"a bun": 1.0, "no glasses": 1.0, "": -1.0})
    targets = VOCABULARY.encode(["", "a bob", two_prompts, blend_sky(0.25, 0.5), "something else"])
    assert targets.categories.tolist() == [[0, 0], [1, 0], [2, 1], [0, 0], [0, 0]]
    (points,) = targets.points
    assert points[[0, 1, 2, 4]].isnan().all()
    torch.testing.assert_close(points[3], torch.tensor([0.25, 0.5]), atol=1e-3, rtol=0)


def test_encode_reads_a_color_beside_a_category() -> None:
    targets = VOCABULARY.encode([blend_sky(0.75, 0.1, {"a bun": 1.0, "": -1.0})])
    assert targets.categories.tolist() == [[2, 0]]
    torch.testing.assert_close(targets.points[0], torch.tensor([[0.75, 0.1]]), atol=1e-3, rtol=0)


def test_compute_prompt_weights_of_logits_match_their_targets() -> None:
    logits = make_logits(2, 0, [0.25, 0.5])
    weights = VOCABULARY.compute_prompt_weights(logits)[0].tolist()
    assert dict(zip(VOCABULARY.prompts, weights, strict=True)) == pytest.approx(
        {
            "a bob": 0,
            "a bun": 1,
            "no glasses": 0,
            "wearing glasses": 0,
            SKY_PROMPTS[0]: 0.25,
            SKY_PROMPTS[1]: 0.25,
            SKY_PROMPTS[2]: 0.5,
        }
    )
    targets = VOCABULARY.encode([blend_sky(0.25, 0.5, {"a bun": 1.0, "": -1.0})])
    assert VOCABULARY.is_correct(logits, targets).tolist() == [True]
    assert float(VOCABULARY.compute_loss(logits, targets)) < 0.01


def test_compute_prompt_weights_are_zero_for_equal_logits() -> None:
    logits = torch.zeros(3, sum(VOCABULARY.logit_sizes))
    assert VOCABULARY.compute_prompt_weights(logits).abs().max() == 0


@pytest.mark.parametrize(
    "logits",
    [
        make_logits(1, 0, [0.25, 0.5]),
        make_logits(2, 1, [0.25, 0.5]),
        make_logits(2, 0, None),
        make_logits(2, 0, [0.9, 0.5]),
    ],
    ids=str,
)
def test_compute_loss_is_large_for_wrong_logits(logits: torch.Tensor) -> None:
    targets = VOCABULARY.encode([blend_sky(0.25, 0.5, {"a bun": 1.0, "": -1.0})])
    assert float(VOCABULARY.compute_loss(logits, targets)) > 5
    only_point_differs = bool(logits[0, 6] > 0) and float(logits[0, 7]) > 0.5
    assert bool(VOCABULARY.is_correct(logits, targets)) == only_point_differs


def test_compute_loss_ignores_the_point_of_an_absent_color() -> None:
    targets = VOCABULARY.encode(["a bob"])
    logits, shifted_logits = make_logits(1, 0, None), make_logits(1, 0, None)
    shifted_logits[0, 7:] += 1
    loss = VOCABULARY.compute_loss(logits, targets)
    assert float(loss) == float(VOCABULARY.compute_loss(shifted_logits, targets))


def test_from_config_undoes_to_config() -> None:
    vocabulary = InstructionVocabulary(
        {"hair": ["a bob"]}, {"sky": SKY_PROMPTS}, "back to {}", ["wearing a hat"]
    )
    assert InstructionVocabulary.from_config(vocabulary.to_config()) == vocabulary


@pytest.mark.parametrize(
    "config",
    [{}, {"categories": {"hair": []}}, {"color_axes": {"sky": ["red"]}}],
    ids=["empty", "category", "color_axis"],
)
def test_from_config_rejects_too_few_prompts(config: dict[str, dict[str, list[str]]]) -> None:
    with pytest.raises(InvalidArgumentError, match="a vocabulary needs a prompt"):
        InstructionVocabulary.from_config(config)
