"""Seeds and ranks at every entrance: what torch takes, and what the base can have."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_builder.build.plan import Recipe
from data_builder.cli import app as builder_app
from hyperlora.cli import app
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.lora.heads import LiDB
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.generate import generate_candidates
from hyperlora.seeds import MAX_SEED, compute_seed, validate_seed
from tests.tiny_pipelines import get_tiny_pipeline

ENTRANCES: dict[str, Callable[[int], object]] = {
    "function": validate_seed,
    "sampling of LoRAs": LoraSampling,
    "fine-tuning": lambda seed: FineTuneConfig(num_steps=1, lr=0.1, seeds=[0, seed]),
    "refinement": lambda seed: RefineConfig(seed=seed),
    "recipe": lambda seed: Recipe("base", seed=seed).validate(),
    "merge": lambda seed: merge([make_lora()], method="dare", seed=seed),
    "head": lambda seed: LiDB(make_lora().layout, seed=seed).init_codes(),
    "image": lambda seed: generate_images(
        make_base(), ["a"], seeds=[seed], num_inference_steps=1, width=32, height=32
    ),
}


def make_base() -> DiffusionBase:
    return DiffusionBase("tiny/base", get_tiny_pipeline("stable_diffusion").pipe)


def make_lora(rank: int = 2) -> LoraWeights:
    layout = make_base().make_layout("attention", rank)
    return LoraWeights.unflatten(layout, torch.ones(layout.numel))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_entrances_take_what_torch_takes(entrance: str) -> None:
    ENTRANCES[entrance](MAX_SEED)
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(InvalidArgumentError, match=rf"from 0 to {MAX_SEED} .* got {seed}"):
            ENTRANCES[entrance](seed)


def test_torch_takes_the_largest_seed_and_no_larger_one() -> None:
    torch.Generator().manual_seed(MAX_SEED)
    with pytest.raises((RuntimeError, ValueError), match="Overflow"):
        torch.Generator().manual_seed(MAX_SEED + 1)


def test_seeds_that_follow_begin_again_at_zero() -> None:
    assert [compute_seed(MAX_SEED - 1, i) for i in range(4)] == [MAX_SEED - 1, MAX_SEED, 0, 1]
    lora, seeds = make_lora(), list[int]()

    def generate_from_features(features: Any, sampling: LoraSampling) -> LoraWeights:
        seeds.append(sampling.seed)
        return lora

    config = SimpleNamespace(
        num_loras=3, num_candidates=1, needs_reranking=False, sampling=LoraSampling(MAX_SEED)
    )
    model = SimpleNamespace(generate_from_features=generate_from_features)
    generate_candidates(model, None, [], config)  # type: ignore[arg-type]
    assert seeds == [MAX_SEED, 0, 1]


def run(command_app: Any, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(command_app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--seed", MAX_SEED + 1), f"less than or equal to {MAX_SEED}"),
        (("--seed", -1), "greater than or equal to 0"),
        (("--rank", 161), "rank 161 asked for, but no weight of"),
        (("--rank", 10**9), "rank 1000000000 asked for"),
        (("--inner-rank", 999, "--parametrization", "loha"), "inner-rank 999 asked for"),
        (("--lr", "nan"), "lr must be 0 or more and finite, got nan"),
        (("--prior-loss-weight", "-1"), "prior-loss-weight must be 0 or more"),
        (("--preset", "all"), "unknown preset 'all'"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
    ],
)
def test_no_plan_is_written_that_cannot_run(
    options: tuple[object, ...], sentence: str, tmp_path: Path
) -> None:
    code, message = run(builder_app, "plan", "avatars:0-1", "-o", tmp_path / "build", *options)
    assert code == 2 and sentence in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("render", "--prompt", "a", "-o", "x.png"),
        ("generate", "x.png", "-o", "x.safetensors"),
        ("edit", "--pair", "a.png", "b.png", "-o", "x.safetensors"),
        ("evaluate",),
    ],
)
def test_commands_refuse_other_seeds(arguments: tuple[str, ...]) -> None:
    bounds = {-1: "greater than or equal to 0", MAX_SEED + 1: f"less than or equal to {MAX_SEED}"}
    for seed, sentence in bounds.items():
        code, message = run(app, *arguments, "--seed", seed)
        assert code == 2 and sentence in message


def test_layouts_are_bounded_by_the_widest_weight() -> None:
    base, lora = make_base(), make_lora()
    widest = max(min(t.in_features, t.out_features) for t in lora.layout.targets)
    assert base.make_layout("attention", widest).rank == widest == lora.layout.max_rank
    for rank, sentence in ((0, "at least 1, got 0"), (widest + 1, f"has more than {widest}")):
        for call in (
            lambda r: base.make_layout("attention", r),
            lora.resize,
            lambda r: merge([lora, lora], rank=r),
            lambda r: merge([lora], method="ties", rank=r),
        ):
            with pytest.raises(InvalidArgumentError, match=sentence):
                call(rank)
    concatenated = merge([lora] * widest)  # exact sums may have more, and be written so
    assert concatenated.canonicalize().layout.rank == 2 * widest


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_training_takes_the_seeds_of_numpy(seed: int) -> None:
    from hyperlora.training.cli import parse_config

    arguments = ["--config", "configs/avatars/01_vae.yaml", "--seed_everything"]
    with pytest.raises(InvalidArgumentError, match=rf"from 0 to 4294967295 .* got {seed}"):
        parse_config([*arguments, str(seed)])
    assert parse_config([*arguments, str(2**32 - 1)])["seed_everything"] == 2**32 - 1


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_are_those_of_the_training_schedule(steps: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"1 to 1000 denoising steps .* got {steps}"):
        generate_images(make_base(), ["a"], seeds=[0], num_inference_steps=steps)
