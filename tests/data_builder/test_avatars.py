"""The drawn world: deterministic, its splits apart, its captions and edits true."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data_builder.avatars import vocabulary as words
from data_builder.avatars.benchmarks import SCENES, write_benchmark
from data_builder.avatars.captions import build_prompt, parse_caption_attributes, sample_caption
from data_builder.avatars.edits import EDITABLE_ATTRIBUTES, apply_edits
from data_builder.avatars.identity import SPLITS, Scene, sample_identity, sample_scene
from data_builder.avatars.landmarks import compute_landmarks
from data_builder.avatars.portrait_dataset import (
    PortraitDataset,
    PortraitDatasetConfig,
    draw_portraits,
)
from data_builder.avatars.rendering import render_portrait
from data_builder.datamodules.feature_cache import load_cached_latents
from data_builder.datamodules.portraits import ATTRIBUTES, make_attribute_labels
from hyperlora.training.auxiliary_losses import IGNORE_INDEX


def pixels(person, how, size=128):
    return np.asarray(render_portrait(person, how, size)).astype(int)


def test_same_seed_same_picture():
    assert sample_identity(7) == sample_identity(7)
    assert sample_scene(7, 3) == sample_scene(7, 3)
    assert np.array_equal(
        pixels(sample_identity(7), sample_scene(7, 3)),
        pixels(sample_identity(7), sample_scene(7, 3)),
    )


def test_splits_share_no_seed_and_people_differ():
    train, validation, test = (set(SPLITS[name]) for name in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    people = [sample_identity(seed) for split in SPLITS.values() for seed in split[:50]]
    assert len({replace(person, seed=0) for person in people}) == len(people)


@pytest.mark.parametrize("name", words.PROMPT_ATTRIBUTES)
def test_every_promptable_value_changes_the_picture(name):
    person, plain = sample_identity(3), Scene()
    drawn = {
        value: pixels(person, replace(plain, **{name: value})).tobytes()
        for value in words.PROMPT_ATTRIBUTES[name]
    }
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize(
    "name", [n for n in words.IDENTITY_ATTRIBUTES if not n.endswith("color") and n != "skin"]
)
def test_every_identity_value_changes_the_picture(name):
    person = replace(sample_identity(3), facial_hair="none")
    drawn = {
        value: pixels(replace(person, **{name: value}), Scene()).tobytes()
        for value in words.IDENTITY_ATTRIBUTES[name]
    }
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("name", words.GEOMETRY)
def test_face_geometry_is_visible(name):
    person = sample_identity(3)
    assert (
        pixels(replace(person, **{name: 0.9}), Scene())
        != pixels(replace(person, **{name: 1.15}), Scene())
    ).any()


def test_an_edit_changes_what_it_names_and_nothing_else():
    person, before = (
        sample_identity(11),
        replace(sample_scene(11, 0), glasses="none", style="plain", hat="none"),
    )
    who, after = apply_edits(person, before, glasses="sunglasses")
    assert who == person and after == replace(before, glasses="sunglasses")
    changed = (pixels(person, before) != pixels(who, after)).any(-1)
    assert 0.01 < changed.mean() < 0.2
    who, after = apply_edits(person, before, hair_color="pink", style="sepia")
    assert (who.hair_color, who.hair, after.style) == (
        "pink",
        person.hair,
        "sepia",
    ) and who.hair_rgb != person.hair_rgb


def test_only_known_attributes_can_be_edited():
    assert len(EDITABLE_ATTRIBUTES) >= 12
    with pytest.raises(ValueError, match="shoe"):
        apply_edits(sample_identity(0), Scene(), shoe="boot")


def test_captions_name_who_and_how_but_prompts_only_how():
    person, how = sample_identity(5), replace(sample_scene(5, 0), hat="none")
    text = sample_caption(person, how, np.random.default_rng(0), identity_prob=1.0)
    assert f"{person.hair} haircut" in text and f"{person.skin} skin" in text
    asked = build_prompt(how)
    assert (
        asked.startswith("a portrait of sks person, ")
        and how.expression in asked
        and f"{person.hair} haircut" not in asked
    )
    bare = sample_caption(person, how, np.random.default_rng(0), identity_prob=0.0)
    assert "skin" not in bare


def test_portraits_on_disk_are_the_drawn_ones(tmp_path):
    draw_portraits(tmp_path, PortraitDatasetConfig("validation", 3, 2, size=32), num_workers=1)
    portraits = PortraitDataset(tmp_path)
    assert len(portraits) == 6 and portraits.images.shape == (6, 32, 32, 3)
    assert np.array_equal(
        portraits.images[5],
        np.asarray(render_portrait(portraits.get_identity(5), portraits.get_scene(5), 32)),
    )
    assert portraits.get_identity(4) == portraits.get_identity(5) != portraits.get_identity(3)
    assert portraits.get_identity(0).seed in SPLITS["validation"]


def test_benchmark_has_only_test_people_and_true_prompts(tmp_path):
    write_benchmark(tmp_path, "test", num_subjects=2, photos_per_subject=2)
    names = sorted(p.name for p in (tmp_path / "subjects").iterdir())
    assert [int(name.split("-")[1]) for name in names] == list(SPLITS["test"][:2])
    assert len(SCENES) >= 8


def test_labels_are_of_what_a_caption_names_and_a_portrait_shows():
    person, how = (
        sample_identity(5),
        replace(sample_scene(5, 0), expression="sad", glasses="none", hat="none", style="plain"),
    )
    text = "a portrait of a person, sad, wearing a red hoodie"
    how = replace(how, garment="hoodie", garment_color="red")
    assert parse_caption_attributes(person, how, text) == {"expression", "garment", "garment_color"}
    labels = make_attribute_labels(person, how, parse_caption_attributes(person, how, text))
    told = {k: ATTRIBUTES[k][v] for k, v in labels.items() if v != IGNORE_INDEX}
    assert told == {"expression": "sad", "garment": "hoodie", "garment_color": "red"}
    everything = make_attribute_labels(person, replace(how, glasses="sunglasses", hat="turban"))
    assert {k for k, v in everything.items() if v == IGNORE_INDEX} == {"eyes", "hair", "hair_color"}
    assert (
        make_attribute_labels(person, replace(how, background="#123456"))["background"]
        == IGNORE_INDEX
    )


def test_captions_name_what_they_say():
    rng = np.random.default_rng(0)
    for seed in range(20):
        person, how = sample_identity(seed), sample_scene(seed, 0)
        text = sample_caption(person, how, rng, identity_prob=1.0)
        said = parse_caption_attributes(person, how, text)
        assert {"skin", "nose", "eyebrows"} <= said
        assert ("expression" in said) == (how.expression in text.split(", "))


@pytest.mark.parametrize("size", [128, 200])
def test_landmarks_are_where_eyes_and_mouth_are_drawn(size):
    """Changing eyes or mouth alone changes the picture around their keypoints, and nowhere else."""
    for seed in range(4):
        person = replace(sample_identity(seed), facial_hair="none")
        how = replace(
            sample_scene(seed, 1),
            glasses="none",
            hat="none",
            style="plain",
            eyes="open",
            expression="laughing",
        )
        truth = compute_landmarks(person, how, size)
        for change, points, ends in (
            (replace(how, eyes="surprised"), truth.keypoints[:2], (0.1, 0.1)),
            (replace(how, expression="neutral"), truth.keypoints[3:], (0.05, 0.2)),
        ):
            rows, columns = np.nonzero(
                np.abs(pixels(person, how, size) - pixels(person, change, size)).sum(-1)
            )
            assert (
                abs(columns.min() - points[0, 0]) < ends[0] * size
                and abs(columns.max() - points[1, 0]) < ends[0] * size
            )
            assert np.abs(rows - points[:, 1].mean()).max() < ends[1] * size
        left, top, right, bottom = truth.box
        assert ((truth.keypoints > (left, top)) & (truth.keypoints < (right, bottom))).all()


def test_latents_outlive_another_decoder(tmp_path: Path) -> None:
    draw_portraits(
        tmp_path / "drawn",
        PortraitDatasetConfig("train", num_identities=2, portraits_per_identity=1, size=16),
        num_workers=1,
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[8],
        norm_num_groups=4,
    )
    for name, part in (("first", None), ("decoder", vae.decoder), ("encoder", vae.encoder)):
        with torch.no_grad():
            for parameter in part.parameters() if part else ():
                parameter.add_(0.1)
        vae.save_pretrained(tmp_path / name)
    names = ("first", "decoder", "encoder")
    first, decoder, encoder = (
        np.array(load_cached_latents(tmp_path / "drawn", tmp_path / name)) for name in names
    )
    assert (first == decoder).all() and (first != encoder).any()
    assert len(list((tmp_path / "drawn").glob("latents-*.npy"))) == 2
