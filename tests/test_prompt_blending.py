"""Blends of prompts: what is written is read again, and what cannot be read is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import InvalidArgumentError
from hyperlora.prompt_blending import apply_prompt_template, format_blend, parse_blend

WEIGHTS = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


@given(st.dictionaries(st.text(min_size=1, max_size=20), WEIGHTS, min_size=2, max_size=5))
def test_what_is_written_is_read_again(parts: dict[str, float]) -> None:
    assert parse_blend(format_blend(parts)) == pytest.approx(parts, abs=1e-4)


def test_every_part_that_says_something_is_reworded() -> None:
    assert apply_prompt_template("red clothes", "back to {}") == "back to red clothes"
    parts = parse_blend(apply_prompt_template('("", "red {", "sad").blend(-1, 1.5, 0.5)', "no {}!"))
    assert parts == {"": -1, "no red {!": 1.5, "no sad!": 0.5}
    with pytest.raises(InvalidArgumentError, match="no place for a prompt"):
        apply_prompt_template("red clothes", "back to")


def test_as_compel_writes_it() -> None:
    assert parse_blend('("blue clothes", "red clothes").blend(0.3, 0.7)') == {
        "blue clothes": 0.3,
        "red clothes": 0.7,
    }


@pytest.mark.parametrize(
    "prompt", ["", "blue clothes", "(a blue hat)", "a (very) blue blend (0.3)", "(a).blend"]
)
def test_a_plain_prompt_is_itself(prompt: str) -> None:
    assert parse_blend(prompt) == {prompt: 1.0}
    assert format_blend({prompt: 1.0}) == prompt


def test_parts_that_weigh_nothing_are_left_out() -> None:
    assert format_blend({"blue clothes": 1.0, "red clothes": 0.0}) == "blue clothes"


def test_a_part_that_is_named_twice_counts_twice() -> None:
    assert parse_blend('("blue clothes", "blue clothes").blend(0.3, 0.5)') == {"blue clothes": 0.8}


@pytest.mark.parametrize(
    "shares",
    [
        "1e999, 0",
        "nan, 1",
        "-" * 100_000 + "1, 1",
        "(" * 5000 + "1",
        "",
        "0.3",
        "0.3, 0.7, 1",
        "0.3, much",
        "__import__('os')",
    ],
)
def test_a_blend_that_cannot_be_read_is_refused_in_one_sentence(shares: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read: write"):
        parse_blend(f'("blue clothes", "red clothes").blend({shares})')
