"""A frozen base that two processes share (gloo): the same training as with a base for each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.config_rules import CONFIGS, SMALL_HYPERNETWORK, TINY_ENCODER
from tests.training.test_ddp import PROGRAM

CASES = {
    "z_image": "z_image/hypernetwork",
    "flux2_klein": "flux2/klein_hypernetwork",
    "qwen_image": "qwen_image/hypernetwork",
    "stable_diffusion_3": "sd3/hypernetwork",
}
"""Configuration by tiny base: transformers of diffusers, text encoders of transformers."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    ["z_image", *(pytest.param(name, marks=pytest.mark.heavy) for name in [*CASES][1:])],
)
def test_sharded_base_trains_like_a_whole_one(
    base: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    states = {}
    for shard in (False, True):
        run_name = f"sharding/{base}-{shard}"
        run_two_processes(
            workspace,
            f"--config={CONFIGS / CASES[base]}.yaml",
            f"--model.init_args.base=tiny/{base}",
            f"--model.init_args.shard_base={shard}",
            f"--run_name={run_name}",
            f"--model.init_args.output_dir=runs/{run_name}/out",
        )
        checkpoint = torch.load(f"runs/{run_name}/last.ckpt", weights_only=False)
        assert checkpoint["global_step"] == 2
        states[shard] = checkpoint["current_model_state"]
    moved = states[True]["model.hypernetwork.code_proj"]
    assert moved.abs().max() > 0  # 0 at initialization
    torch.testing.assert_close(states[True], states[False], rtol=1e-4, atol=1e-6)


def run_two_processes(workspace: Path, *arguments: str) -> None:
    program = workspace / "sharding.py"  # a file, since the launcher runs it again
    program.write_text(PROGRAM)
    command = [
        "fit",
        *arguments,
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=1",
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
    done = subprocess.run(
        [sys.executable, program, *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr + done.stdout
