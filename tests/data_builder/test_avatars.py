"""The avatar world is deterministic, its splits are disjoint, and captions and edits are exact."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data_builder.avatars import vocabulary
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
from data_builder.avatars.tokenizer import build_tokenizer
from data_builder.datamodules.feature_cache import load_cached_latents
from data_builder.datamodules.portraits import ATTRIBUTES, make_attribute_labels
from hyperlora.training.auxiliary_losses import IGNORE_INDEX


def render_pixels(person, scene, size=128):
    return np.asarray(render_portrait(person, scene, size)).astype(int)


def test_render_portrait_is_deterministic():
    assert sample_identity(7) == sample_identity(7)
    assert sample_scene(7, 3) == sample_scene(7, 3)
    assert np.array_equal(
        render_pixels(sample_identity(7), sample_scene(7, 3)),
        render_pixels(sample_identity(7), sample_scene(7, 3)),
    )


def test_build_tokenizer_is_deterministic(tmp_path):
    """So that a base trained again reads a prompt as the same tokens."""
    tokenizers = [build_tokenizer(tmp_path / name) for name in ("a", "b")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    words = "person round glasses"
    assert tokenizers[0].tokenize(words) == [f"{word}</w>" for word in words.split()]


def test_splits_are_disjoint_and_identities_differ():
    train, validation, test = (set(SPLITS[name]) for name in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    identities = [sample_identity(seed) for split in SPLITS.values() for seed in split[:50]]
    assert len({replace(identity, seed=0) for identity in identities}) == len(identities)


@pytest.mark.parametrize("name", vocabulary.PROMPT_ATTRIBUTES)
def test_prompt_attributes_change_the_image(name):
    person, plain = sample_identity(3), Scene()
    images = {
        value: render_pixels(person, replace(plain, **{name: value})).tobytes()
        for value in vocabulary.PROMPT_ATTRIBUTES[name]
    }
    assert len(set(images.values())) == len(images)


@pytest.mark.parametrize(
    "name", [n for n in vocabulary.IDENTITY_ATTRIBUTES if not n.endswith("color") and n != "skin"]
)
def test_identity_attributes_change_the_image(name):
    person = replace(sample_identity(3), facial_hair="none")
    images = {
        value: render_pixels(replace(person, **{name: value}), Scene()).tobytes()
        for value in vocabulary.IDENTITY_ATTRIBUTES[name]
    }
    assert len(set(images.values())) == len(images)


@pytest.mark.parametrize("name", vocabulary.GEOMETRY)
def test_geometry_changes_the_image(name):
    person = sample_identity(3)
    assert (
        render_pixels(replace(person, **{name: 0.9}), Scene())
        != render_pixels(replace(person, **{name: 1.15}), Scene())
    ).any()


def test_apply_edits_changes_named_attributes_only():
    person, before = (
        sample_identity(11),
        replace(sample_scene(11, 0), glasses="none", style="plain", hat="none"),
    )
    edited_person, after = apply_edits(person, before, glasses="sunglasses")
    assert edited_person == person and after == replace(before, glasses="sunglasses")
    is_changed = (render_pixels(person, before) != render_pixels(edited_person, after)).any(-1)
    assert 0.01 < is_changed.mean() < 0.2
    edited_person, after = apply_edits(person, before, hair_color="pink", style="sepia")
    assert (edited_person.hair_color, edited_person.hair, after.style) == (
        "pink",
        person.hair,
        "sepia",
    ) and edited_person.hair_rgb != person.hair_rgb


def test_apply_edits_rejects_unknown_attributes():
    assert len(EDITABLE_ATTRIBUTES) >= 12
    with pytest.raises(ValueError, match="shoe"):
        apply_edits(sample_identity(0), Scene(), shoe="boot")


def test_captions_name_identity_and_prompts_do_not():
    person, scene = sample_identity(5), replace(sample_scene(5, 0), hat="none")
    text = sample_caption(person, scene, np.random.default_rng(0), identity_prob=1.0)
    assert f"{person.hair} haircut" in text and f"{person.skin} skin" in text
    prompt = build_prompt(scene)
    assert (
        prompt.startswith("a portrait of sks person, ")
        and scene.expression in prompt
        and f"{person.hair} haircut" not in prompt
    )
    anonymous = sample_caption(person, scene, np.random.default_rng(0), identity_prob=0.0)
    assert "skin" not in anonymous


def test_draw_portraits_writes_rendered_images(tmp_path):
    draw_portraits(tmp_path, PortraitDatasetConfig("validation", 3, 2, size=32), num_workers=1)
    portraits = PortraitDataset(tmp_path)
    assert len(portraits) == 6 and portraits.images.shape == (6, 32, 32, 3)
    assert np.array_equal(
        portraits.images[5],
        np.asarray(render_portrait(portraits.get_identity(5), portraits.get_scene(5), 32)),
    )
    assert portraits.get_identity(4) == portraits.get_identity(5) != portraits.get_identity(3)
    assert portraits.get_identity(0).seed in SPLITS["validation"]


def test_write_benchmark_uses_test_identities(tmp_path):
    write_benchmark(tmp_path, "test", num_subjects=2, photos_per_subject=2)
    names = sorted(p.name for p in (tmp_path / "subjects").iterdir())
    assert [int(name.split("-")[1]) for name in names] == list(SPLITS["test"][:2])
    assert len(SCENES) >= 8


def test_make_attribute_labels_ignores_unnamed_and_hidden_attributes():
    person, scene = (
        sample_identity(5),
        replace(sample_scene(5, 0), expression="sad", glasses="none", hat="none", style="plain"),
    )
    text = "a portrait of a person, sad, wearing a red hoodie"
    scene = replace(scene, garment="hoodie", garment_color="red")
    assert parse_caption_attributes(person, scene, text) == {
        "expression",
        "garment",
        "garment_color",
    }
    labels = make_attribute_labels(person, scene, parse_caption_attributes(person, scene, text))
    named = {k: ATTRIBUTES[k][v] for k, v in labels.items() if v != IGNORE_INDEX}
    assert named == {"expression": "sad", "garment": "hoodie", "garment_color": "red"}
    all_labels = make_attribute_labels(person, replace(scene, glasses="sunglasses", hat="turban"))
    assert {k for k, v in all_labels.items() if v == IGNORE_INDEX} == {"eyes", "hair", "hair_color"}
    assert (
        make_attribute_labels(person, replace(scene, background="#123456"))["background"]
        == IGNORE_INDEX
    )


def test_parse_caption_attributes_finds_named_attributes():
    rng = np.random.default_rng(0)
    for seed in range(20):
        person, scene = sample_identity(seed), sample_scene(seed, 0)
        text = sample_caption(person, scene, rng, identity_prob=1.0)
        named = parse_caption_attributes(person, scene, text)
        assert {"skin", "nose", "eyebrows"} <= named
        assert ("expression" in named) == (scene.expression in text.split(", "))


@pytest.mark.parametrize("size", [128, 200])
def test_compute_landmarks_finds_eyes_and_mouth(size):
    """Editing eyes or mouth alone changes the image around their keypoints, and nowhere else."""
    for seed in range(4):
        person = replace(sample_identity(seed), facial_hair="none")
        scene = replace(
            sample_scene(seed, 1),
            glasses="none",
            hat="none",
            style="plain",
            eyes="open",
            expression="laughing",
        )
        landmarks = compute_landmarks(person, scene, size)
        for edited_scene, points, tolerances in (
            (replace(scene, eyes="surprised"), landmarks.keypoints[:2], (0.1, 0.1)),
            (replace(scene, expression="neutral"), landmarks.keypoints[3:], (0.05, 0.2)),
        ):
            rows, columns = np.nonzero(
                np.abs(
                    render_pixels(person, scene, size) - render_pixels(person, edited_scene, size)
                ).sum(-1)
            )
            assert (
                abs(columns.min() - points[0, 0]) < tolerances[0] * size
                and abs(columns.max() - points[1, 0]) < tolerances[0] * size
            )
            assert np.abs(rows - points[:, 1].mean()).max() < tolerances[1] * size
        left, top, right, bottom = landmarks.box
        assert ((landmarks.keypoints > (left, top)) & (landmarks.keypoints < (right, bottom))).all()


def test_load_cached_latents_depends_on_encoder_only(tmp_path: Path) -> None:
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
