"""What the scores of edits say of results that are known."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.errors import BadImage, BadRequest
from hyperlora.evaluation.edit_benchmark import EditBenchmark, load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import METRICS, EditJudge
from hyperlora.evaluation.edit_report import edit_markdown, edits_as_json, write_edit_report
from hyperlora.evaluation.edit_suite import edit_rows, pair_loras, undone
from hyperlora.pipelines.pair_to_lora import PairToLora


@pytest.fixture(scope="module")
def judge(bundle: Any) -> EditJudge:
    base = load_base(bundle.edit_base)
    benchmark = load_edit_benchmark(bundle.edit_benchmark, base.resolution)
    return EditJudge(base, Reader.from_pretrained(bundle.evaluator), benchmark, steps=2, batch_size=3)


def test_the_answer_itself_is_perfect(judge: EditJudge) -> None:
    row = judge.scored("answer", judge.answers)
    assert row.score("made").mean == pytest.approx(1)
    assert row.score("preservation").mean == 1
    assert row.score("outside").mean == pytest.approx(0, abs=1e-6)
    assert row.score("leakage").mean == pytest.approx(0, abs=1e-6)
    assert row.score("psnr").mean == pytest.approx(80)
    assert row.score("accuracy", "seen kinds").mean == 1, "no attribute names it, and all of the way is gone"


def test_copies_are_told(judge: EditJudge) -> None:
    copy = judge.scored("copy of B", judge.before)
    assert copy.score("made").mean == pytest.approx(0, abs=1e-6)
    assert copy.score("accuracy", "seen kinds").mean == 0
    shown = torch.cat([e.shown[0, 1].expand(len(e.others), -1, -1, -1) for e in judge.benchmark.edits])
    assert judge.scored("copy of A'", shown).score("leakage").mean > 0


def test_every_control_is_in_the_table(judge: EditJudge, bundle: Any, tmp_path: Any) -> None:
    model = PairToLora.from_pretrained(bundle.pair_model, base=judge.base)
    rows = list(edit_rows(judge, model, fit_steps=2))
    names = [row.name for row in rows]
    for part in ("autoencoder", "copy of B", "copy of A'", "no LoRA", "words", "one pair", "2 pairs", "another", "mean",
                 "fitted to the pair, 2 steps", "one pair, the rest kept"):  # fmt: skip
        assert any(part in name for name in names), part
    lora, seconds = pair_loras(model, judge.benchmark, 1)
    assert len(lora) == 2 and seconds > 0
    back = undone(judge, model)
    assert back.turned.mean == pytest.approx(back.undone.mean, abs=1e-6)  # antisymmetric: the pair turned round is -Δ
    write_edit_report(tmp_path / "report", rows, back)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| -Δ, the rest kept |" in text and f"{back.undone.mean / back.round_trip.mean:.2f} ×" in text
    assert text.startswith(edit_markdown(rows, back)) and "**unseen kinds** (1 edits)" in text
    assert (tmp_path / "report" / "sheet.png").stat().st_size > 1000
    told = edits_as_json(rows, back)
    assert told["edits"] == 2 and set(told["rows"][0]["groups"]["seen kinds"]) == set(METRICS)  # type: ignore[index]


def test_an_edit_for_each_of_its_pictures(judge: EditJudge, bundle: Any) -> None:
    """Batches cut across edits: the result is as if each edit had been alone."""
    model = PairToLora.from_pretrained(bundle.pair_model, base=judge.base)
    lora = pair_loras(model, judge.benchmark, 1)[0] * 20
    together = judge.edited("all", lora, judge.before)
    from hyperlora.diffusion.image_editing import apply_edit

    for i, edit in enumerate(judge.benchmark.edits):
        seeds = [1000 + 2 * i, 1001 + 2 * i]
        from hyperlora.data.images import pixels_of

        alone = pixels_of(apply_edit(judge.base, edit.others[:, 0], lora[i], seeds=seeds, steps=2))
        assert (alone - together[2 * i : 2 * i + 2]).abs().max() <= 2.1 / 255


def test_what_no_attribute_names_must_be_made(judge: EditJudge) -> None:
    """Of an edit of two only one of which is named: reading that one right is not enough."""
    edit = judge.benchmark.edits[0]
    before = judge._classes(edit.others[:1, 0])
    attribute = next(name for name in before if before[name][0] == judge._classes(edit.others[:1, 1])[name][0])
    truth = {attribute: judge.reader.attributes[attribute][before[attribute][0]]}
    for kind, unmade in ((attribute, 1.0), (f"{attribute} + tone", 0.0)):
        told = replace(edit, others=edit.others[:1], kind=kind, truth=truth)
        alone = EditJudge(judge.base, judge.reader, EditBenchmark((told,)), judge.steps)
        assert alone.scored("the answers", alone.answers).values["accuracy"].item() == 1
        assert alone.scored("as they were", alone.before).values["accuracy"].item() == unmade


def test_any_folder_of_pairs(bundle: Any, tmp_path: Any) -> None:
    found = load_edit_benchmark(bundle.edit_benchmark / "darker", 16)
    assert [e.name for e in found.edits] == ["other-0", "other-1", "shown-0", "shown-1"]
    assert found.groups == ("",) and torch.equal(found.edits[0].shown, found.edits[0].others)
    with pytest.raises(BadImage):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("{}")
    with pytest.raises(BadRequest, match="lists no edit"):
        load_edit_benchmark(tmp_path, 16)
    (tmp_path / "edits.json").write_text("[1]")
    with pytest.raises(BadRequest, match="is no list of"):
        load_edit_benchmark(tmp_path, 16)
