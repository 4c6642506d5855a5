"""``hyperlora evaluate``: scores of a model, and its report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyperlora.evaluation.benchmark import load_benchmark

RunCommand = Callable[..., Any]
EVALUATE = ["--steps", 1, "--guidance-scale", 1]


def list_model_options(bundle: Any) -> list[Any]:
    return ["--model", bundle.model, "--base", bundle.base, "--evaluator", bundle.evaluator]


def test_evaluate_scores_all_variants(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    options = ["--refine-steps", 1, "--finetune-steps", 1, "--report-dir", tmp_path / "report"]
    result = run(
        "evaluate", bundle.benchmark, *list_model_options(bundle), *EVALUATE, *options, "--json"
    )
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["num_subjects"] == 4
    assert [score["name"] for score in report["results"]] == [
        "base, no LoRA",
        "one photo",
        "one photo, strength 0.6",
        "one photo, strength 0.8",
        "2 photos",
        "shuffled LoRA",
        "mean LoRA",
        "one photo, refined 1 steps",
        "fine-tuned per subject, 1 steps",
    ]
    for score in report["results"]:
        assert 0 <= score["prompt_accuracy"] <= 1
        assert score["identity_standard_error"] > 0
        assert (score["seconds"] is None) == (
            score["name"] in ("base, no LoRA", "shuffled LoRA", "mean LoRA")
        )
    assert len({score["identity"] for score in report["results"][:3]}) == 3, (
        "the LoRA changes nothing"
    )
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "attributes.csv",
        "report.md",
        "results.csv",
        "scores.png",
        "sheet.png",
    ]
    assert "| one photo |" in (tmp_path / "report" / "report.md").read_text()


def test_evaluate_scores_plain_folder(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    for subject, photos in (("a", 2), ("b", 3)):
        (tmp_path / subject).mkdir()
        for i in range(photos):
            shutil.copy(bundle.subjects / "person-1" / f"{i}.png", tmp_path / subject)
    result = run("evaluate", tmp_path, *list_model_options(bundle), *EVALUATE)
    assert result.code == 0, result
    assert "prompt accuracy needs prompts with known truth" in result.out
    assert "identity has no second real photo" in result.out
    result = run(
        "evaluate",
        tmp_path,
        *list_model_options(bundle),
        *EVALUATE,
        "--num-subjects",
        1,
        "--report-dir",
        tmp_path / "r",
        "--json",
    )
    assert result.code == 0, result
    results = json.loads(result.out)["results"]
    assert "mean LoRA" not in [score["name"] for score in results]
    assert all(score["prompt_accuracy"] is None for score in results)


def test_load_benchmark_splits_photos(bundle: Any) -> None:
    benchmark = load_benchmark(bundle.benchmark, 16, 3)
    assert benchmark.names == ("person-0", "person-1", "person-2")
    assert benchmark.photos.shape == benchmark.comparison_photos.shape == (3, 2, 3, 16, 16)
    assert benchmark.has_truth
