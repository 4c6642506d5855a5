"""Scores of edits whose results are known."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.evaluation.edit_benchmark import EditBenchmark, load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import METRICS, EditEvaluator
from hyperlora.evaluation.edit_report import (
    build_edit_json_report,
    format_edit_markdown,
    write_edit_report,
)
from hyperlora.evaluation.edit_suite import (
    evaluate_edit_suite,
    evaluate_reversal,
    generate_pair_loras,
)
from hyperlora.pipelines.pair_to_lora import PairToLora


@pytest.fixture(scope="module")
def evaluator(bundle: Any) -> EditEvaluator:
    base = load_diffusion_base(bundle.edit_base)
    benchmark = load_edit_benchmark(bundle.edit_benchmark, base.resolution)
    return EditEvaluator(
        base,
        AttributeClassifier.from_pretrained(bundle.evaluator),
        benchmark,
        num_inference_steps=2,
        batch_size=3,
    )


def test_score_images_of_targets_is_perfect(evaluator: EditEvaluator) -> None:
    row = evaluator.score_images("target", evaluator.targets)
    assert row.compute_score("edit_progress").mean == pytest.approx(1)
    assert row.compute_score("preservation").mean == 1
    assert row.compute_score("background_l1").mean == pytest.approx(0, abs=1e-6)
    assert row.compute_score("leakage").mean == pytest.approx(0, abs=1e-6)
    assert row.compute_score("psnr").mean == pytest.approx(80)
    assert row.compute_score("accuracy", "seen kinds").mean == 1, (
        "no attribute describes it, and its progress is complete"
    )


def test_score_images_of_copies_shows_leakage(evaluator: EditEvaluator) -> None:
    copy = evaluator.score_images("input unchanged", evaluator.inputs)
    assert copy.compute_score("edit_progress").mean == pytest.approx(0, abs=1e-6)
    assert copy.compute_score("accuracy", "seen kinds").mean == 0
    example_outputs = torch.cat(
        [
            e.example_pairs[0, 1].expand(len(e.test_pairs), -1, -1, -1)
            for e in evaluator.benchmark.edits
        ]
    )
    assert evaluator.score_images("copy of A'", example_outputs).compute_score("leakage").mean > 0


def test_evaluate_edit_suite_has_every_control(
    evaluator: EditEvaluator, bundle: Any, tmp_path: Any
) -> None:
    model = PairToLora.from_pretrained(bundle.pair_model, base=evaluator.base)
    rows = list(evaluate_edit_suite(evaluator, model, finetune_steps=2))
    names = [row.name for row in rows]
    for part in (
        "VAE round trip",
        "input unchanged",
        "copy of A'",
        "no LoRA",
        "text instruction",
        "one pair",
        "2 pairs",
        "shuffled",
        "mean",
        "fine-tuned on the pair, 2 steps",
        "one pair + background preserved",
    ):
        assert any(part in name for name in names), part
    lora, seconds = generate_pair_loras(model, evaluator.benchmark, 1)
    assert len(lora) == 2 and seconds > 0
    reversal = evaluate_reversal(evaluator, model)
    assert reversal.reversed_pair.mean == pytest.approx(
        reversal.negated_lora.mean, abs=1e-6
    )  # antisymmetric: the reversed pair gives -Δ
    write_edit_report(tmp_path / "report", rows, reversal)
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("| LoRA | accuracy |") == len(evaluator.benchmark.groups)
    assert (
        "| negated LoRA + background preserved |" in text
        and f"{reversal.negated_lora.mean / reversal.vae_round_trip.mean:.2f} ×" in text
    )
    assert (
        text.startswith(format_edit_markdown(rows, reversal))
        and "**unseen kinds** (1 edits)" in text
    )
    assert (tmp_path / "report" / "sheet.png").stat().st_size > 1000
    report = build_edit_json_report(rows, reversal)
    assert report["edits"] == 2
    assert set(report["rows"][0]["groups"]["seen kinds"]) == set(METRICS)  # type: ignore[index]


def test_render_edits_applies_each_edit_to_its_images(
    evaluator: EditEvaluator, bundle: Any
) -> None:
    """Batches cut across edits: the result is as if each edit was rendered alone."""
    model = PairToLora.from_pretrained(bundle.pair_model, base=evaluator.base)
    lora = generate_pair_loras(model, evaluator.benchmark, 1)[0] * 20
    batched = evaluator.render_edits("all", lora, evaluator.inputs)
    from hyperlora.diffusion.image_editing import edit_images

    for i, edit in enumerate(evaluator.benchmark.edits):
        seeds = [1000 + 2 * i, 1001 + 2 * i]
        from hyperlora.data.images import stack_images

        alone = stack_images(
            edit_images(
                evaluator.base, edit.test_pairs[:, 0], lora[i], seeds=seeds, num_inference_steps=2
            )
        )
        assert (alone - batched[2 * i : 2 * i + 2]).abs().max() <= 2.1 / 255


def test_accuracy_needs_progress_without_complete_truth(evaluator: EditEvaluator) -> None:
    """Of a double edit of which attributes describe one, recognizing that one is not enough."""
    edit = evaluator.benchmark.edits[0]
    before = evaluator._predict_labels(edit.test_pairs[:1, 0])
    attribute = next(
        name
        for name in before
        if before[name][0] == evaluator._predict_labels(edit.test_pairs[:1, 1])[name][0]
    )
    truth = {attribute: evaluator.classifier.attributes[attribute][before[attribute][0]]}
    for kind, expected in ((attribute, 1.0), (f"{attribute} + tone", 0.0)):
        partial_edit = replace(edit, test_pairs=edit.test_pairs[:1], kind=kind, truth=truth)
        alone = EditEvaluator(
            evaluator.base,
            evaluator.classifier,
            EditBenchmark((partial_edit,)),
            evaluator.num_inference_steps,
        )
        assert alone.score_images("targets", alone.targets).values["accuracy"].item() == 1
        assert alone.score_images("inputs", alone.inputs).values["accuracy"].item() == expected


def test_load_edit_benchmark_reads_folder_of_pairs(bundle: Any, tmp_path: Any) -> None:
    benchmark = load_edit_benchmark(bundle.edit_benchmark / "darker", 16)
    assert [e.name for e in benchmark.edits] == ["other-0", "other-1", "shown-0", "shown-1"]
    assert benchmark.groups == ("",) and torch.equal(
        benchmark.edits[0].example_pairs, benchmark.edits[0].test_pairs
    )
    with pytest.raises(InvalidImageError):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="lists no edit"):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("[1]")
    with pytest.raises(InvalidArgumentError, match="is no list of"):
        load_edit_benchmark(tmp_path, 16)
