"""Fine-tuning of K subjects at once, and refinement of a predicted LoRA on its photos."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.noise_schedule import NoiseSchedule
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples, refine_lora
from hyperlora.finetuning.trainer import FineTuneResult, fine_tune_loras
from hyperlora.lora.weights import LoraWeights

K = 3


@pytest.fixture
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.base)


@pytest.fixture
def init_loras(base: DiffusionBase) -> LoraWeights:
    torch.manual_seed(0)
    return LoraWeights.zeros(
        make_layout({"unet": base.denoiser}, "attention", 2, base.id), (K,), 0.1
    )


def make_photos(size: int, seed: int = 0) -> Tensor:
    return torch.rand(K, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def run_fine_tuning(
    base: DiffusionBase,
    init_loras: LoraWeights,
    examples: TrainingExamples,
    prior_examples: TrainingExamples | None = None,
    **options: Any,
) -> FineTuneResult:
    torch.manual_seed(1)
    return fine_tune_loras(
        base,
        examples,
        init_loras.flatten(),
        partial(LoraWeights.unflatten, init_loras.layout),
        FineTuneConfig(lr=1e-2, **options),
        prior_examples=prior_examples,
    )


def test_fine_tune_loras_keeps_subjects_independent(
    base: DiffusionBase, init_loras: LoraWeights
) -> None:
    photos = make_photos(base.resolution)
    other_photos = photos.clone()
    other_photos[2] = make_photos(base.resolution, seed=9)[2]
    result, other_result = (
        run_fine_tuning(
            base, init_loras, make_photo_examples(base, p, "a b"), num_steps=4, batch_size=2
        )
        for p in (photos, other_photos)
    )
    assert torch.allclose(result.codes[:2], other_result.codes[:2], atol=1e-6)
    assert not torch.allclose(result.codes[2], other_result.codes[2], atol=1e-4)


def test_fine_tune_loras_lowers_loss_and_keeps_snapshots(
    base: DiffusionBase, init_loras: LoraWeights
) -> None:
    examples = make_photo_examples(base, make_photos(base.resolution), "a b")
    result = run_fine_tuning(
        base, init_loras, examples, num_steps=60, batch_size=4, snapshot_steps=(10, 60)
    )
    assert result.losses.shape == (60, K)
    assert (result.losses[-10:].mean(0) < result.losses[:10].mean(0)).all()
    assert torch.equal(result.snapshots[60].flatten(), result.weights.flatten())
    assert not torch.equal(result.snapshots[10].flatten(), result.weights.flatten())


def test_fine_tune_loras_with_shift_draws_noisier_timesteps(
    base: DiffusionBase, init_loras: LoraWeights
) -> None:
    examples = make_photo_examples(base, make_photos(base.resolution), "a b")
    timesteps: list[Tensor] = []
    mean_timesteps = []
    hook = base.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(kwargs["timestep"].float().mean()),
        with_kwargs=True,
    )
    for shift in (1.0, 50.0):
        timesteps.clear()
        run_fine_tuning(base, init_loras, examples, num_steps=6, shift=shift)
        mean_timesteps.append(torch.stack(timesteps).mean())
    hook.remove()
    assert mean_timesteps[1] > mean_timesteps[0] + 200, mean_timesteps


def test_fine_tune_loras_weights_the_loss_by_min_snr(
    base: DiffusionBase, init_loras: LoraWeights
) -> None:
    """With the same noise, the first losses differ by the weight of their timestep."""
    examples = make_photo_examples(base, make_photos(base.resolution), "a b")
    seeds = list(range(len(init_loras)))
    losses, timesteps = [], []
    hook = base.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(kwargs["timestep"]), with_kwargs=True
    )
    for snr_gamma in (None, 2.0):
        options = {"num_steps": 1, "batch_size": 1, "seeds": seeds, "snr_gamma": snr_gamma}
        losses.append(run_fine_tuning(base, init_loras, examples, **options).losses[0])
    hook.remove()
    weight = NoiseSchedule(base.noise_scheduler).compute_min_snr_weight(timesteps[0], 2.0)
    torch.testing.assert_close(losses[1], losses[0] * weight.flatten())


def test_fine_tune_loras_adds_prior_loss(base: DiffusionBase, init_loras: LoraWeights) -> None:
    examples = make_photo_examples(base, make_photos(base.resolution), "a b")
    prior_examples = make_photo_examples(base, make_photos(base.resolution, seed=5), "a")
    without = run_fine_tuning(base, init_loras, examples, num_steps=3)
    with_prior = run_fine_tuning(base, init_loras, examples, prior_examples, num_steps=3)
    assert (with_prior.losses[0] > without.losses[0]).all()


def test_gather_examples_orders_samples_as_inject_lora() -> None:
    examples = TrainingExamples(
        torch.arange(6.0).view(3, 2, 1, 1, 1), {"prompt_embeds": torch.arange(6).view(3, 2, 1, 1)}
    )
    latents, conditions = examples.gather_examples(torch.tensor([[0, 1, 0], [1, 1, 1]]))
    assert latents.flatten().tolist() == [0, 3, 4, 1, 3, 5]  # example j of subject i at j * K + i
    assert conditions["prompt_embeds"].flatten().tolist() == [0, 3, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be 0 or more, got -1"),
        ({"lr": float("nan")}, "lr must be 0 or more and finite, got nan"),
        (
            {"lr_scheduler": "cosin"},
            "unknown lr_scheduler 'cosin'; known: constant, linear, cosine",
        ),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps must be 0 or more, got -1"),
        ({"shift": 0.0}, "shift must be above 0 and finite, got 0.0"),
        ({"snr_gamma": 0.0}, "snr_gamma must be above 0 and finite, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_paired_groups": 0}, "num_paired_groups must be at least 1, got 0"),
        ({"num_paired_groups": 2, "seeds": [0, 1]}, "exclude each other: give one of them"),
    ],
)
def test_fine_tune_config_refuses_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        FineTuneConfig(**({"num_steps": 1, "lr": 1e-3} | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2.0, 2.0, 2.0, 2.0]),
        ({"lr_scheduler": "linear"}, [2.0, 1.5, 1.0, 0.5]),
        ({"lr_scheduler": "cosine"}, [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]),
        ({"lr_warmup_steps": 1}, [1.0, 2.0, 2.0, 2.0]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2}, [2 / 3, 4 / 3, 2.0, 1.0]),
    ],
)
def test_compute_lr_rises_and_falls(options: dict[str, Any], expected: list[float]) -> None:
    config = FineTuneConfig(num_steps=4, lr=2.0, **options)
    assert [config.compute_lr(step) for step in (1, 2, 3, 4)] == pytest.approx(expected)


def test_fine_tune_loras_follows_the_schedule(base: DiffusionBase, init_loras: LoraWeights) -> None:
    """Adam's first step moves each number by the learning rate of that step."""
    examples = make_photo_examples(base, make_photos(base.resolution), "a b")
    for options, lr in (({}, 1e-2), ({"lr_warmup_steps": 3}, 2.5e-3)):
        config = {"num_steps": 4, "snapshot_steps": (1,), **options}
        result = run_fine_tuning(base, init_loras, examples, **config)
        moved = result.snapshots[1].flatten() - init_loras.flatten()
        assert float(moved.abs().max()) == pytest.approx(lr, rel=0.01)


def test_iterate_steps_calls_on_step_before_each_step() -> None:
    events: list[str] = []
    config = FineTuneConfig(num_steps=2, lr=0, on_step=lambda step: events.append(f"call {step}"))
    for step in config.iterate_steps():
        events.append(f"step {step}")
    assert events == ["call 1", "step 1", "call 2", "step 2"]


def test_refine_config_refuses_rank_below_1() -> None:
    with pytest.raises(InvalidArgumentError, match="out_rank must be at least 1, got 0"):
        RefineConfig(out_rank=0)


def test_refine_lora_keeps_the_relaxed_rank(base: DiffusionBase, init_loras: LoraWeights) -> None:
    """The sum of both LoRAs, where a cut to the predicted rank would lose most of the fit."""
    photos, steps = make_photos(base.resolution), {"num_steps": 8, "rank": 3, "lr": 1e-2}
    predicted = LoraWeights(
        init_loras.layout,
        init_loras.down,
        tuple(torch.randn_like(up) * 0.05 for up in init_loras.up),
    )
    rank = predicted.layout.rank
    whole, cut = (
        refine_lora(base, predicted, photos, RefineConfig(out_rank=out_rank, **steps), prompt="a b")
        for out_rank in (None, rank)
    )
    assert (whole.layout.rank, cut.layout.rank) == (rank + 3, rank)
    fit = (whole - predicted).compute_delta_norms().sum()
    lost = (whole - cut).compute_delta_norms().sum()
    assert fit > 0 and 0.1 * fit < lost
    exact = refine_lora(
        base, predicted, photos, RefineConfig(out_rank=rank + 3, **steps), prompt="a b"
    )
    torch.testing.assert_close(exact.flatten(), whole.flatten())
    spectra = [torch.linalg.svdvals(delta) for delta in whole.get_delta_weights()]
    assert any((s[..., rank] > 1e-3 * s[..., 0]).all() for s in spectra if s.shape[-1] > rank)


def test_refine_lora_lowers_loss_on_photos(base: DiffusionBase, init_loras: LoraWeights) -> None:
    torch.manual_seed(3)
    predicted = LoraWeights(
        init_loras.layout,
        init_loras.down,
        tuple(torch.randn_like(up) * 0.01 for up in init_loras.up),
    )
    predicted_rows = predicted.flatten().clone()
    photos = make_photos(base.resolution)
    torch.manual_seed(4)
    config = RefineConfig(num_steps=40, rank=3, lr=1e-2)
    refined = refine_lora(base, predicted, photos, config, prompt="a b")
    assert refined.layout == predicted.layout.with_rank(5) and refined.batch_shape == (K,)
    assert torch.equal(predicted.flatten(), predicted_rows), "the prediction itself stays as it was"
    examples = make_photo_examples(base, photos, "a b")
    latents, conditions = examples.gather_examples(torch.zeros(1, K, dtype=torch.long))

    def compute_loss(loras: LoraWeights) -> float:
        loss = 0.0
        for seed in range(8):
            torch.manual_seed(100 + seed)
            with inject_lora(base.denoiser, loras), torch.no_grad():
                losses = compute_denoising_loss(
                    base.predict, base.noise_scheduler, latents, conditions
                )
            loss += losses.mean().item()
        return loss

    assert compute_loss(refined) < compute_loss(predicted)


def test_refine_lora_without_steps_keeps_delta_weights(
    base: DiffusionBase, init_loras: LoraWeights
) -> None:
    predicted = LoraWeights(
        init_loras.layout, init_loras.down, tuple(torch.randn_like(up) for up in init_loras.up)
    )
    photos = make_photos(base.resolution)
    refined = refine_lora(base, predicted, photos, RefineConfig(num_steps=0), prompt="a b")
    deltas = zip(refined.get_delta_weights(), predicted.get_delta_weights(), strict=True)
    for delta, expected in deltas:
        assert torch.allclose(delta, expected, atol=1e-4)
