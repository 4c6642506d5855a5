"""What checkpoints hold, how a run resumes, and what is released when training ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.training.cli import train
from hyperlora.training.modules.pretrained_model import ENCODER_PREFIX
from tests.training.config_rules import CONFIGS, FOUR_STEPS, SMALL_HYPERNETWORK, TINY_ENCODER

ARGUMENTS = [
    "fit",
    f"--config={CONFIGS / 'sd15/hypernetwork.yaml'}",
    *FOUR_STEPS,
    "--trainer.max_steps=6",
    "--trainer.limit_train_batches=1.0",  # four batches
    "--trainer.limit_val_batches=1.0",
    "--trainer.val_check_interval=1",
    "--checkpoint.every_n_train_steps=1",
    "--model.init_args.base=tiny/sd15",
    "--model.init_args.lr=3e-3",
    *TINY_ENCODER,
    *SMALL_HYPERNETWORK,
    "--data.init_args.batch_size=1",
    "--data.init_args.num_workers=0",
    "--data.init_args.num_views=2",
]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def run_dir(workspace: Path) -> Iterator[Path]:
    """The folder of a run of six steps, with a checkpoint of each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(workspace)
        train([*ARGUMENTS, *make_run_arguments("straight")])
    return workspace / "runs/checkpoints/straight"


@pytest.fixture(autouse=True)
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def make_run_arguments(name: str) -> list[str]:
    run_dir = f"checkpoints/{name}"
    return [f"--run_name={run_dir}", f"--model.init_args.output_dir=runs/{run_dir}/out"]


def load_checkpoint(run_dir: Path, name: str) -> dict[str, Any]:
    (path,) = run_dir.glob(f"*{name}.ckpt")
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    ("step", "num_workers"),
    [(2, 1), (4, 0)],  # in the midst of an epoch, and at its end
)
def test_resumed_run_equals_one_without_a_break(run_dir: Path, step: int, num_workers: int) -> None:
    (path,) = run_dir.glob(f"*step={step}.ckpt")
    name = f"resumed-{step}-{num_workers}"
    workers = f"--data.init_args.num_workers={num_workers}"
    train([*ARGUMENTS, *make_run_arguments(name), workers, f"--ckpt_path={path}"])
    assert (run_dir.with_name(name) / "out/config.json").is_file()  # not where the checkpoint says
    straight = load_checkpoint(run_dir, "step=6")
    resumed = load_checkpoint(run_dir.with_name(name), "step=6")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        torch.testing.assert_close(resumed[key], straight[key], rtol=0, atol=0)
    for key in ("optimizer_states", "lr_schedulers", "validation_scores"):
        torch.testing.assert_close(resumed[key], straight[key], rtol=0, atol=0, equal_nan=True)


def test_checkpoint_has_neither_base_nor_frozen_encoder(run_dir: Path) -> None:
    checkpoint = load_checkpoint(run_dir, "last")
    model = ImageToLora.from_pretrained(run_dir / "out")
    expected = {f"model.{name}" for name in model.state_dict()}
    encoder = {name for name in expected if name.startswith(ENCODER_PREFIX)}
    assert encoder
    for key in ("state_dict", "current_model_state"):
        assert checkpoint[key].keys() == expected - encoder


def test_checkpoint_of_another_encoder_is_refused(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run_dir, "last")
    torch.save(checkpoint | {"encoder_sha256": "0" * 64}, tmp_path / "other.ckpt")
    with pytest.raises(ModelLoadError, match="other weights of the encoder"):
        train([*ARGUMENTS, *make_run_arguments("other"), f"--ckpt_path={tmp_path / 'other.ckpt'}"])


def test_average_follows_its_formula_and_is_what_validation_uses(run_dir: Path) -> None:
    """θ̄ is the first θ, then d θ̄ + (1 - d) θ with d = (1 + n) / (10 + n)."""
    average: dict[str, Any] = {}
    for step in range(1, 7):
        checkpoint = load_checkpoint(run_dir, f"step={step}")
        d = (1 + step - 1) / (10 + step - 1)
        for name, value in checkpoint["current_model_state"].items():
            mean = average.get(name, value)
            average[name] = value if step == 1 else d * mean + (1 - d) * value
        torch.testing.assert_close(checkpoint["state_dict"], average)
    moved = average["model.hypernetwork.code_proj"]
    assert not torch.equal(moved, checkpoint["current_model_state"]["model.hypernetwork.code_proj"])


def test_best_validation_is_released_with_its_scores(run_dir: Path) -> None:
    losses = {
        step: load_checkpoint(run_dir, f"step={step}")["validation_scores"]["val/loss_own"]
        for step in range(2, 7)
        # a step's checkpoint is written before its validation: it has the scores of the last one
    }
    best = load_checkpoint(run_dir, "best")
    assert best["validation_scores"]["val/loss_own"] <= min(losses.values())
    released = ImageToLora.from_pretrained(run_dir / "out").state_dict()
    for name, value in best["state_dict"].items():
        torch.testing.assert_close(released[name.removeprefix("model.")], value.half().float())


def test_released_folder_has_a_complete_model_card(run_dir: Path, tmp_path: Path) -> None:
    best = load_checkpoint(run_dir, "best")
    model = ImageToLora.from_pretrained(run_dir / "out")
    model.save_pretrained(tmp_path)  # as push_to_hub does, into a folder of its own
    text = (tmp_path / "README.md").read_text()
    assert text == (run_dir / "out/README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "tiny/sd15"
    assert data.library_name == "hyperlora"
    assert {"lora", "hypernetwork", "custom-unet"} <= set(data.tags)
    for part in (
        "| trigger phrase | `sks person` |",
        "| LoRA | rank 4, ",
        'ImageToLora.from_pretrained("FOLDER_OR_HUB_ID")',
        "a photo of sks person",
        f"{best['global_step']:,} steps",
        '"preset": "attention"',
        '"folder": "photos/train"',
        f"own LoRA | {best['validation_scores']['val/loss_own']:.4f} |",
    ):
        assert part in text, f"{part!r} is missing in\n{text}"
