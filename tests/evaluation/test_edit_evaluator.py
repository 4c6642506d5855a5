"""What the scores of edits say of results that are known."""

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
def judge(bundle: Any) -> EditEvaluator:
    base = load_diffusion_base(bundle.edit_base)
    benchmark = load_edit_benchmark(bundle.edit_benchmark, base.resolution)
    return EditEvaluator(
        base,
        AttributeClassifier.from_pretrained(bundle.evaluator),
        benchmark,
        num_inference_steps=2,
        batch_size=3,
    )


def test_the_answer_itself_is_perfect(judge: EditEvaluator) -> None:
    row = judge.score_images("answer", judge.targets)
    assert row.compute_score("made").mean == pytest.approx(1)
    assert row.compute_score("preservation").mean == 1
    assert row.compute_score("outside").mean == pytest.approx(0, abs=1e-6)
    assert row.compute_score("leakage").mean == pytest.approx(0, abs=1e-6)
    assert row.compute_score("psnr").mean == pytest.approx(80)
    assert row.compute_score("accuracy", "seen kinds").mean == 1, (
        "no attribute names it, and all of the way is gone"
    )


def test_copies_are_told(judge: EditEvaluator) -> None:
    copy = judge.score_images("copy of B", judge.inputs)
    assert copy.compute_score("made").mean == pytest.approx(0, abs=1e-6)
    assert copy.compute_score("accuracy", "seen kinds").mean == 0
    shown = torch.cat(
        [e.example_pairs[0, 1].expand(len(e.test_pairs), -1, -1, -1) for e in judge.benchmark.edits]
    )
    assert judge.score_images("copy of A'", shown).compute_score("leakage").mean > 0


def test_every_control_is_in_the_table(judge: EditEvaluator, bundle: Any, tmp_path: Any) -> None:
    model = PairToLora.from_pretrained(bundle.pair_model, base=judge.base)
    rows = list(evaluate_edit_suite(judge, model, finetune_steps=2))
    names = [row.name for row in rows]
    for part in (
        "autoencoder",
        "copy of B",
        "copy of A'",
        "no LoRA",
        "words",
        "one pair",
        "2 pairs",
        "another",
        "mean",
        "fitted to the pair, 2 steps",
        "one pair, the rest kept",
    ):
        assert any(part in name for name in names), part
    lora, seconds = generate_pair_loras(model, judge.benchmark, 1)
    assert len(lora) == 2 and seconds > 0
    back = evaluate_reversal(judge, model)
    assert back.reversed_pair.mean == pytest.approx(
        back.negated_lora.mean, abs=1e-6
    )  # antisymmetric: the pair turned round is -Δ
    write_edit_report(tmp_path / "report", rows, back)
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "| -Δ, the rest kept |" in text
        and f"{back.negated_lora.mean / back.vae_round_trip.mean:.2f} ×" in text
    )
    assert (
        text.startswith(format_edit_markdown(rows, back)) and "**unseen kinds** (1 edits)" in text
    )
    assert (tmp_path / "report" / "sheet.png").stat().st_size > 1000
    told = build_edit_json_report(rows, back)
    assert told["edits"] == 2 and set(told["rows"][0]["groups"]["seen kinds"]) == set(METRICS)  # type: ignore[index]


def test_an_edit_for_each_of_its_pictures(judge: EditEvaluator, bundle: Any) -> None:
    """Batches cut across edits: the result is as if each edit had been alone."""
    model = PairToLora.from_pretrained(bundle.pair_model, base=judge.base)
    lora = generate_pair_loras(model, judge.benchmark, 1)[0] * 20
    together = judge.render_edits("all", lora, judge.inputs)
    from hyperlora.diffusion.image_editing import edit_images

    for i, edit in enumerate(judge.benchmark.edits):
        seeds = [1000 + 2 * i, 1001 + 2 * i]
        from hyperlora.data.images import stack_images

        alone = stack_images(
            edit_images(
                judge.base, edit.test_pairs[:, 0], lora[i], seeds=seeds, num_inference_steps=2
            )
        )
        assert (alone - together[2 * i : 2 * i + 2]).abs().max() <= 2.1 / 255


def test_what_no_attribute_names_must_be_made(judge: EditEvaluator) -> None:
    """Of an edit of two only one of which is named: reading that one right is not enough."""
    edit = judge.benchmark.edits[0]
    before = judge._predict_labels(edit.test_pairs[:1, 0])
    attribute = next(
        name
        for name in before
        if before[name][0] == judge._predict_labels(edit.test_pairs[:1, 1])[name][0]
    )
    truth = {attribute: judge.classifier.attributes[attribute][before[attribute][0]]}
    for kind, unmade in ((attribute, 1.0), (f"{attribute} + tone", 0.0)):
        told = replace(edit, others=edit.test_pairs[:1], kind=kind, truth=truth)
        alone = EditEvaluator(
            judge.base, judge.classifier, EditBenchmark((told,)), judge.num_inference_steps
        )
        assert alone.score_images("the answers", alone.targets).values["accuracy"].item() == 1
        assert alone.score_images("as they were", alone.inputs).values["accuracy"].item() == unmade


def test_any_folder_of_pairs(bundle: Any, tmp_path: Any) -> None:
    found = load_edit_benchmark(bundle.edit_benchmark / "darker", 16)
    assert [e.name for e in found.edits] == ["other-0", "other-1", "shown-0", "shown-1"]
    assert found.groups == ("",) and torch.equal(
        found.edits[0].example_pairs, found.edits[0].test_pairs
    )
    with pytest.raises(InvalidImageError):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="lists no edit"):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("[1]")
    with pytest.raises(InvalidArgumentError, match="is no list of"):
        load_edit_benchmark(tmp_path, 16)
