"""Before/after pairs of the avatar world: exact, the same on everyone, and what is held out stays out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from data_builder.avatars.benchmarks import HELD_OUT_KINDS_GROUP, write_edit_benchmark
from data_builder.avatars.edits import AttributeEdit, make_pair, sample_edit, sample_pairs
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
from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
from hyperlora.models.instruction_vocabulary import InstructionVocabulary
from hyperlora.prompt_blending import apply_prompt_template, parse_blend

GROUPS = range(400)


def portrait(seed=3):
    return sample_identity(seed), sample_scene(seed, 0)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_kind_is_visible_and_undone_by_its_reverse(kind):
    made = sample_edit(np.random.default_rng(1), kind)
    drawn = make_pair(portrait(), (made,))
    back = make_pair(portrait(), (made.reverse(),))
    assert made.kind == kind and made.before != made.after
    assert (drawn.before, drawn.after) == (back.after, back.before)
    before, after = (
        np.asarray(render_portrait(*p, 64)).astype(int) for p in (drawn.before, drawn.after)
    )
    assert (before != after).any()


def test_a_pair_differs_in_what_changed_only():
    drawn = make_pair(
        portrait(),
        (
            AttributeEdit("glasses", "none", "sunglasses"),
            AttributeEdit("background", "#102030", "#a0b0c0"),
        ),
    )
    (who, before), (same, after) = drawn.before, drawn.after
    assert who == same
    assert after == replace(before, glasses="sunglasses", background="#a0b0c0")
    assert before.background == "#102030"


def test_the_same_change_on_all_people_of_a_group():
    for group in range(30):
        drawn = sample_pairs("train", group, 3)
        assert len({p.edits for p in drawn}) == 1 and len({p.before[0].seed for p in drawn}) == 3


def test_training_pairs_hold_nothing_that_is_held_out():
    drawn = [sample_pairs("train", group, 1)[0] for group in GROUPS]
    kinds = [frozenset(c.kind for c in p.edits) for p in drawn]
    assert set(EDIT_KINDS) <= set().union(*kinds), (
        "all kinds are drawn: the network's data leaves the unseen ones out"
    )
    assert not set(kinds) & set(HELD_OUT_COMBINATIONS)
    values = {(c.attribute, v) for p in drawn for c in p.edits for v in (c.before, c.after)}
    assert HELD_OUT_VALUE not in values
    assert 0.1 < np.mean([len(k) > 1 for k in kinds]) < 0.3


def test_people_of_splits_are_apart():
    people = {
        split: {p.before[0].seed for group in range(50) for p in sample_pairs(split, group, 2)}
        for split in SPLITS
    }
    for split, seeds in people.items():
        assert seeds < set(SPLITS[split])


def test_words_name_what_becomes():
    assert format_instruction("glasses", "none") == "no glasses"
    assert format_instruction("facial_hair", "full beard") == "a full beard"
    assert format_instruction("background", "#ff0000").endswith("red background")
    assert format_instruction("garment_color", "blue") == "blue clothes"
    assert format_instruction("expression", "sad") == "sad"


def test_what_has_no_name_is_asked_for_as_a_mixture_of_named_colours():
    for attribute, colors in (
        ("background", BACKGROUND),
        ("garment_color", GARMENT_COLOR),
        ("hair_color", HAIR_COLOR),
    ):
        mixture = parse_blend(compose_instruction([(attribute, "#20c8f0")]))
        named = {format_instruction(attribute, name): rgb(color) for name, color in colors.items()}
        assert sum(mixture.values()) == pytest.approx(1, abs=1e-3)
        assert sum(w * named[words] for words, w in mixture.items()) == pytest.approx(
            rgb("#20c8f0"), abs=0.5
        )
        assert compose_instruction([(attribute, next(iter(colors)))]) == next(
            iter(named)
        )  # a name is itself


def test_several_changes_are_asked_for_as_the_sum_of_their_words():
    assert parse_blend(compose_instruction([("glasses", "none"), ("expression", "sad")])) == {
        "no glasses": 1,
        "sad": 1,
        "": -1,
    }
    three = parse_blend(
        compose_instruction([("glasses", "none"), ("background", "#20c8f0"), ("expression", "sad")])
    )
    alone = parse_blend(compose_instruction([("background", "#20c8f0")]))
    assert three == {"no glasses": 1, "sad": 1, "": -2} | alone


def test_the_negative_of_a_change_asks_for_what_was_there():
    changes = (
        [("glasses", "none"), ("hair_color", "red")],
        [("glasses", "sunglasses"), ("hair_color", "#808080")],
    )
    do, undo = (
        parse_blend(compose_instruction_with_undo(*changes, use_mixture=True, undo=way))
        for way in (False, True)
    )
    assert do[""] == undo[""] == 1
    assert {k: -v for k, v in do.items() if k} == {k: v for k, v in undo.items() if k}
    assert do["no glasses"] == 1 and undo["back to wearing sunglasses"] == 1
    asks, takes = (parse_blend(compose_instruction(values, use_mixture=True)) for values in changes)
    assert do | {"": -1} == asks | {f"back to {k}": -v for k, v in takes.items() if k}


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def test_drawn_pairs_on_disk(tmp_path):
    plan = PairDatasetConfig("validation", num_edits=3, identities_per_edit=2, size=32)
    draw_pairs(tmp_path, plan, num_workers=1)
    drawn = PairDataset(tmp_path)
    assert len(drawn) == 6 and drawn.images.shape == (12, 32, 32, 3)
    last = drawn.list_pairs()[5]
    assert np.array_equal(drawn.images[10], np.asarray(render_portrait(*last.before, 32)))
    assert np.array_equal(drawn.images[11], np.asarray(render_portrait(*last.after, 32)))


def test_the_training_set_of_pair_networks_leaves_unseen_kinds_out(tmp_path, monkeypatch):
    from data_builder.datamodules import edits

    draw_pairs(
        tmp_path,
        PairDatasetConfig("train", num_edits=60, identities_per_edit=2, size=16),
        num_workers=1,
    )
    monkeypatch.setattr(
        edits, "latents_of", lambda folder, vae: np.zeros((240, 4, 2, 2), np.float16)
    )
    shown = edits._PairTransferDataset(str(tmp_path), "vae", "other", 0.0)
    kinds = {c.kind for i in shown.train_indices for c in shown.pairs[i].edits}
    assert kinds and not kinds & {"hat", "skin"}
    together = {frozenset(c.attribute for c in shown.pairs[i].edits) for i in shown.train_indices}
    assert not together & set(HELD_OUT_COMBINATIONS)
    item = shown[0]
    assert item["pairs"].shape == (1, 2, 3, 16, 16) and item["before"].shape == (4, 2, 2)
    mirrored = edits._PairTransferDataset(str(tmp_path), "vae", "mirrored", 0.0)[0]
    assert np.array_equal(mirrored["images"], mirrored["pairs"][0].flip(-1))
    nothing = edits._PairTransferDataset(str(tmp_path), "vae", "mirrored", 1.0)[0]
    assert (
        np.array_equal(nothing["pairs"][0, 0], nothing["pairs"][0, 1])
        and nothing["instructions"] == ""
    )


def test_the_edit_base_is_told_as_loras_tell_it(tmp_path, monkeypatch):
    from data_builder.datamodules import edits

    draw_pairs(
        tmp_path,
        PairDatasetConfig("train", num_edits=30, identities_per_edit=2, size=16),
        num_workers=1,
    )
    monkeypatch.setattr(
        edits, "latents_of", lambda folder, vae: np.zeros((120, 4, 2, 2), np.float16)
    )
    plain = edits._EditLatentDataset(str(tmp_path), "vae", 0.0)
    assert not any("back to" in plain[i]["instructions"] for i in range(len(plain)))
    edits = edits._EditLatentDataset(str(tmp_path), "vae", 0.0, undo_prob=1.0)
    ways, own = [], []
    for number in range(len(edits)):
        changes = [c.reverse() if number % 2 else c for c in edits.pairs[number // 2].edits]
        told = {k: w for k, w in parse_blend(edits[number]["instructions"]).items() if k}
        back = {k.removeprefix("back to "): w for k, w in told.items() if k.startswith("back to ")}
        there = {k: w for k, w in told.items() if not k.startswith("back to ")}
        undo = sum(back.values()) > 0
        wanted, taken = (back, there) if undo else (there, back)
        assert wanted in said(
            [(c.attribute, c.after) for c in changes]
        )  # either way the base is to make this
        assert sum(taken.values()) == pytest.approx(-len(changes), abs=1e-2)
        ways.append(undo)
        own.append(
            {k: -w for k, w in taken.items()} in said([(c.attribute, c.before) for c in changes])
        )
    assert 0.1 < np.mean(ways) < 0.6
    assert 0.5 < np.mean(own) < 1


def said(values):
    """What asks for the values, with names and with mixtures of colours."""
    return [
        {k: w for k, w in parse_blend(compose_instruction(values, mixed)).items() if k}
        for mixed in (False, True)
    ]


def test_the_benchmark_of_edits(tmp_path):
    write_edit_benchmark(tmp_path, edits_per_kind=1, num_test_pairs=2)
    found = load_edit_benchmark(tmp_path, 32)
    assert {e.kind for e in found.edits} >= set(EDIT_KINDS)
    assert {e.kind for e in found.edits if e.group == HELD_OUT_KINDS_GROUP} == {"hat", "skin"}
    for edit in found.edits:
        assert edit.example_pairs.shape == (2, 2, 3, 32, 32) and edit.test_pairs.shape == (
            2,
            2,
            3,
            32,
            32,
        )
        assert edit.instruction and (edit.test_pairs[:, 0] != edit.test_pairs[:, 1]).any()
        assert bool(edit.blend) == edit.kind.startswith("exact ")
    assert next(e for e in found.edits if e.kind == "glasses").truth.keys() == {"glasses"}
    assert len(load_edit_benchmark(tmp_path, 32, max_edits_per_group=1).edits) == len(found.groups)


def test_a_colour_with_a_name_may_be_a_mixture_too():
    named = parse_blend(
        compose_instruction([("hair_color", "red"), ("glasses", "none")], use_mixture=True)
    )
    assert named == parse_blend(
        compose_instruction([("hair_color", HAIR_COLOR["red"]), ("glasses", "none")])
    )


COLOURS = {"hair_color": HAIR_COLOR, "garment_color": GARMENT_COLOR, "background": BACKGROUND}


@pytest.mark.parametrize("mixed", [False, True], ids=["named", "mixed"])
def test_the_vocabulary_reads_what_every_change_is_called(mixed):
    words = InstructionVocabulary.from_config(build_vocabulary())
    assert words.undo_prompts == [
        apply_prompt_template(prompt, "back to {}") for prompt in words.prompts
    ]
    assert not {"hat", "skin"} & set(words.categories) and "negative style" not in words.prompts
    drawn = [made for n in range(300) for made in sample_pairs("train", n, 1)]
    afters = [{c.attribute: c.after for c in made.edits} for made in drawn]
    seen = [after for after in afters if not {"hat", "skin"} & set(after)]
    meant = words.encode([compose_instruction(list(after.items()), mixed) for after in seen])
    for i, after in enumerate(seen):
        said = {
            k: words.categories[k][j - 1]
            for k, j in zip(words.categories, meant.categories[i].tolist(), strict=True)
            if j
        }
        assert said == {k: format_instruction(k, v) for k, v in after.items() if k not in COLOURS}
        for attribute, points in zip(words.color_axes, meant.points, strict=True):
            if attribute not in after:
                assert points[i].isnan().all()
                continue
            colour = COLOURS[attribute].get(after[attribute], after[attribute])
            assert (points[i] * 255).tolist() == pytest.approx(rgb(colour), abs=1)


def test_a_network_says_of_both_ways_what_the_edit_base_is_told():
    words = InstructionVocabulary.from_config(build_vocabulary())
    for number in range(60):
        (made,) = sample_pairs("train", number, 1)
        sides = [
            [(c.attribute, getattr(c, side)) for c in made.edits] for side in ("after", "before")
        ]
        if {"hat", "skin"} & {attribute for attribute, _ in sides[0]}:
            continue
        wanted, there = (
            words.compute_prompt_weights(
                numbers(words, compose_instruction(side, use_mixture=True))
            )[0].tolist()
            for side in sides
        )
        parts: dict[str, float] = {}
        said = zip(
            [*words.prompts, *words.undo_prompts], [*wanted, *(-w for w in there)], strict=True
        )
        for prompt, weight in said:
            for part, share in parse_blend(prompt).items():
                parts[part] = parts.get(part, 0.0) + weight * share
        told = parse_blend(compose_instruction_with_undo(*sides, use_mixture=True))
        for part in {*parts, *told} - {""}:
            assert parts.get(part, 0.0) == pytest.approx(told.get(part, 0.0), abs=0.01), part


def numbers(words, prompt):
    """What a network says that means this prompt, [1, numbers]."""
    meant = words.meant([prompt])
    named = [
        20.0 * one_hot(meant.choices[:, i], 1 + len(v))
        for i, v in enumerate(words.choices.values())
    ]
    mixed = [
        torch.cat([torch.where(p[:, :1].isnan(), -20.0, 20.0), p.nan_to_num()], 1)
        for p in meant.points
    ]
    return torch.cat([*named, *mixed], 1)
