"""Before/after pairs of the avatar world: exact edits, their instructions, and what is held out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data_builder.avatars.benchmarks import HELD_OUT_KINDS_GROUP, write_edit_benchmark
from data_builder.avatars.edits import (
    AttributeEdit,
    Portrait,
    make_pair,
    sample_edit,
    sample_pairs,
)
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.instructions import (
    EDIT_KINDS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_VALUE,
    build_vocabulary,
    compose_instruction,
    compose_instruction_with_undo,
    format_instruction,
)
from data_builder.avatars.pair_dataset import PairDataset, PairDatasetConfig, draw_pairs
from data_builder.avatars.rendering import render_portrait
from data_builder.avatars.vocabulary import BACKGROUND, GARMENT_COLOR, HAIR_COLOR
from data_builder.datamodules import edits as edit_datamodules
from data_builder.datamodules.edits import EditLatentDataset, PairTransferDataset
from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
from hyperlora.models.instruction_vocabulary import InstructionVocabulary
from hyperlora.prompt_blending import apply_prompt_template, parse_blend

EDIT_INDICES = range(400)
COLORS = {"hair_color": HAIR_COLOR, "garment_color": GARMENT_COLOR, "background": BACKGROUND}
Values = Sequence[tuple[str, str]]


def sample_portrait(seed: int = 3) -> Portrait:
    return sample_identity(seed), sample_scene(seed, 0)


def parse_rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_sample_edit_is_visible_and_reversible(kind: str) -> None:
    edit = sample_edit(np.random.default_rng(1), kind)
    pair = make_pair(sample_portrait(), (edit,))
    reverse_pair = make_pair(sample_portrait(), (edit.reverse(),))
    assert edit.kind == kind and edit.before != edit.after
    assert (pair.before, pair.after) == (reverse_pair.after, reverse_pair.before)
    before, after = (
        np.asarray(render_portrait(*portrait, 64)).astype(int)
        for portrait in (pair.before, pair.after)
    )
    assert (before != after).any()


def test_make_pair_changes_edited_attributes_only() -> None:
    pair = make_pair(
        sample_portrait(),
        (
            AttributeEdit("glasses", "none", "sunglasses"),
            AttributeEdit("background", "#102030", "#a0b0c0"),
        ),
    )
    (person_before, scene_before), (person_after, scene_after) = pair.before, pair.after
    assert person_before == person_after
    assert scene_after == replace(scene_before, glasses="sunglasses", background="#a0b0c0")
    assert scene_before.background == "#102030"


def test_sample_pairs_share_their_edit() -> None:
    for edit_index in range(30):
        pairs = sample_pairs("train", edit_index, 3)
        assert len({p.edits for p in pairs}) == 1
        assert len({p.before[0].seed for p in pairs}) == 3


def test_sample_pairs_of_training_hold_out_combinations() -> None:
    pairs = [sample_pairs("train", edit_index, 1)[0] for edit_index in EDIT_INDICES]
    kinds = [frozenset(edit.kind for edit in pair.edits) for pair in pairs]
    assert set(EDIT_KINDS) <= set().union(*kinds), (
        "all kinds are sampled: the network's dataset leaves the held-out ones out"
    )
    assert not set(kinds) & set(HELD_OUT_COMBINATIONS)
    values = {
        (edit.attribute, value)
        for pair in pairs
        for edit in pair.edits
        for value in (edit.before, edit.after)
    }
    assert HELD_OUT_VALUE not in values
    assert 0.1 < np.mean([len(k) > 1 for k in kinds]) < 0.3


def test_sample_pairs_keep_splits_apart() -> None:
    identities = {
        split: {pair.before[0].seed for i in range(50) for pair in sample_pairs(split, i, 2)}
        for split in SPLITS
    }
    for split, seeds in identities.items():
        assert seeds < set(SPLITS[split])


def test_format_instruction_names_the_new_value() -> None:
    assert format_instruction("glasses", "none") == "no glasses"
    assert format_instruction("facial_hair", "full beard") == "a full beard"
    assert format_instruction("background", "#ff0000").endswith("red background")
    assert format_instruction("garment_color", "blue") == "blue clothes"
    assert format_instruction("expression", "sad") == "sad"


def test_compose_instruction_mixes_named_colors() -> None:
    for attribute, colors in (
        ("background", BACKGROUND),
        ("garment_color", GARMENT_COLOR),
        ("hair_color", HAIR_COLOR),
    ):
        mixture = parse_blend(compose_instruction([(attribute, "#20c8f0")]))
        named = {
            format_instruction(attribute, name): parse_rgb(color) for name, color in colors.items()
        }
        assert sum(mixture.values()) == pytest.approx(1, abs=1e-3)
        assert sum(weight * named[prompt] for prompt, weight in mixture.items()) == pytest.approx(
            parse_rgb("#20c8f0"), abs=0.5
        )
        # a color's name stays as it is
        assert compose_instruction([(attribute, next(iter(colors)))]) == next(iter(named))


def test_compose_instruction_sums_the_prompts_of_edits() -> None:
    assert parse_blend(compose_instruction([("glasses", "none"), ("expression", "sad")])) == {
        "no glasses": 1,
        "sad": 1,
        "": -1,
    }
    blend = parse_blend(
        compose_instruction([("glasses", "none"), ("background", "#20c8f0"), ("expression", "sad")])
    )
    mixture = parse_blend(compose_instruction([("background", "#20c8f0")]))
    assert blend == {"no glasses": 1, "sad": 1, "": -2} | mixture


def test_compose_instruction_mixes_named_colors_on_request() -> None:
    named = parse_blend(
        compose_instruction([("hair_color", "red"), ("glasses", "none")], use_mixture=True)
    )
    assert named == parse_blend(
        compose_instruction([("hair_color", HAIR_COLOR["red"]), ("glasses", "none")])
    )


def test_compose_instruction_with_undo_negates() -> None:
    sides = (
        [("glasses", "none"), ("hair_color", "red")],
        [("glasses", "sunglasses"), ("hair_color", "#808080")],
    )
    forward, undo = (
        parse_blend(compose_instruction_with_undo(*sides, use_mixture=True, undo=is_undo))
        for is_undo in (False, True)
    )
    assert forward[""] == undo[""] == 1
    assert {k: -v for k, v in forward.items() if k} == {k: v for k, v in undo.items() if k}
    assert forward["no glasses"] == 1 and undo["back to wearing sunglasses"] == 1
    added, removed = (
        parse_blend(compose_instruction(values, use_mixture=True)) for values in sides
    )
    assert forward | {"": -1} == added | {f"back to {k}": -v for k, v in removed.items() if k}


def test_draw_pairs_writes_images_in_order(tmp_path: Path) -> None:
    config = PairDatasetConfig("validation", num_edits=3, identities_per_edit=2, size=32)
    draw_pairs(tmp_path, config, num_workers=1)
    dataset = PairDataset(tmp_path)
    assert len(dataset) == 6 and dataset.images.shape == (12, 32, 32, 3)
    last_pair = dataset.list_pairs()[5]
    assert np.array_equal(dataset.images[10], np.asarray(render_portrait(*last_pair.before, 32)))
    assert np.array_equal(dataset.images[11], np.asarray(render_portrait(*last_pair.after, 32)))


def test_pair_transfer_dataset_leaves_held_out_kinds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PairDatasetConfig("train", num_edits=60, identities_per_edit=2, size=16)
    draw_pairs(tmp_path, config, num_workers=1)
    monkeypatch.setattr(
        edit_datamodules,
        "load_cached_latents",
        lambda folder, vae: np.zeros((240, 4, 2, 2), np.float16),
    )
    dataset = PairTransferDataset(str(tmp_path), "vae", "other_identity", 0.0)
    pairs = [dataset.pairs[i] for i in dataset.train_indices]
    kinds = {edit.kind for pair in pairs for edit in pair.edits}
    assert kinds and not kinds & {"hat", "skin"}
    combinations = {frozenset(edit.attribute for edit in pair.edits) for pair in pairs}
    assert not combinations & set(HELD_OUT_COMBINATIONS)
    sample = dataset[0]
    assert sample["pairs"].shape == (1, 2, 3, 16, 16) and sample["before"].shape == (4, 2, 2)


def test_pair_transfer_dataset_mirrors_and_repeats_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PairDatasetConfig("train", num_edits=60, identities_per_edit=2, size=16)
    draw_pairs(tmp_path, config, num_workers=1)
    monkeypatch.setattr(
        edit_datamodules,
        "load_cached_latents",
        lambda folder, vae: np.zeros((240, 4, 2, 2), np.float16),
    )
    mirrored = PairTransferDataset(str(tmp_path), "vae", "mirrored", 0.0)[0]
    assert np.array_equal(mirrored["images"], mirrored["pairs"][0].flip(-1))
    unedited = PairTransferDataset(str(tmp_path), "vae", "mirrored", 1.0)[0]
    assert (
        np.array_equal(unedited["pairs"][0, 0], unedited["pairs"][0, 1])
        and unedited["instructions"] == ""
    )


def test_edit_latent_dataset_samples_undo_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PairDatasetConfig("train", num_edits=30, identities_per_edit=2, size=16)
    draw_pairs(tmp_path, config, num_workers=1)
    monkeypatch.setattr(
        edit_datamodules,
        "load_cached_latents",
        lambda folder, vae: np.zeros((120, 4, 2, 2), np.float16),
    )
    plain = EditLatentDataset(str(tmp_path), "vae", 0.0)
    assert not any("back to" in plain[i]["instructions"] for i in range(len(plain)))
    dataset = EditLatentDataset(str(tmp_path), "vae", 0.0, undo_prob=1.0)
    is_undo, has_own_value = [], []
    for i in range(len(dataset)):
        edits = [e.reverse() if i % 2 else e for e in dataset.pairs[i // 2].edits]
        blend = {k: w for k, w in parse_blend(dataset[i]["instructions"]).items() if k}
        undo = {k.removeprefix("back to "): w for k, w in blend.items() if k.startswith("back to ")}
        forward = {k: w for k, w in blend.items() if not k.startswith("back to ")}
        is_undo.append(sum(undo.values()) > 0)
        added, removed = (undo, forward) if is_undo[-1] else (forward, undo)
        # either way the base is to make this
        assert added in list_blends([(e.attribute, e.after) for e in edits])
        assert sum(removed.values()) == pytest.approx(-len(edits), abs=1e-2)
        previous_blends = list_blends([(e.attribute, e.before) for e in edits])
        has_own_value.append({k: -w for k, w in removed.items()} in previous_blends)
    assert 0.1 < np.mean(is_undo) < 0.6
    assert 0.5 < np.mean(has_own_value) < 1


def list_blends(values: Values) -> list[dict[str, float]]:
    """The blends that set the values, with names and with mixtures of colors."""
    return [
        {k: w for k, w in parse_blend(compose_instruction(values, use_mixture)).items() if k}
        for use_mixture in (False, True)
    ]


def test_write_edit_benchmark_covers_all_kinds(tmp_path: Path) -> None:
    write_edit_benchmark(tmp_path, edits_per_kind=1, num_test_pairs=2)
    benchmark = load_edit_benchmark(tmp_path, 32)
    assert {e.kind for e in benchmark.edits} >= set(EDIT_KINDS)
    assert {e.kind for e in benchmark.edits if e.group == HELD_OUT_KINDS_GROUP} == {"hat", "skin"}
    for edit in benchmark.edits:
        assert edit.example_pairs.shape == edit.test_pairs.shape == (2, 2, 3, 32, 32)
        assert edit.instruction and (edit.test_pairs[:, 0] != edit.test_pairs[:, 1]).any()
        assert bool(edit.blend) == edit.kind.startswith("exact ")
    assert next(e for e in benchmark.edits if e.kind == "glasses").truth.keys() == {"glasses"}
    reduced = load_edit_benchmark(tmp_path, 32, max_edits_per_group=1)
    assert len(reduced.edits) == len(benchmark.groups)


@pytest.mark.parametrize("use_mixture", [False, True], ids=["named", "mixed"])
def test_vocabulary_encodes_every_instruction(use_mixture: bool) -> None:
    vocabulary = InstructionVocabulary.from_config(build_vocabulary())
    assert vocabulary.undo_prompts == [
        apply_prompt_template(prompt, "back to {}") for prompt in vocabulary.prompts
    ]
    assert not {"hat", "skin"} & set(vocabulary.categories)
    assert "negative style" not in vocabulary.prompts
    pairs = [pair for n in range(300) for pair in sample_pairs("train", n, 1)]
    new_values = [{e.attribute: e.after for e in pair.edits} for pair in pairs]
    seen_values = [values for values in new_values if not {"hat", "skin"} & set(values)]
    targets = vocabulary.encode(
        [compose_instruction(list(values.items()), use_mixture) for values in seen_values]
    )
    for i, values in enumerate(seen_values):
        categories = {
            name: vocabulary.categories[name][class_index - 1]
            for name, class_index in zip(
                vocabulary.categories, targets.categories[i].tolist(), strict=True
            )
            if class_index
        }
        assert categories == {
            k: format_instruction(k, v) for k, v in values.items() if k not in COLORS
        }
        for attribute, points in zip(vocabulary.color_axes, targets.points, strict=True):
            if attribute not in values:
                assert points[i].isnan().all()
                continue
            color = COLORS[attribute].get(values[attribute], values[attribute])
            assert (points[i] * 255).tolist() == pytest.approx(parse_rgb(color), abs=1)


def test_vocabulary_and_edit_base_agree_on_both_directions() -> None:
    vocabulary = InstructionVocabulary.from_config(build_vocabulary())
    for edit_index in range(60):
        (pair,) = sample_pairs("train", edit_index, 1)
        after = [(e.attribute, e.after) for e in pair.edits]
        before = [(e.attribute, e.before) for e in pair.edits]
        if {"hat", "skin"} & {attribute for attribute, _ in after}:
            continue
        weights_after, weights_before = (
            vocabulary.compute_prompt_weights(
                make_logits(vocabulary, compose_instruction(values, use_mixture=True))
            )[0].tolist()
            for values in (after, before)
        )
        predicted: dict[str, float] = {}
        weighted_prompts = zip(
            [*vocabulary.prompts, *vocabulary.undo_prompts],
            [*weights_after, *(-weight for weight in weights_before)],
            strict=True,
        )
        for prompt, prompt_weight in weighted_prompts:
            for part, weight in parse_blend(prompt).items():
                predicted[part] = predicted.get(part, 0.0) + prompt_weight * weight
        expected = parse_blend(compose_instruction_with_undo(after, before, use_mixture=True))
        for part in {*predicted, *expected} - {""}:
            assert predicted.get(part, 0.0) == pytest.approx(expected.get(part, 0.0), abs=0.01), (
                part
            )


def make_logits(vocabulary: InstructionVocabulary, instruction: str) -> Tensor:
    """Logits [1, sum(logit_sizes)] that stand for this instruction."""
    targets = vocabulary.encode([instruction])
    category_logits = [
        20.0 * one_hot(targets.categories[:, i], 1 + len(prompts))
        for i, prompts in enumerate(vocabulary.categories.values())
    ]
    color_logits = [
        torch.cat([torch.where(points[:, :1].isnan(), -20.0, 20.0), points.nan_to_num()], 1)
        for points in targets.points
    ]
    return torch.cat([*category_logits, *color_logits], 1)
