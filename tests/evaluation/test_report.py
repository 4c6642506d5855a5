"""The table of scores: what is compared person by person."""

import pytest
import torch

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.report import markdown
from hyperlora.evaluation.subject_evaluator import Row


def test_a_small_gain_of_everybody_is_seen_though_people_differ_much() -> None:
    people = torch.linspace(0.2, 0.9, 16)
    plain, better = Score.of(people), Score.of(people + 0.01)
    gain = better.above(plain)
    assert gain.mean == pytest.approx(0.01, abs=1e-6) and gain.error < 1e-6 < plain.error
    text = markdown([Row("one photo", plain, None), Row("one photo, refined 40 steps", better, None)])
    assert "against one photo: one photo, refined 40 steps +0.010 ± 0.000." in text


def test_nothing_is_compared_where_there_is_nothing_to_compare_with() -> None:
    score = Score.of(torch.rand(4))
    assert "against" not in markdown([Row("base, no LoRA", score, None), Row("mean LoRA", score, None)])
    assert "against" not in markdown([Row("one photo", score, None), Row("mean LoRA", score, None)])
