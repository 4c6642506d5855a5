"""Two processes learn what one learns from the same subjects: a real config, Lightning's own launcher, gloo on CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.training.cli import train

CONFIG = Path(__file__).parents[2] / "configs/sd15/hyperdreambooth.yaml"
PROGRAM = "import sys\nfrom hyperlora.training.cli import train\n\ntrain(sys.argv[1:])\n"
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
ARGUMENTS = [
    "fit",
    f"--config={CONFIG}",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.callbacks.init_args.every_n_train_steps=4",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.init_args.base_name_or_path=tiny/sd15",
    "--model.init_args.encoder=vit_tiny_patch16_224",
    "--model.init_args.encoder_options=" + json.dumps({"image_size": 16, "options": TINY_VIT}),
    "--model.init_args.hypernetwork.width=16",
    "--model.init_args.hypernetwork.depth=1",
    "--model.init_args.hypernetwork.heads=2",
    "--data.init_args.resolution=16",
    "--data.init_args.encoder_size=16",
    "--data.init_args.folder=photos/single",
    "--data.init_args.batch_size=1",
    "--data.init_args.num_workers=0",
]
# full precision: rounding to bfloat16 would hide a wrong gradient
ARGUMENTS += ["--trainer.precision=32-true", "--model.init_args.base_options.dtype=float32"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
def test_two_processes_equal_one_that_accumulates(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    # subjects 0 1 | 2 3 in steps of two; overfitting to all of them means: in order
    train(
        [
            *ARGUMENTS,
            *_where("one", 1),
            "--trainer.accumulate_grad_batches=2",
            "--trainer.overfit_batches=4",
        ]
    )
    program = workspace / "program.py"  # a file, since the launcher runs it again
    program.write_text(PROGRAM)
    command = [
        *ARGUMENTS,
        *_where("two", 2),
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
    one, two = _state("one"), _state("two")
    assert one["model.hypernetwork.head_weight"].abs().max() > 0  # where it starts
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def _where(name: str, devices: int) -> list[str]:
    folder = f"runs/ddp/{name}"
    strategy = [f"--trainer.devices={devices}", "--trainer.strategy=auto"]
    paths = [
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]
    return [
        *strategy,
        *paths,
        f"--trainer.callbacks.init_args.dirpath={folder}",
        f"--model.init_args.output_dir={folder}/out",
    ]


def _state(name: str) -> dict[str, Tensor]:
    checkpoint = torch.load(f"runs/ddp/{name}/last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 4
    return checkpoint["state_dict"]
