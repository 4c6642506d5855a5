"""A frozen base that two processes share (gloo): the same training as with a base for each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.training.cli import train
from tests.training.config_rules import CONFIGS, SMALL_HYPERNETWORK, TINY_ENCODER
from tests.training.test_ddp import PROGRAM

CASES = {
    "z_image": "z_image/hypernetwork",
    "flux2_klein": "flux2/klein_hypernetwork",
    "qwen_image": "qwen_image/hypernetwork",
    "stable_diffusion_3": "sd3/hypernetwork",
}
"""Configuration by tiny base: transformers of diffusers, text encoders of transformers."""
ARGUMENTS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    # full precision: rounding to bfloat16 would hide a wrong gradient
    "--trainer.precision=32-true",
    "--model.init_args.base_options={dtype: float32}",
    "--checkpoint.every_n_train_steps=2",
    *TINY_ENCODER,
    *SMALL_HYPERNETWORK,
    "--data.init_args.resolution=32",
    "--data.init_args.batch_size=1",
    "--data.init_args.num_workers=0",
]


@pytest.mark.heavy  # three processes for minutes
@pytest.mark.parametrize("base", CASES)
def test_sharded_base_trains_like_a_whole_one(
    base: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    arguments = [
        "fit",
        f"--config={CONFIGS / CASES[base]}.yaml",
        f"--model.init_args.base=tiny/{base}",
        *ARGUMENTS,
    ]
    # one process that accumulates two batches, as tests/training/test_ddp.py compares; and two
    train([*arguments, *_make_run_arguments(base, is_sharded=False)])
    run_two_processes(workspace, [*arguments, *_make_run_arguments(base, is_sharded=True)])
    whole, sharded = (_load_state(base, is_sharded) for is_sharded in (False, True))
    moved = sharded["model.hypernetwork.code_proj"]
    assert moved.abs().max() > 0  # 0 at initialization
    torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-6)


def _make_run_arguments(base: str, is_sharded: bool) -> list[str]:
    num_devices = 2 if is_sharded else 1
    run_name = f"sharding/{base}-{is_sharded}"
    return [
        f"--model.init_args.shard_base={is_sharded}",
        f"--run_name={run_name}",
        f"--model.init_args.output_dir=runs/{run_name}/out",
        f"--trainer.devices={num_devices}",
        f"--trainer.strategy={'ddp' if is_sharded else 'auto'}",
        f"--trainer.accumulate_grad_batches={2 // num_devices}",
        f"--trainer.overfit_batches={4 // num_devices}",
    ]


def _load_state(base: str, is_sharded: bool) -> dict[str, Tensor]:
    checkpoint = torch.load(f"runs/sharding/{base}-{is_sharded}/last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    return checkpoint["current_model_state"]


def run_two_processes(workspace: Path, arguments: list[str]) -> None:
    program = workspace / "sharding.py"  # a file, since the launcher runs it again
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr + done.stdout
