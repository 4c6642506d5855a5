"""``InstructionVocabulary``: what instructions mean, what a network says, and that both are the same language."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.models.instruction_vocabulary import InstructionVocabulary
from hyperlora.prompt_blending import format_blend

MIXED = [
    format_blend({"red sky": 0.2, "blue sky": 0.3, "gray sky": 0.5}),
    format_blend({"red sky": 1.2, "blue sky": -0.1, "gray sky": -0.1}),
    format_blend({"red sky": -0.2, "blue sky": 1.0, "gray sky": 0.2}),
]
"""A corner, and where the edges from it lead."""
WORDS = InstructionVocabulary(
    {"hair": ["a bob", "a bun"], "glasses": ["no glasses", "wearing glasses"]}, {"sky": MIXED}
)


def sky(x: float, y: float, more: dict[str, float] | None = None) -> str:
    corners = torch.tensor([[0.2, 0.3, 0.5], [1.2, -0.1, -0.1], [-0.2, 1.0, 0.2]])
    weights = corners[0] + x * (corners[1] - corners[0]) + y * (corners[2] - corners[0])
    return format_blend(
        dict(zip(("red sky", "blue sky", "gray sky"), weights.tolist(), strict=True)) | (more or {})
    )


def saying(hair: int, glasses: int, point: list[float] | None) -> torch.Tensor:
    """Numbers that say so, [1, 9]."""
    named = [10.0 * (i == hair) for i in range(3)] + [10.0 * (i == glasses) for i in range(3)]
    return torch.tensor([named + ([-10.0, 0.4, 0.4] if point is None else [10.0, *point])])


def test_instructions_are_read() -> None:
    sum_of_two = format_blend({"a bun": 1.0, "no glasses": 1.0, "": -1.0})
    meant = WORDS.encode(["", "a bob", sum_of_two, sky(0.25, 0.5), "something else"])
    assert meant.categories.tolist() == [[0, 0], [1, 0], [2, 1], [0, 0], [0, 0]]
    (points,) = meant.points
    assert points[[0, 1, 2, 4]].isnan().all()
    torch.testing.assert_close(points[3], torch.tensor([0.25, 0.5]), atol=1e-3, rtol=0)


def test_a_mixture_beside_other_changes_is_read() -> None:
    meant = WORDS.encode([sky(0.75, 0.1, {"a bun": 1.0, "": -1.0})])
    assert meant.categories.tolist() == [[2, 0]]
    torch.testing.assert_close(meant.points[0], torch.tensor([[0.75, 0.1]]), atol=1e-3, rtol=0)


def test_what_is_said_is_read_as_meant() -> None:
    said = saying(2, 0, [0.25, 0.5])
    prompts = dict(zip(WORDS.prompts, WORDS.compute_prompt_weights(said)[0].tolist(), strict=True))
    assert prompts == pytest.approx(
        {
            "a bob": 0,
            "a bun": 1,
            "no glasses": 0,
            "wearing glasses": 0,
            MIXED[0]: 0.25,
            MIXED[1]: 0.25,
            MIXED[2]: 0.5,
        }
    )
    meant = WORDS.encode([sky(0.25, 0.5, {"a bun": 1.0, "": -1.0})])
    assert WORDS.is_correct(said, meant).tolist() == [True]
    assert float(WORDS.compute_loss(said, meant)) < 0.01


def test_nothing_is_said_by_equal_numbers() -> None:
    assert WORDS.compute_prompt_weights(torch.zeros(3, sum(WORDS.logit_sizes))).abs().max() == 0


@pytest.mark.parametrize(
    "said",
    [
        saying(1, 0, [0.25, 0.5]),
        saying(2, 1, [0.25, 0.5]),
        saying(2, 0, None),
        saying(2, 0, [0.9, 0.5]),
    ],
    ids=str,
)
def test_what_is_not_meant_costs(said: torch.Tensor) -> None:
    meant = WORDS.encode([sky(0.25, 0.5, {"a bun": 1.0, "": -1.0})])
    assert float(WORDS.compute_loss(said, meant)) > 5
    near = bool(said[0, 6] > 0) and float(said[0, 7]) > 0.5  # only the point is elsewhere
    assert bool(WORDS.is_correct(said, meant)) == near


def test_a_point_that_is_not_there_does_not_count() -> None:
    meant = WORDS.encode(["a bob"])
    here, there = saying(1, 0, None), saying(1, 0, None)
    there[0, 7:] += 1
    assert float(WORDS.compute_loss(here, meant)) == float(WORDS.compute_loss(there, meant))


@pytest.mark.parametrize(
    "given",
    [{}, {"choices": {"hair": []}}, {"mixtures": {"sky": ["red"]}}],
    ids=["empty", "choice", "mixture"],
)
def test_too_few_prompts_are_refused(given: dict[str, dict[str, list[str]]]) -> None:
    with pytest.raises(InvalidArgumentError, match="a vocabulary needs a prompt"):
        InstructionVocabulary.from_config(given)
