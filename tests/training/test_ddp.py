"""Data-parallel training of a real config, in two processes of Lightning's launcher (gloo)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.training.cli import train
from tests.training.config_rules import CONFIGS, SMALL_HYPERNETWORK, TINY_ENCODER

PROGRAM = "import sys\nfrom hyperlora.training.cli import train\n\ntrain(sys.argv[1:])\n"
ARGUMENTS = [
    "fit",
    f"--config={CONFIGS / 'sd15/hypernetwork.yaml'}",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--checkpoint.every_n_train_steps=4",
    "--model.init_args.base=tiny/sd15",
    *TINY_ENCODER,
    *SMALL_HYPERNETWORK,
    "--data.init_args.folder=photos/single",
    "--data.init_args.batch_size=1",
    "--data.init_args.num_workers=0",
    # full precision: rounding to bfloat16 would hide a wrong gradient
    "--trainer.precision=32-true",
    "--model.init_args.base_options.dtype=float32",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
def test_ddp_equals_gradient_accumulation(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    # subjects 0 1 | 2 3 in steps of two; overfitting to all of them means: in order
    train(
        [
            *ARGUMENTS,
            *_make_run_arguments("one", 1),
            "--trainer.accumulate_grad_batches=2",
            "--trainer.overfit_batches=4",
        ]
    )
    program = workspace / "program.py"  # a file, since the launcher runs it again
    program.write_text(PROGRAM)
    command = [
        *ARGUMENTS,
        *_make_run_arguments("two", 2),
        "--trainer.strategy=ddp",
        "--trainer.overfit_batches=2",
    ]
    done = subprocess.run(
        [sys.executable, program, *command],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes" in done.stderr + done.stdout
    accumulated, parallel = _load_state("one"), _load_state("two")
    assert accumulated["model.hypernetwork.code_proj"].abs().max() > 0  # 0 at initialization
    torch.testing.assert_close(parallel, accumulated, rtol=1e-4, atol=1e-6)


def _make_run_arguments(name: str, num_devices: int) -> list[str]:
    return [
        f"--trainer.devices={num_devices}",
        "--trainer.strategy=auto",
        f"--run_name=ddp/{name}",
        f"--model.init_args.output_dir=runs/ddp/{name}/out",
    ]


def _load_state(name: str) -> dict[str, Tensor]:
    checkpoint = torch.load(f"runs/ddp/{name}/last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 4
    return checkpoint["state_dict"]
