"""Portraits of held-out subjects during validation: images, scores, and where they are logged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.training.cli import train
from tests.training.config_rules import CONFIGS, FOUR_STEPS, SMALL_HYPERNETWORK, TINY_ENCODER

CALLBACK = "hyperlora.training.portraits.ValidationPortraits"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def run_training(name: str, *arguments: str) -> Path:
    """Train four steps with a validation after each; return the folder of the run."""
    train(
        [
            "fit",
            f"--config={CONFIGS / 'sd15/hypernetwork.yaml'}",
            *FOUR_STEPS,
            "--trainer.val_check_interval=1",
            "--trainer.limit_val_batches=1.0",
            "--trainer.precision=32-true",
            "--model.init_args.base_options={dtype: float32, variant: fp16}",
            "--model.init_args.base=tiny/sd15",
            "--model.init_args.lr=3e-2",
            *TINY_ENCODER,
            *SMALL_HYPERNETWORK,
            "--data.init_args.batch_size=1",
            "--data.init_args.num_workers=0",
            f"--run_name=portraits/{name}",
            f"--model.init_args.output_dir=runs/portraits/{name}/out",
            *arguments,
        ]
    )
    return Path("runs/portraits") / name


def make_callback(**options: Any) -> str:
    average = "hyperlora.training.weight_averaging.TrainedWeightAveraging"
    init_args = ", ".join(f"{key}: {value}" for key, value in options.items())
    return (
        f"--trainer.callbacks=[{{class_path: {average}}}, "
        f"{{class_path: {CALLBACK}, init_args: {{{init_args}}}}}]"
    )


def read_cells(path: Path, num_columns: int = 4) -> list[list[Image.Image]]:
    """Cut a sheet into its images, row by row."""
    sheet, cell, gap = Image.open(path).convert("RGB"), 256, 4
    top = sheet.height % (cell + gap)
    return [
        [
            sheet.crop((left, y, left + cell, y + cell))
            for left in range(gap, gap + num_columns * (cell + gap), cell + gap)
        ]
        for y in range(top, sheet.height, cell + gap)
    ]


def test_portraits_show_photo_and_three_images_of_each_subject(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, bundle: Any
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(workspace)
    options = make_callback(num_subjects=2, every_n_validations=2, num_inference_steps=2)
    run_dir = run_training("own-encoder", options)
    sheets = sorted(path.name for path in (run_dir / "portraits").iterdir())
    assert sheets == ["step-000001.png", "step-000003.png"]  # of the first and third validation

    rows = read_cells(run_dir / "portraits/step-000003.png")
    assert len(rows) == 2
    base = load_diffusion_base("tiny/sd15", variant="fp16")
    (image,) = generate_images(base, ["a photo of sks person"], seeds=[0], num_inference_steps=2)
    for row in rows:
        without_lora = image.resize((256, 256), Image.Resampling.LANCZOS)
        assert row[1].tobytes() == without_lora.tobytes()
        assert len({cell.tobytes() for cell in row}) == 4, "all images of a row differ"
    assert rows[0][0].tobytes() != rows[1][0].tobytes()

    events = EventAccumulator(str(run_dir / "tensorboard/version_0"))
    events.Reload()
    assert [event.step for event in events.Images("val/portraits")] == [1, 3]
    for name in ("own", "base", "shuffled"):
        scores = [event.value for event in events.Scalars(f"val/identity_{name}")]
        assert len(scores) == 2
        assert all(-1 <= score <= 1 for score in scores)
    readme = (run_dir / "out/README.md").read_text()
    assert "| identity score, own LoRA |" in readme


def test_portraits_are_scored_by_an_identity_classifier(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, bundle: Any
) -> None:
    monkeypatch.chdir(workspace)
    scores: list[float] = []
    import hyperlora.training.portraits as portraits

    score = portraits.IdentitySimilarity.__call__

    def record(self: Any, photos: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        result = score(self, photos, images)
        scores.extend(result.tolist())
        return result

    monkeypatch.setattr(portraits.IdentitySimilarity, "__call__", record)
    options = make_callback(num_subjects=2, num_inference_steps=1, identity=bundle.evaluator)
    run_dir = run_training("classifier", options, "--trainer.max_steps=1")
    assert len(scores) == 2 * 3
    checkpoint_scores = (run_dir / "out/README.md").read_text()
    own = (scores[1] + scores[4]) / 2
    assert f"| identity score, own LoRA | {own:.4f} |" in checkpoint_scores


def test_image_is_logged_to_weights_and_biases() -> None:
    """By its logger alone, since the package is not installed."""
    from lightning.pytorch.loggers import WandbLogger

    from hyperlora.training.portraits import log_image

    calls: list[tuple[Any, ...]] = []

    class Recorder(WandbLogger):
        def __init__(self) -> None:
            pass

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            calls.append((key, images, step))

    image = Image.new("RGB", (2, 2))
    log_image([Recorder()], "val/portraits", image, 7)
    assert calls == [("val/portraits", [image], 7)]


def test_portraits_are_left_out_without_a_text_encoder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from hyperlora.training.modules.hypernetwork import HypernetworkTraining
    from hyperlora.training.portraits import ValidationPortraits

    monkeypatch.chdir(workspace)

    def lack_component(module: HypernetworkTraining, name: str) -> bool:
        return name == "text_encoder"

    monkeypatch.setattr("hyperlora.training.portraits._lacks", lack_component)
    run_dir = run_training("no-text", make_callback(num_subjects=1), "--trainer.max_steps=2")
    assert not (run_dir / "portraits").exists()
    assert any("without text_encoder" in str(warning.message) for warning in recwarn)
    assert ImageToLora.from_pretrained(run_dir / "out")
    assert ValidationPortraits().num_subjects == 4
