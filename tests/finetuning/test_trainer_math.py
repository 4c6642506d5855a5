"""Fine-tuning of K subjects equals a plain loop of Adam for each subject alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import SubjectRng, TrainingExamples, ValidationProbe
from hyperlora.finetuning.trainer import FineTuneResult, _sample_batch, fine_tune_loras
from hyperlora.lora.weights import LoraWeights
from tests.finetuning.toy_base import LAYOUT, SHAPE, TEXT_LAYOUT, ToyBase, make_toy_examples

K, P = 4, LAYOUT.numel
SEEDS = (5, 6, 7, 8)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def decode(codes: Tensor) -> LoraWeights:
    return LoraWeights.unflatten(LAYOUT, 2 * codes)


def select_subject(examples: TrainingExamples, i: int) -> TrainingExamples:
    conditions = map_tensors(lambda value: value[i : i + 1], examples.conditions)
    return TrainingExamples(examples.latents[i : i + 1], conditions)


def fit_alone(
    i: int,
    examples: TrainingExamples,
    init_codes: Tensor,
    config: FineTuneConfig,
    prior_examples: TrainingExamples | None = None,
    base_loras: LoraWeights | None = None,
    x0_offsets: Tensor | None = None,
) -> tuple[list[Tensor], list[float]]:
    """Fit subject i alone: the codes before and after each step, and the loss of each step."""
    base, zero, rng = ToyBase(), torch.zeros(1, dtype=torch.long), SubjectRng([SEEDS[i]])
    codes = init_codes[i].clone().requires_grad_()
    optimizer = torch.optim.Adam([codes])
    history, losses = [codes.detach().clone()], []

    def compute_loss(examples: TrainingExamples, offsets: Tensor | None = None) -> Tensor:
        examples = select_subject(examples, i)
        indices, noise_sample = rng.sample_batch(examples, config.batch_size, zero)
        latents, conditions = examples.gather_examples(indices)
        return compute_denoising_loss(
            base.predict,
            base.noise_scheduler,
            latents,
            conditions,
            shift=config.shift,
            snr_gamma=config.snr_gamma,
            noise_sample=noise_sample,
            x0_offset=None if offsets is None else offsets[i, indices[:, 0]],
        ).mean()

    for step in range(1, config.num_steps + 1):
        lora = decode(codes[None])
        with base.inject_lora(lora if base_loras is None else lora + base_loras[i : i + 1]):
            loss = compute_loss(examples, x0_offsets)
            if prior_examples is not None:
                loss = loss + config.prior_loss_weight * compute_loss(prior_examples)
        optimizer.param_groups[0]["lr"] = config.compute_lr(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(codes.detach().clone())
        losses.append(loss.item())
    return history, losses


def fine_tune(
    examples: TrainingExamples, init_codes: Tensor, config: FineTuneConfig, **options: Any
) -> FineTuneResult:
    base: Any = ToyBase()
    return fine_tune_loras(base, examples, init_codes, decode, config, **options)


@pytest.mark.parametrize("has_options", [False, True])
def test_fine_tune_loras_is_adam_for_each_subject(has_options: bool) -> None:
    """The losses are means over a batch, plus the weighted ones of the class images."""
    examples, init_codes = make_toy_examples(K, 5), draw(K, P)
    config = FineTuneConfig(num_steps=4, lr=0.1, seeds=SEEDS, snapshot_steps=(1, 3))
    options: dict[str, Any] = {}
    if has_options:
        config = replace(
            config,
            batch_size=3,
            lr_scheduler="cosine",
            lr_warmup_steps=1,
            prior_loss_weight=0.3,
            shift=2.5,
            snr_gamma=2.0,
        )
        options = {
            "prior_examples": make_toy_examples(K, 3, seed=2),
            "base_loras": LoraWeights.unflatten(LAYOUT, draw(K, P, seed=3)),
            "x0_offsets": draw(K, 5, *SHAPE, seed=4),
        }
    start = init_codes.clone()
    result = fine_tune(examples, init_codes, config, **options)
    assert torch.equal(init_codes, start) and not result.codes.requires_grad
    alone = [fit_alone(i, examples, init_codes, config, **options) for i in range(K)]
    expected = torch.stack([codes[-1] for codes, _ in alone])
    check_close(result.codes, expected)
    assert torch.equal(result.weights.flatten(), decode(result.codes).flatten())
    losses = torch.tensor([losses for _, losses in alone]).T
    check_close(result.losses, losses)
    assert set(result.snapshots) == {1, 3}
    for step, snapshot in result.snapshots.items():
        expected = decode(torch.stack([codes[step] for codes, _ in alone])).flatten()
        check_close(snapshot.flatten(), expected)
    assert result.num_steps.tolist() == [4] * K and result.num_steps.dtype == torch.long
    assert result.val_losses.shape == (0, K)


def compute_val_loss(
    i: int, probe: ValidationProbe, codes: Tensor, base_loras: LoraWeights
) -> float:
    """Mean loss of subject i over the draws of the probe."""
    base, losses, examples = ToyBase(), [], select_subject(probe.examples, i)
    for j in range(len(probe.indices)):
        latents, conditions = examples.gather_examples(probe.indices[j : j + 1, i : i + 1])
        with base.inject_lora(decode(codes[None]) + base_loras[i : i + 1]):
            loss = compute_denoising_loss(
                base.predict,
                base.noise_scheduler,
                latents,
                conditions,
                noise_sample=(probe.u[j, i : i + 1], probe.noise[j, i : i + 1]),
            )
        losses.append(loss.item())
    return sum(losses) / len(losses)


def validate_alone(
    i: int,
    history: list[Tensor],
    probe: ValidationProbe,
    num_steps: int,
    base_loras: LoraWeights,
) -> tuple[list[float], Tensor, int]:
    """Validation losses until subject i stops, its best codes, and the number of its steps."""
    losses: list[float] = []
    best_codes, num_bad, step = history[0], 0, 0
    for step in range(num_steps + 1):
        if step and step % probe.eval_every and step < num_steps:
            continue
        loss = compute_val_loss(i, probe, history[step], base_loras)
        if losses and loss >= min(losses):
            num_bad += 1
        else:
            best_codes, num_bad = history[step], 0
        losses.append(loss)
        if probe.patience is not None and num_bad >= probe.patience:
            break
    return losses, best_codes, step


@pytest.mark.parametrize("patience", [None, 1, 2])
def test_probe_keeps_the_best_codes_and_stops_each_subject(patience: int | None) -> None:
    examples, init_codes, num_steps = make_toy_examples(K, 3), 0.7 * draw(K, P, seed=9), 11
    val_examples = make_toy_examples(K, 2, seed=6)
    probe = ValidationProbe.from_examples(val_examples, SEEDS, 3, eval_every=2, patience=patience)
    config = FineTuneConfig(
        num_steps=num_steps, lr=0.25, seeds=SEEDS, shift=3.0, snr_gamma=4.0, snapshot_steps=(2, 9)
    )
    base_loras = LoraWeights.unflatten(LAYOUT, 0.3 * draw(K, P, seed=3))
    offsets = 0.3 * draw(K, 3, *SHAPE, seed=4)
    options: dict[str, Any] = {"base_loras": base_loras, "x0_offsets": offsets}
    result = fine_tune(examples, init_codes, config, probe=probe, **options)
    alone = [fit_alone(i, examples, init_codes, config, **options) for i in range(K)]
    stops = []
    for i, (history, losses) in enumerate(alone):
        val_losses, best_codes, stop = validate_alone(i, history, probe, num_steps, base_loras)
        stops.append(stop)
        missing = [float("nan")] * (len(result.val_losses) - len(val_losses))
        expected = torch.tensor(val_losses + missing)
        check_close(result.val_losses[:, i], expected)
        check_close(result.codes[i], best_codes)
        missing = [float("nan")] * (len(result.losses) - stop)
        expected = torch.tensor(losses[:stop] + missing)
        check_close(result.losses[:, i], expected)
        for step, snapshot in result.snapshots.items():
            expected = decode(history[min(step, stop)]).flatten()
            check_close(snapshot[i].flatten(), expected)
    assert len(set(stops)) > 1 or patience is None
    assert result.num_steps.tolist() == stops and len(result.losses) == max(stops)


def test_equal_validation_losses_are_no_improvement() -> None:
    """With a learning rate of 0, patience runs out after as many steps as checks."""
    examples, init_codes = make_toy_examples(K, 3), draw(K, P)
    probe = ValidationProbe.from_examples(examples, SEEDS, 2, eval_every=1, patience=2)
    config = FineTuneConfig(num_steps=9, lr=0.0, seeds=SEEDS)
    result = fine_tune(examples, init_codes, config, probe=probe)
    assert result.num_steps.tolist() == [2] * K and result.losses.shape == (2, K)
    assert torch.equal(result.codes, init_codes) and result.val_losses.shape == (3, K)
    probe = replace(probe, noise=probe.noise[:1])
    with pytest.raises(ValueError, match="zip"):
        fine_tune(examples, init_codes, config, probe=probe)


@pytest.mark.parametrize("has_probe", [False, True])
def test_no_step_keeps_the_codes(has_probe: bool) -> None:
    examples, init_codes = make_toy_examples(K, 3), draw(K, P)
    probe = ValidationProbe.from_examples(examples, SEEDS) if has_probe else None
    result = fine_tune(examples, init_codes, FineTuneConfig(num_steps=0, lr=1.0), probe=probe)
    assert torch.equal(result.codes, init_codes) and result.losses.shape == (0, K)
    assert result.val_losses.shape == (int(has_probe), K) and result.snapshots == {}
    assert result.num_steps.tolist() == [0] * K


@pytest.mark.parametrize("num_examples", [None, (3, 2)])
def test_draws_without_seeds_are_on_the_device_of_the_examples(
    num_examples: tuple[int, int] | None,
) -> None:
    examples = replace(make_toy_examples(2, 3), num_examples=num_examples).to("meta")
    config = FineTuneConfig(num_steps=1, lr=1.0, batch_size=4, num_paired_groups=2)
    indices, noise_sample = _sample_batch(examples, torch.arange(2), config, None)
    assert noise_sample is not None
    assert all(value.is_meta for value in (indices, *noise_sample))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_paired_groups_see_the_same_draws(num_groups: int) -> None:
    """From equal codes on equal examples, subjects differ by their draws alone."""
    examples, init_codes = make_toy_examples(1, 4).expand_subjects(K), draw(1, P).expand(K, -1)
    config = FineTuneConfig(num_steps=2, lr=0.1, batch_size=3, num_paired_groups=num_groups)
    torch.manual_seed(0)
    codes = fine_tune(examples, init_codes, config).codes
    is_equal = [[torch.allclose(a, b, atol=1e-5) for b in codes] for a in codes]
    is_pair = torch.arange(K) % 2 if num_groups == 2 else torch.arange(K)
    assert torch.equal(torch.tensor(is_equal), is_pair[:, None] == is_pair)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_draws_without_seeds_cover_the_examples_of_each_subject(num_groups: int) -> None:
    """Each subject has 3, 5, 1 or 4 of 5 examples; the loss of number j is about 100^j."""
    num_examples = [3, 5, 1, 4]
    latents = torch.zeros(K, 5, *SHAPE)
    ids = torch.arange(5.0).expand(K, 5)
    conditions: Any = {
        "prompt_embeds": ids[..., None, None],
        "pooled_prompt_embeds": ids[..., None],
    }
    examples = TrainingExamples(latents, conditions, num_examples=num_examples)
    codes = torch.zeros(K, P)
    config = FineTuneConfig(num_steps=40, lr=0.0, num_paired_groups=num_groups)
    torch.manual_seed(0)
    base: Any = PromptBase()
    losses = fine_tune_loras(base, examples, codes, decode, config).losses  # [steps, K]
    drawn = ((losses - 2).clamp(min=0.1).log10() / 2).round().clamp(min=0)  # [steps, K]
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [
        list(range(count)) for count in num_examples
    ]


class PromptBase(ToyBase):
    """The prediction is 10^number of the prompt, besides noise of variance 1."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        """Predict one number for all latents of an image."""
        numbers = conditions["prompt_embeds"].view(-1, 1, 1, 1)
        return super().predict(latents, timesteps, conditions) + 10**numbers


def test_text_encoder_loras_encode_the_prompts_anew() -> None:
    """The stored embeddings are not used, the other conditions are; also in validation."""
    examples = make_toy_examples(K, 3)
    stale = replace(
        examples,
        conditions={
            **examples.conditions,
            "prompt_embeds": examples.conditions["prompt_embeds"] + 5,
        },
    )
    config = FineTuneConfig(num_steps=12, lr=0.3, seeds=SEEDS, batch_size=2)
    results = []
    for layout, used in ((LAYOUT, examples), (TEXT_LAYOUT, stale)):
        probe = ValidationProbe.from_examples(used, SEEDS, 2, eval_every=2, patience=1)
        base: Any = ToyBase()
        results.append(
            fine_tune_loras(
                base,
                used,
                draw(K, P),
                lambda codes, layout=layout: LoraWeights.unflatten(layout, codes),
                config,
                probe=probe,
            )
        )
    check_close(results[1].codes, results[0].codes)
    check_close(results[1].losses, results[0].losses)
    check_close(results[1].val_losses, results[0].val_losses)
    assert len(results[0].num_steps.unique()) > 1, "some subjects stop before the others"


@pytest.mark.parametrize("num_groups", [1, 2])
def test_everything_moves_to_the_device_of_the_base(num_groups: int) -> None:
    base: Any = ToyBase("meta")
    config = FineTuneConfig(num_steps=2, lr=0.1, snapshot_steps=(1,), num_paired_groups=num_groups)
    examples = replace(make_toy_examples(K, 3), num_examples=[3, 2, 1, 3])
    result = fine_tune_loras(
        base,
        examples,
        draw(K, P),
        decode,
        config,
        prior_examples=make_toy_examples(K, 2),
        base_loras=decode(draw(K, P)),
        x0_offsets=draw(K, 3, *SHAPE),
    )
    tensors = (result.codes, result.weights.flatten(), result.losses, result.num_steps)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_only_offloads_that_keep_gradients_are_accepted() -> None:
    examples, config = make_toy_examples(K, 2), FineTuneConfig(num_steps=0, lr=0.1)
    for offload in ("none", "model"):
        base: Any = ToyBase(offload=offload)
        fine_tune_loras(base, examples, draw(K, P), decode, config)
    base = ToyBase(offload="group")
    with pytest.raises(InvalidArgumentError, match="offload 'group' moves its weights"):
        fine_tune_loras(base, examples, draw(K, P), decode, config)


def test_each_example_of_a_subject_is_drawn_as_often() -> None:
    """Of 5 and 3 examples: 1/5 and 1/3 of 6,000 draws."""
    examples = replace(make_toy_examples(2, 5), num_examples=(5, 3))
    torch.manual_seed(0)
    config = FineTuneConfig(num_steps=1, lr=0.1, batch_size=6000)
    indices, _ = _sample_batch(examples, torch.arange(2), config, None)
    for subject, count in enumerate((5, 3)):
        shares = torch.bincount(indices[:, subject], minlength=5) / 6000
        expected = torch.zeros(5)
        expected[:count] = 1 / count
        torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


def test_paired_groups_cannot_stop_early() -> None:
    examples = make_toy_examples(4, 2)
    probe = ValidationProbe.from_examples(examples, seeds=[0, 1, 2, 3], patience=2)
    config = FineTuneConfig(num_steps=1, lr=0.1, num_paired_groups=2)
    with pytest.raises(InvalidArgumentError, match="num_paired_groups and the patience"):
        fine_tune_loras(
            ToyBase(), examples, torch.zeros(4, LAYOUT.numel), decode, config, probe=probe
        )  # type: ignore[arg-type]
