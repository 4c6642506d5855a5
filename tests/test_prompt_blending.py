"""Blends of prompts: format, parse, and errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import InvalidArgumentError
from hyperlora.prompt_blending import (
    apply_prompt_template,
    combine_blends,
    compute_blend_matrix,
    format_blend,
    parse_blend,
)

WEIGHTS = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


@given(st.dictionaries(st.text(min_size=1, max_size=20), WEIGHTS, min_size=2, max_size=5))
def test_parse_blend_inverts_format_blend(prompt_weights: dict[str, float]) -> None:
    assert parse_blend(format_blend(prompt_weights)) == pytest.approx(prompt_weights, abs=1e-4)


def test_apply_prompt_template_changes_every_nonempty_prompt() -> None:
    assert apply_prompt_template("red clothes", "back to {}") == "back to red clothes"
    prompt_weights = parse_blend(
        apply_prompt_template('("", "red {", "sad").blend(-1, 1.5, 0.5)', "no {}!")
    )
    assert prompt_weights == {"": -1, "no red {!": 1.5, "no sad!": 0.5}
    with pytest.raises(InvalidArgumentError, match="no place for a prompt"):
        apply_prompt_template("red clothes", "back to")


def test_parse_blend_reads_compel_syntax() -> None:
    assert parse_blend('("blue clothes", "red clothes").blend(0.3, 0.7)') == {
        "blue clothes": 0.3,
        "red clothes": 0.7,
    }


@pytest.mark.parametrize(
    "prompt", ["", "blue clothes", "(a blue hat)", "a (very) blue blend (0.3)", "(a).blend"]
)
def test_plain_prompt_is_unchanged(prompt: str) -> None:
    assert parse_blend(prompt) == {prompt: 1.0}
    assert format_blend({prompt: 1.0}) == prompt


def test_format_blend_leaves_out_zero_weights() -> None:
    assert format_blend({"blue clothes": 1.0, "red clothes": 0.0}) == "blue clothes"


def test_parse_blend_adds_weights_of_equal_prompts() -> None:
    assert parse_blend('("blue clothes", "blue clothes").blend(0.3, 0.5)') == {"blue clothes": 0.8}


@pytest.mark.parametrize(
    "weights",
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
def test_parse_blend_refuses_malformed_blends(weights: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read: write"):
        parse_blend(f'("blue clothes", "red clothes").blend({weights})')


def test_combine_blends_multiplies_weights_and_completes_their_sum_to_1() -> None:
    blend = combine_blends({'("a", "b").blend(0.5, 1.5)': 2.0, "b": -0.5})
    assert parse_blend(blend) == {"a": 1.0, "b": 2.5, "": -2.5}
    assert combine_blends({"a hat": 1.0}) == "a hat"
    assert combine_blends({'("", "a").blend(0.5, 0.5)': 2.0}) == "a"


def test_compute_blend_matrix_has_a_row_of_weights_for_each_prompt() -> None:
    prompts, matrix = compute_blend_matrix(["b", '("a", "b").blend(0.3, -2)', "c", "b"])
    assert prompts == ["b", "a", "c"]
    assert matrix == [[1.0, 0.0, 0.0], [-2.0, 0.3, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_format_blend_writes_four_decimals_and_drops_smaller_weights() -> None:
    assert (
        format_blend({"a": 0.33333, "b": 1e-4, "c": 0.9e-4}) == '("a", "b").blend(0.3333, 0.0001)'
    )
    assert format_blend({"a": 1.00005}) == "a" and format_blend({"ä": 0.9}) == '("ä").blend(0.9000)'
    assert parse_blend('("ä").blend(0.9000)') == {"ä": 0.9}
    assert format_blend({"a": 1.0002}) == '("a").blend(1.0002)'
