"""The table of scores: what is compared person by person."""

import pytest
import torch

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_evaluator import SubjectResult


def test_a_small_gain_of_everybody_is_seen_though_people_differ_much() -> None:
    people = torch.linspace(0.2, 0.9, 16)
    plain, better = Score.from_samples(people), Score.from_samples(people + 0.01)
    gain = better.compute_paired_difference(plain)
    assert (
        gain.mean == pytest.approx(0.01, abs=1e-6)
        and gain.standard_error < 1e-6 < plain.standard_error
    )
    text = format_markdown(
        [
            SubjectResult("one photo", plain, None),
            SubjectResult("one photo, refined 40 steps", better, None),
        ]
    )
    assert "against one photo: one photo, refined 40 steps +0.010 ± 0.000." in text


def test_nothing_is_compared_where_there_is_nothing_to_compare_with() -> None:
    score = Score.from_samples(torch.rand(4))
    assert "against" not in format_markdown(
        [SubjectResult("base, no LoRA", score, None), SubjectResult("mean LoRA", score, None)]
    )
    assert "against" not in format_markdown(
        [SubjectResult("one photo", score, None), SubjectResult("mean LoRA", score, None)]
    )
