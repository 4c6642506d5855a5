"""Run configurations, and what they need, once per test session."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.training.cli import train
from tests.tiny_pipelines.base import SIDE
from tests.training.config_rules import RULES, get_run_dir, make_command


@dataclass(frozen=True)
class Run:
    """Training losses per step, and all parameters after steps 2 and 4."""

    losses: dict[int, dict[str, float]]
    states: dict[int, dict[str, Tensor]]


class Stages:
    """Runs each configuration with what it needs, once."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.prepared: set[str] = set()

    def prepare(self, name: str) -> None:
        if name in RULES:
            self.run(name)
        elif name not in self.prepared:
            PREPARATIONS[name]()
            self.prepared.add(name)

    def run(self, name: str) -> Run:
        """Four steps without a break."""
        if name not in self.runs:
            for need in RULES[name].needs:
                self.prepare(need)
            train(make_command(name))
            self.runs[name] = Run(read_losses(name), read_states(name))
        return self.runs[name]

    def resume(self, name: str) -> Run:
        """The last two of four steps again, from the checkpoint after two."""
        folder = get_run_dir(name)
        (checkpoint,) = folder.glob("*step=2.ckpt")
        checkpoint.rename(folder / "half.ckpt")
        for other in [*folder.glob("*step=*.ckpt"), folder / "last.ckpt"]:
            other.unlink()
        train([*make_command(name), f"--ckpt_path={folder / 'half.ckpt'}"])
        return Run(read_losses(name), read_states(name))


def read_states(name: str) -> dict[int, dict[str, Tensor]]:
    """The parameters by global step, from the checkpoints of the latest run."""
    states = {}
    for path in get_run_dir(name).glob("*step=*.ckpt"):
        checkpoint = torch.load(path, weights_only=False)
        # with averaged weights, "state_dict" holds the average
        states[checkpoint["global_step"]] = checkpoint.get(
            "current_model_state", checkpoint["state_dict"]
        )
    return states


def read_losses(name: str) -> dict[int, dict[str, float]]:
    """The training metrics by step, from the log of the latest run."""
    logs_dir = get_run_dir(name) / "lightning_logs"
    version_dir = max(logs_dir.iterdir(), key=lambda path: int(path.name.split("_")[1]))
    losses = {}
    with (version_dir / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if metrics := {k: float(v) for k, v in row.items() if k.startswith("train/") and v}:
                losses[int(row["step"])] = metrics
    return losses


def _draw_portraits() -> None:
    from data_builder.avatars.portrait_dataset import PortraitDatasetConfig, draw_portraits

    for folder, split, num_identities in (("train", "train", 12), ("validation", "validation", 4)):
        config = PortraitDatasetConfig(split, num_identities, portraits_per_identity=4, size=32)
        draw_portraits(Path("runs/data") / folder, config, num_workers=1)


def _build_tokenizer() -> None:
    from data_builder.avatars.tokenizer import build_tokenizer

    build_tokenizer(Path("runs/avatars/tokenizer"))


def _fit_lidb_targets() -> None:
    from data_builder.baselines.lidb_targets import LidbTargetConfig, fit_lidb_targets

    config = LidbTargetConfig(num_subjects=6, subjects_per_batch=6, finetune_steps=1)
    fit_lidb_targets(
        Path("runs/data/train"),
        "checkpoints/avatars/base",
        "runs/avatars/02_vae_refine/vae",
        Path("runs/avatars/lidb-targets.safetensors"),
        config,
    )


def _draw_pairs() -> None:
    from data_builder.avatars.pair_dataset import PairDatasetConfig, draw_pairs

    configs = {
        "edits": PairDatasetConfig("train", num_edits=12, size=32),
        "edits-of-three": PairDatasetConfig("train", num_edits=8, identities_per_edit=3, size=32),
        "edits-two": PairDatasetConfig(
            "train", num_edits=8, identities_per_edit=3, size=32, two_edit_fraction=1.0
        ),
        "edits-validation": PairDatasetConfig("validation", num_edits=6, size=32),
    }
    for folder, config in configs.items():
        draw_pairs(Path("runs/data") / folder, config, num_workers=1)


def _build_loras(*folders: str) -> None:
    """Fit LoRAs of drawn training people and, in the second folder, of validation people."""
    from data_builder.build.make_plan import make_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.build.run import run_build
    from data_builder.sources.sources import AvatarSource

    recipe = Recipe(
        "checkpoints/avatars/base",
        preset="attention",
        rank=1,
        init="zero",  # factors of each subject: LoRAs differ even where no step is an improvement
        finetune_steps=1,
        subjects_per_batch=4,
    )
    for folder, first in zip(folders, (0, 1_000_000), strict=True):
        source = AvatarSource(first, first + 4, portraits_per_identity=2)
        build_dir = Path("runs/avatars") / folder
        write_plan(make_plan(source, recipe), build_dir)
        run_build(build_dir)


def _build_photo_loras(name: str) -> None:
    """Fit LoRAs of folders of photos to a tiny base."""
    from data_builder.build.make_plan import make_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.build.run import run_build
    from data_builder.sources.sources import FolderSource

    recipe = Recipe(
        f"tiny/{name}",
        preset="attention",
        rank=1,
        init="zero",
        finetune_steps=1,
        subjects_per_batch=4,
        variant="fp16" if any(Path(f"tiny/{name}").rglob("*.fp16.*")) else None,
    )
    build_dir = Path(f"runs/{name}/build")
    write_plan(make_plan(FolderSource("photos/train"), recipe, val_fraction=0.5), build_dir)
    # a tiny transformer does not know its size, and would be fitted at 1024 pixels
    with patch.object(DiffusionBase, "resolution", SIDE):
        run_build(build_dir)


def _fit_pca() -> None:
    from hyperlora.data.lora_dataset import LoraDataset
    from hyperlora.pipelines.lora_codec import LoraCodec

    data = LoraDataset("runs/avatars/build", "train")
    codec = LoraCodec.fit_pca(data, 2, 2, components_per_factor=2)
    codec.save_pretrained("runs/avatars/lora-components")


PREPARATIONS = {
    "build": partial(_build_loras, "build", "build-validation"),
    "teachers": partial(_build_loras, "teachers", "teachers-validation"),
    "lora-components": _fit_pca,
    "sd15-build": partial(_build_photo_loras, "sd15"),
    "sdxl-build": partial(_build_photo_loras, "sdxl"),
    "z_image-build": partial(_build_photo_loras, "z_image"),
    "pairs": _draw_pairs,
    "drawn": _draw_portraits,
    "tokenizer": _build_tokenizer,
    "lidb-targets": _fit_lidb_targets,
}
