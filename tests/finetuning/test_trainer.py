"""Fitting K subjects at once, and refining a predicted LoRA on its photo."""

from functools import partial

import pytest
import torch

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples, refine
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights

K = 3


@pytest.fixture
def base(bundle):
    return load_diffusion_base(bundle.base)


@pytest.fixture
def start(base):
    torch.manual_seed(0)
    return LoraWeights.zeros(
        make_layout({"unet": base.denoiser}, "attention", 2, base.id), (K,), 0.1
    )


def photos(size, seed=0):
    return torch.rand(K, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fitted(base, start, examples, **options):
    torch.manual_seed(1)
    expand = partial(LoraWeights.unflatten, start.layout)
    return fine_tune_loras(
        base.denoiser, base.noise_schedule, examples, start.flatten(), expand, lr=1e-2, **options
    )


def test_subjects_fitted_together_do_not_influence_each_other(base, start):
    seen = photos(base.resolution)
    changed = seen.clone()
    changed[2] = photos(base.resolution, seed=9)[2]
    one = fitted(base, start, make_photo_examples(base, seen, "a b"), steps=4, batch=2)
    two = fitted(base, start, make_photo_examples(base, changed, "a b"), steps=4, batch=2)
    assert torch.allclose(one.codes[:2], two.codes[:2], atol=1e-6)
    assert not torch.allclose(one.codes[2], two.codes[2], atol=1e-4)


def test_fitting_lowers_the_loss_of_the_own_photo_only(base, start):
    examples = make_photo_examples(base, photos(base.resolution), "a b")
    done = fitted(base, start, examples, steps=60, batch=4, snapshots=(10, 60))
    assert done.losses.shape == (60, K)
    assert (done.losses[-10:].mean(0) < done.losses[:10].mean(0)).all()
    assert torch.equal(done.snapshots[60].flatten(), done.weights.flatten())
    assert not torch.equal(done.snapshots[10].flatten(), done.weights.flatten())


def test_shifted_timesteps_are_noisier(base, start):
    examples, seen, means = make_photo_examples(base, photos(base.resolution), "a b"), [], []
    hook = base.denoiser.register_forward_pre_hook(
        lambda _, given: seen.append(given[1].float().mean())
    )
    for shift in (1.0, 50.0):
        seen.clear()
        fitted(base, start, examples, steps=6, shift=shift)
        means.append(torch.stack(seen).mean())
    hook.remove()
    assert means[1] > means[0] + 200, means


def test_prior_images_are_part_of_the_loss(base, start):
    examples = make_photo_examples(base, photos(base.resolution), "a b")
    prior = make_photo_examples(base, photos(base.resolution, seed=5), "a")
    without = fitted(base, start, examples, steps=3)
    with_prior = fitted(base, start, examples, steps=3, prior=prior)
    assert (with_prior.losses[0] > without.losses[0]).all()


def test_examples_share_loras_in_the_order_of_injection():
    examples = TrainingExamples(
        torch.arange(6.0).view(3, 2, 1, 1, 1), {"a": {"b": torch.arange(6).view(3, 2, 1)}}
    )
    latents, conditions = examples.gather_examples(torch.tensor([[0, 1, 0], [1, 1, 1]]))
    assert latents.flatten().tolist() == [0, 3, 4, 1, 3, 5]  # example j of subject i at j * K + i
    assert conditions["a"]["b"].flatten().tolist() == [0, 3, 4, 1, 3, 5]


def test_refining_keeps_rank_and_brings_the_photo_closer(base, start):
    torch.manual_seed(3)
    predicted = LoraWeights(
        start.layout, start.down, tuple(torch.randn_like(u) * 0.01 for u in start.up)
    )
    before = predicted.flatten().clone()
    seen = photos(base.resolution)
    torch.manual_seed(4)
    refined = refine(base, predicted, seen, num_steps=40, rank=3, lr=1e-2, prompt="a b")
    assert refined.layout == predicted.layout and refined.batch_shape == (K,)
    assert torch.equal(predicted.flatten(), before), "the prediction itself stays as it was"
    examples = make_photo_examples(base, seen, "a b")
    latents, conditions = examples.gather_examples(torch.zeros(1, K, dtype=torch.long))

    def loss(weights):
        total = 0.0
        for seed in range(8):
            torch.manual_seed(100 + seed)
            with inject_lora(base.denoiser, weights), torch.no_grad():
                total += (
                    compute_denoising_loss(
                        base.denoiser, base.noise_schedule, latents, **conditions
                    )
                    .mean()
                    .item()
                )
        return total

    assert loss(refined) < loss(predicted)


def test_no_steps_of_refining_change_nothing_but_the_factors(base, start):
    predicted = LoraWeights(start.layout, start.down, tuple(torch.randn_like(u) for u in start.up))
    same = refine(base, predicted, photos(base.resolution), num_steps=0, prompt="a b")
    for got, expected in zip(same.get_delta_weights(), predicted.get_delta_weights(), strict=True):
        assert torch.allclose(got, expected, atol=1e-4)
