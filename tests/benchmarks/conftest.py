"""Tiny data sets and models that the programs of ``benchmarks/`` can read."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

TINY_BACKBONE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


class Builds(NamedTuple):
    """Folders of two builds of four LoRAs each, of the base of the tiny bundle."""

    train: Path
    others: Path


@pytest.fixture(scope="session")
def builds(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    from data_builder.build.make_plan import make_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.build.run import run_build
    from data_builder.sources.sources import AvatarSource

    recipe = Recipe(
        str(bundle.base), preset="attention", rank=2, finetune_steps=1, subjects_per_batch=4
    )
    root = tmp_path_factory.mktemp("builds")
    for name, first_seed in (("train", 0), ("others", 1_000_000)):
        source = AvatarSource(first_seed, first_seed + 4, portraits_per_identity=2, resolution=16)
        write_plan(make_plan(source, recipe), root / name)
        run_build(root / name)
    return Builds(root / "train", root / "others")


@pytest.fixture(scope="session")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_builder.avatars.portrait_dataset import PortraitDatasetConfig, draw_portraits

    folder = tmp_path_factory.mktemp("portraits")
    config = PortraitDatasetConfig("validation", 3, portraits_per_identity=2, size=128)
    draw_portraits(folder, config, num_workers=1)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_builder.avatars.pair_dataset import PairDatasetConfig, draw_pairs

    folder = tmp_path_factory.mktemp("pairs")
    draw_pairs(folder, PairDatasetConfig("validation", num_edits=4, size=32), num_workers=1)
    return folder


@pytest.fixture(scope="session")
def avatar_evaluator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained classifier of all attributes of avatars."""
    from data_builder.datamodules.portraits import ATTRIBUTES
    from hyperlora.encoders.attribute_classifier import AttributeClassifier

    folder = tmp_path_factory.mktemp("evaluator")
    AttributeClassifier(
        "vit_tiny_patch16_224", 16, ATTRIBUTES, [], 8, TINY_BACKBONE, (0.1, 0.9)
    ).save_pretrained(folder)
    return folder
