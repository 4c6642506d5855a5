"""The report compares variants with their reference subject by subject, and writes its tables as
CSV.
"""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.report import format_markdown, write_report
from hyperlora.evaluation.subject_evaluator import SubjectResult


def test_format_markdown_compares_subject_by_subject() -> None:
    identities = torch.linspace(0.2, 0.9, 16)
    plain, better = Score.from_samples(identities), Score.from_samples(identities + 0.01)
    gain = better.compute_paired_difference(plain)
    assert (
        gain.mean == pytest.approx(0.01, abs=1e-6)
        and gain.standard_error < 1e-6 < plain.standard_error
    )
    text = format_markdown(
        [
            SubjectResult("one photo", plain, None, role="reference"),
            SubjectResult("one photo, refined 40 steps", better, None, role="variant"),
        ]
    )
    assert text.startswith("| LoRA | identity |")
    assert "against one photo: one photo, refined 40 steps +0.010 ± 0.000." in text


def test_format_markdown_compares_nothing_without_reference_and_variant() -> None:
    score = Score.from_samples(torch.rand(4))
    mean_lora = SubjectResult("mean LoRA", score, None)
    assert "against" not in format_markdown(
        [SubjectResult("base, no LoRA", score, None), mean_lora]
    )
    assert "against" not in format_markdown(
        [SubjectResult("one photo", score, None, role="reference"), mean_lora]
    )


def test_write_report_writes_tables_as_csv(tmp_path: Path) -> None:
    score = Score.from_samples(torch.tensor([0.25, 0.75]))
    base_accuracy, accuracy = {"eyes": 0.0, "hat": 0.0}, {"eyes": 0.5, "hat": 1.0}
    results = [
        SubjectResult("base, no LoRA", score, None, attribute_accuracy=base_accuracy),
        SubjectResult("one photo", score, score, 0.5, attribute_accuracy=accuracy),
    ]
    write_report(tmp_path, results, [Image.new("RGB", (8, 8))])
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["base, no LoRA", "one photo"]
    assert float(rows[1]["identity"]) == 0.5 and float(rows[1]["seconds"]) == 0.5
    assert rows[0]["prompt_accuracy"] == "" and float(rows[1]["prompt_accuracy"]) == 0.5
    with (tmp_path / "attributes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attribute"] for row in rows] == ["eyes", "hat"] * 2
    assert float(rows[3]["accuracy"]) == 1.0
