"""Every YAML in configs/ trains, at the size of toys: two steps, resumed to four, and what it releases loads.

A config runs in a workspace where the paths it names exist, as ``main_callback train fit --config`` would run it, with a
few arguments on the command line that make it small; configs that build on one another do so here too.
"""

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from diffusers import AutoencoderKL
from torch import Tensor

from hyperlora import pretrained as released
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.encoders.face_networks import FaceDetector, FaceRecognizer
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.training.cli import train
from hyperlora.training.modules import hypernetwork, instruct_pix2pix, pair_hypernetwork

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("**/*.yaml"))

FOUR_STEPS = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.max_steps=4",
    "--trainer.limit_train_batches=2",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks.init_args.every_n_train_steps=2",
    "--trainer.callbacks.init_args.save_top_k=-1",
]
SMALL_HYPERNETWORK = [
    f"--model.init_args.hypernetwork.{value}" for value in ("width=16", "depth=1", "heads=2")
]
SMALL_NETWORK = [
    f"--model.init_args.network.{value}" for value in ("width=16", "depth=1", "heads=2")
]
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@dataclass(frozen=True)
class Rule:
    """How one config becomes small, what it needs first, and how what it releases is loaded."""

    load: Callable[[Path], Any]
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    """Beginnings of the names of what does not learn, besides frozen encoders."""


def _for_real_base(name: str) -> Rule:
    return Rule(
        ImageToLora.from_pretrained,
        (
            f"--model.init_args.base_name_or_path=tiny/{name}",
            "--model.init_args.encoder=vit_tiny_patch16_224",
            "--model.init_args.encoder_options="
            + json.dumps({"image_size": 16, "options": TINY_VIT}),
            *SMALL_HYPERNETWORK,
            "--data.init_args.resolution=16",
            "--data.init_args.encoder_size=16",
            "--data.init_args.batch_size=2",
            "--data.init_args.num_workers=0",
        ),
    )


def _for_real_edits(*arguments: str, needs: tuple[str, ...] = ()) -> Rule:
    return Rule(
        PairToLora.from_pretrained,
        (
            "--model.init_args.base_name_or_path=tiny/ip2p",
            "--model.init_args.encoder=vit_tiny_patch16_224",
            "--model.init_args.encoder_options="
            + json.dumps({"image_size": 16, "options": TINY_VIT}),
            "--data.init_args.resolution=16",
            "--data.init_args.encoder_size=16",
            "--data.init_args.batch_size=2",
            "--data.init_args.num_workers=0",
            *arguments,
        ),
        needs,
    )


def _tiny_unet(first: int) -> tuple[str, ...]:
    return (
        f"--model.init_args.unet.block_out_channels=[{first},96,32]",
        "--model.init_args.unet.sample_size=4",
        "--data.init_args.batch_size=4",
    )


TINY_EDITS = (
    "--model.init_args.unet.block_out_channels=[64,96,16]",
    "--data.init_args.batch_size=4",
)
RULES = {
    "avatars/vae": Rule(
        AutoencoderKL.from_pretrained,
        ("--data.init_args.crop_size=16", "--data.init_args.batch_size=4"),
        ("drawn",),
    ),
    "avatars/vae_finish": Rule(
        AutoencoderKL.from_pretrained, ("--data.init_args.batch_size=4",), ("avatars/vae",)
    ),
    "avatars/vae_decoder": Rule(
        AutoencoderKL.from_pretrained,
        ("--data.init_args.batch_size=4",),
        ("avatars/base_read", "edits"),
        ("vae.encoder.", "vae.quant_conv."),
    ),
    "avatars/evaluator": Rule(
        AttributeClassifier.from_pretrained,
        ("--data.init_args.identities_per_batch=4",),
        ("drawn",),
    ),
    "avatars/encoder": Rule(
        AttributeClassifier.from_pretrained,
        ("--data.init_args.identities_per_batch=4",),
        ("drawn",),
    ),
    "avatars/face_detector": Rule(
        FaceDetector.from_pretrained,
        ("--data.init_args.batch_size=4", "--data.init_args.size=64"),
        ("drawn",),
    ),
    "avatars/face_recogniser": Rule(
        FaceRecognizer.from_pretrained, ("--data.init_args.batch_size=4",), ("drawn",)
    ),
    "avatars/latent_reader": Rule(
        AttributeClassifier.from_pretrained,
        ("--data.init_args.identities_per_batch=4", "--model.init_args.image_size=4"),
        ("avatars/vae_finish",),
    ),
    "avatars/base": Rule(load_diffusion_base, _tiny_unet(32), ("avatars/vae_finish", "tokenizer")),
    "avatars/base_finish": Rule(
        load_diffusion_base,
        (*_tiny_unet(64), "--model.init_args.unet.time_embedding_dim=128"),
        ("avatars/base",),
    ),
    "avatars/base_read": Rule(
        load_diffusion_base,
        (*_tiny_unet(64), "--model.init_args.unet.time_embedding_dim=128"),
        ("avatars/base_finish", "avatars/latent_reader"),
    ),
    "avatars/image_to_lora": Rule(
        ImageToLora.from_pretrained,
        (*SMALL_HYPERNETWORK, "--data.init_args.batch_size=2"),
        ("avatars/base_read", "avatars/encoder"),
    ),
    "avatars/hyperdreambooth": Rule(
        ImageToLora.from_pretrained,
        (*SMALL_HYPERNETWORK, "--data.init_args.batch_size=2"),
        ("avatars/base_read", "avatars/encoder", "codes"),
    ),
    "avatars/edit_base": Rule(load_diffusion_base, TINY_EDITS, ("avatars/base_read", "edits")),
    "avatars/edit_base_finish": Rule(load_diffusion_base, TINY_EDITS, ("avatars/edit_base",)),
    "avatars/pair_to_lora_words": Rule(
        PairToLora.from_pretrained,
        (*SMALL_NETWORK, "--data.init_args.batch_size=4"),
        ("avatars/edit_base_finish", "avatars/encoder"),
        ("model.network.hypernetwork.", "model.network.sites.", "model.network.wording.text_"),
    ),
    "avatars/pair_to_lora": Rule(
        PairToLora.from_pretrained,
        ("--data.init_args.batch_size=2",),
        ("avatars/pair_to_lora_words",),
        ("model.network.sites.", "model.network.wording."),
    ),
    "avatars/lora_codec": Rule(
        LoraCodec.from_pretrained,
        (
            "--model.init_args.autoencoder={channels: [4, 8], width: 4}",
            "--data.init_args.batch_size=2",
        ),
        ("avatars/base_read", "build"),
    ),
    "avatars/difflora": Rule(
        LoraDiffusion.from_pretrained,
        (
            "--model.init_args.mixture={width: 16, tokens: 4}",
            "--model.init_args.denoiser={width: 16, depth: 1, heads: 2}",
            "--data.init_args.batch_size=2",
        ),
        ("avatars/base_read", "build", "components", "avatars/encoder"),
    ),
    "ip2p/lora_of_change_pretrain": _for_real_edits(*SMALL_NETWORK),
    "ip2p/lora_of_change_finetune": _for_real_edits(
        "--data.init_args.folder=pairs/magic-brush", needs=("ip2p/lora_of_change_pretrain",)
    ),
    "sd15/hyperdreambooth": _for_real_base("sd15"),
    "sdxl/hyperdreambooth": _for_real_base("sdxl"),
}


@dataclass(frozen=True)
class Run:
    """What one training left: losses per step, and all its parameters after steps 2 and 4."""

    losses: dict[int, dict[str, float]]
    states: dict[int, dict[str, Tensor]]


class Stages:
    """Runs what a config builds on, once."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.made: set[str] = set()

    def prepare(self, name: str) -> None:
        if name in RULES:
            self.run(name)
        elif name not in self.made:
            _PREPARED[name]()
            self.made.add(name)

    def run(self, name: str) -> Run:
        """Four steps without a break."""
        if name not in self.runs:
            for need in RULES[name].needs:
                self.prepare(need)
            train(_command(name))
            self.runs[name] = Run(_losses(name), _states(name))
        return self.runs[name]

    def resume(self, name: str) -> Run:
        """The last two of four steps again, from the checkpoint after two."""
        folder = _folder(name)
        (two,) = folder.glob("*step=2.ckpt")
        two.rename(folder / "half.ckpt")
        for checkpoint in [*folder.glob("*step=*.ckpt"), folder / "last.ckpt"]:
            checkpoint.unlink()
        train([*_command(name), f"--ckpt_path={folder / 'half.ckpt'}"])
        return Run(_losses(name), _states(name))


def _draw() -> None:
    from data_builder.avatars.portrait_dataset import PortraitDatasetConfig, draw_portraits

    draw_portraits(
        Path("runs/data/train"),
        PortraitDatasetConfig("train", num_identities=12, portraits_per_identity=4, size=32),
        num_workers=1,
    )
    draw_portraits(
        Path("runs/data/validation"),
        PortraitDatasetConfig("validation", num_identities=4, portraits_per_identity=4, size=32),
        num_workers=1,
    )


def _build_tokenizer() -> None:
    from data_builder.avatars.tokenizer import build_tokenizer

    build_tokenizer(Path("runs/avatars/tokenizer"))


def _fit_codes() -> None:
    from data_builder.baselines.lidb_targets import fit_lidb_targets

    fit_lidb_targets(
        Path("runs/data/train"),
        "checkpoints/avatars/base",
        "runs/avatars/base/vae",
        Path("runs/avatars/codes.safetensors"),
        num_subjects=6,
        subjects_per_batch=6,
        steps=1,
        lr=1e-2,
        preset="attention+mlp",
        rank=1,
        a=100,
        b=50,
    )


def _draw_edits() -> None:
    from data_builder.avatars.pair_dataset import PairDatasetConfig, draw_pairs

    draw_pairs(
        Path("runs/data/edits"), PairDatasetConfig("train", num_edits=12, size=32), num_workers=1
    )
    draw_pairs(
        Path("runs/data/edits-of-three"),
        PairDatasetConfig("train", num_edits=8, identities_per_edit=3, size=32),
        num_workers=1,
    )
    draw_pairs(
        Path("runs/data/edits-two"),
        PairDatasetConfig(
            "train", num_edits=8, identities_per_edit=3, size=32, two_edit_fraction=1.0
        ),
        num_workers=1,
    )
    draw_pairs(
        Path("runs/data/edits-validation"),
        PairDatasetConfig("validation", num_edits=6, size=32),
        num_workers=1,
    )


def _build_loras() -> None:
    from data_builder.build.make_plan import make_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.build.run import run_build
    from data_builder.sources.sources import AvatarSource

    for name, first in (("build", 0), ("build-validation", 1_000_000)):
        recipe = Recipe(
            "checkpoints/avatars/base",
            preset="attention",
            rank=1,
            finetune_steps=1,
            subjects_per_batch=4,
        )
        write_plan(
            make_plan(
                AvatarSource(first, first + 4, portraits_per_identity=2, resolution=16), recipe
            ),
            Path("runs/avatars") / name,
        )
        run_build(Path("runs/avatars") / name)


def _learn_components() -> None:
    from hyperlora.data.lora_dataset import LoraDataset
    from hyperlora.pipelines.lora_codec import LoraCodec

    data = LoraDataset("runs/avatars/build", "train")
    LoraCodec.fit_pca(data, 2, 2, components_per_factor=2).save_pretrained(
        "runs/avatars/lora-components"
    )


_PREPARED = {
    "build": _build_loras,
    "edits": _draw_edits,
    "drawn": _draw,
    "tokenizer": _build_tokenizer,
    "codes": _fit_codes,
    "components": _learn_components,
}


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


@pytest.fixture(autouse=True)
def frozen_bases(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Run in the workspace, and keep the bases that were trained through, each with its name and options."""
    monkeypatch.chdir(workspace)
    loaded: list[tuple[Any, Any]] = []

    def load(name: str, **options: Any) -> Any:
        base = load_diffusion_base(name, **options)
        loaded.append((base, load_diffusion_base(name, **options)))
        return base

    for module in (hypernetwork, pair_hypernetwork, instruct_pix2pix):
        monkeypatch.setattr(module, "load_base", load)
    return loaded


def test_every_config_has_a_rule() -> None:
    assert set(NAMES) == set(RULES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
@pytest.mark.parametrize("name", NAMES)
def test_config_trains_and_resumes(
    name: str, stages: Stages, frozen_bases: list[tuple[Any, Any]]
) -> None:
    straight = stages.run(name)
    model = _config(name)["model"]["init_args"]
    learns = "Change" in _config(name)["model"]["class_path"] and not model.get("freeze_encoder")
    frozen = "encoder" in model and not learns
    still = (*RULES[name].still, *(("model.encoder.", "model.codec.") if frozen else ()))
    _check_what_trains(straight.states, frozen=still)
    assert straight.losses.keys() == {0, 1, 2, 3}
    assert all(
        math.isfinite(value) for metrics in straight.losses.values() for value in metrics.values()
    )
    _check_artifact(RULES[name].load(Path(model["out"])))

    resumed = stages.resume(name)
    assert resumed.losses == {
        step: pytest.approx(straight.losses[step], rel=1e-5) for step in (2, 3)
    }
    torch.testing.assert_close(resumed.states[4], straight.states[4])
    _check_artifact(RULES[name].load(Path(model["out"])))

    for used, fresh in frozen_bases:
        for component, module in used.modules.items():
            assert all(p.grad is None for p in module.parameters())
            torch.testing.assert_close(
                module.state_dict(), fresh.modules[component].state_dict(), rtol=0, atol=0
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_difflora_listens_to_faces_and_carries_their_pack(
    stages: Stages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for need in RULES["avatars/difflora"].needs:
        stages.prepare(need)
    out = tmp_path / "model"
    train(
        [
            *_command("avatars/difflora"),
            f"--model.init_args.face_pack={released.FACE_PACK_DIR}",
            f"--model.init_args.output_dir={out}",
            f"--trainer.default_root_dir={tmp_path}",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
            f"--trainer.callbacks.init_args.dirpath={tmp_path / 'checkpoints'}",
        ]
    )
    assert re.search(r"no face was found in \d of 8 photos", caplog.text), (
        "drawn at 16 pixels, most cannot be seen"
    )
    model = LoraDiffusion.from_pretrained(out)
    assert (
        model.face_analyzer is not None
        and model.face_analyzer.pack_dir == (out / "face-pack").resolve()
    )
    assert model.mixture.mode == "gate" and model.photo_size == 128


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("avatars/")])
def test_pretrained_encoders_exist(name: str) -> None:
    model = _config(name)["model"]["init_args"]
    assert model["encoder_options"]["pretrained"]
    size = timm.get_pretrained_cfg(model["encoder"]).input_size[-1]
    assert (
        model["encoder_options"]["image_size"]
        == size
        == _config(name)["data"]["init_args"]["encoder_size"]
    )


def _command(name: str) -> list[str]:
    return ["fit", f"--config={CONFIGS / name}.yaml", *FOUR_STEPS, *RULES[name].arguments]


def _config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def _folder(name: str) -> Path:
    return Path(_config(name)["trainer"]["default_root_dir"])


def _states(name: str) -> dict[int, dict[str, Tensor]]:
    states = {}
    for file in _folder(name).glob("*step=*.ckpt"):
        checkpoint = torch.load(file, weights_only=False)
        # with averaged weights, "state_dict" holds the average
        states[checkpoint["global_step"]] = checkpoint.get(
            "current_model_state", checkpoint["state_dict"]
        )
    return states


def _losses(name: str) -> dict[int, dict[str, float]]:
    """Of the latest run, what was logged about training after each step."""
    version = max(
        (_folder(name) / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1])
    )
    losses = {}
    with (version / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if metrics := {k: float(v) for k, v in row.items() if k.startswith("train/") and v}:
                losses[int(row["step"])] = metrics
    return losses


def _check_what_trains(states: dict[int, dict[str, Tensor]], frozen: tuple[str, ...]) -> None:
    """Between steps 2 and 4, what is frozen stays as it is and of the rest nearly everything moves."""
    assert states.keys() == {2, 4}
    moved = {name: not torch.equal(value, states[4][name]) for name, value in states[2].items()}
    still = {name for name in moved if name.startswith(frozen)}
    assert not any(moved[name] for name in still)
    statistics = {
        name
        for name in moved
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    trained = [moved[name] for name in moved.keys() - still - statistics]
    assert sum(trained) > 0.9 * len(trained)
    assert all(value.isfinite().all() for value in states[4].values() if value.is_floating_point())


def _check_artifact(artifact: Any) -> None:
    """It loads; and a hypernetwork, which starts at ΔW = 0, now makes LoRAs."""
    if isinstance(artifact, ImageToLoraBase):
        photo = Path("photos/train/person-0/0.png")
        norms = artifact([photo]).compute_delta_norms()
        assert norms.isfinite().all()
        assert norms.max() > 0
    if isinstance(artifact, PairToLora):
        before, after = (
            Path(f"pairs/validation/{n}_{side}.png") for n, side in ((0, "before"), (0, "after"))
        )
        norms = artifact((before, after)).compute_delta_norms()
        assert norms.isfinite().all()
        assert norms.max() > 0
