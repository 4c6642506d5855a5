"""Builds, audits and baselines on a mock of a CUDA card: the same rows as on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_builder.audit.run import AuditConfig, run_audit
from data_builder.baselines import lidb_targets
from data_builder.baselines.lidb_targets import LidbTargetConfig, fit_lidb_targets
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import write_plan
from data_builder.build.run import run_build
from data_builder.cli import app
from data_builder.sources.sources import FolderSource
from hyperlora.compute import ComputeConfig
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.lora.io.load import load_lora
from tests.conftest import Bundle
from tests.mock_cuda import mock_cuda
from tests.tiny_pipelines import mark_heavy

RECIPES: dict[str, dict[str, Any]] = {
    "zero": {"init": "zero", "patience": 1, "num_crops": 2, "flip": True},
    "network": {"init": "network", "rank": 3},
    "class images": {"num_class_images": 2},
    "lidb": {"parametrization": "lidb"},
    "lokr": {"parametrization": "lokr", "rank": 4},
}


@pytest.mark.parametrize("name", mark_heavy(RECIPES, ("network",)))
def test_builds_and_audits_run_on_a_card(
    bundle: Bundle, photos: Path, make_recipe: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    options = RECIPES[name]
    if name == "network":
        options = options | {"init_from": str(bundle.model)}
    plan = make_plan(FolderSource(str(photos)), make_recipe(**options))
    rows = {}
    for device in ("cpu", "cuda"):
        write_plan(plan, tmp_path / device)
        if device == "cpu":
            run_build(tmp_path / device, device)
        else:
            with mock_cuda():
                run_build(tmp_path / device, device)
                config = AuditConfig(bundle.evaluator, num_scored_rows=2, num_inference_steps=1)
                assert len(run_audit(tmp_path / device, config, device=device)) == 6
        rows[device] = LoraDataset(tmp_path / device).get_weights(range(6))
    for value, expected in zip(
        rows["cuda"].get_delta_weights(), rows["cpu"].get_delta_weights(), strict=True
    ):
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)


def test_run_and_audit_say_where(
    photos: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    write_plan(make_plan(FolderSource(str(photos)), make_recipe(finetune_steps=1)), tmp_path)
    with mock_cuda():
        for command in (["run"], ["audit", "--evaluator", "none"]):
            result = CliRunner().invoke(app, [*command, str(tmp_path)])
            assert result.exit_code == 0, result.output
            assert "running on cuda (Mock), float32" in result.stderr
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--device", "gpu"])
    assert result.exit_code == 2 and "unknown device 'gpu'" in result.stderr


def test_differential_lora_runs_on_a_card(bundle: Bundle, tmp_path: Path) -> None:
    for name, color in (("before", "blue"), ("after", "red")):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{name}.png")
    output, grid = tmp_path / "x.safetensors", tmp_path / "grid.png"
    arguments = [
        *("fit-differential-lora", tmp_path / "before.png", tmp_path / "after.png"),
        *("--base", bundle.base, "-o", output, "--finetune-steps", 2, "--slider-grid", grid),
    ]
    with mock_cuda():
        result = CliRunner().invoke(app, [*map(str, arguments), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "running on cuda (Mock), float32" in result.stderr
    assert load_lora(output).weights.compute_delta_norms().max() > 0 and grid.is_file()


def test_lidb_targets_run_on_a_card(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_examples(base: DiffusionBase, *_: Any) -> TrainingExamples:
        examples = make_photo_examples(base, torch.rand(2, 2, 3, 16, 16), "a b")
        return TrainingExamples(examples.latents.cpu(), examples.conditions)  # as from the cache

    monkeypatch.setattr(lidb_targets, "_load_examples", load_examples)
    config = LidbTargetConfig(4, 2, finetune_steps=1, preset="attention", a=4, b=4)
    with mock_cuda():
        compute = ComputeConfig(dtype="float32")
        fit_lidb_targets(
            tmp_path, str(bundle.base), "", tmp_path / "x.safetensors", config, compute
        )
    assert (tmp_path / "x.safetensors").is_file()
