"""Training examples of several subjects: how they are batched, padded and drawn."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.conditions import Conditions
from hyperlora.finetuning.examples import (
    SubjectRng,
    TrainingExamples,
    ValidationProbe,
    gather_rows,
)
from tests.mock_cuda import CUDA, mock_cuda

SHAPE = (4, 3, 2)  # channels, height, width of the latents


def make_examples(
    num_subjects: int = 1,
    num_examples: int = 1,
    num_tokens: int = 2,
    start: int = 0,
    num_counted: list[int] | None = None,
    has_prompts: bool = True,
) -> TrainingExamples:
    """All numbers of example j of subject i are start + 10 i + j."""
    ids = start + 10 * torch.arange(num_subjects)[:, None] + torch.arange(num_examples)
    latents = ids.view(*ids.shape, 1, 1, 1).expand(*ids.shape, *SHAPE).float()
    embeds = ids.view(*ids.shape, 1, 1).expand(*ids.shape, num_tokens, 5).float()
    pooled = ids.view(*ids.shape, 1).expand(*ids.shape, 7).float()
    conditions: Conditions = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    prompts = [[f"p{number}" for number in row] for row in ids.tolist()]
    return TrainingExamples(latents, conditions, prompts if has_prompts else None, num_counted)


def read_ids(values: Tensor, dims: int) -> Any:
    """Read the number that fills each example, where ``dims`` axes come first."""
    flat = values.flatten(dims)
    assert (flat == flat[..., :1]).all()
    return flat[..., 0].tolist()


def iterate_tensors(examples: TrainingExamples) -> Iterator[Tensor]:
    yield from (examples.latents, *examples.conditions.values())  # type: ignore[misc]


INDICES = torch.tensor([[0, 3, 1], [2, 0, 0]])


@pytest.mark.parametrize(
    ("subjects", "expected"),
    [(None, [0, 13, 21, 2, 10, 20]), ([3, 1, 0], [30, 13, 1, 32, 10, 0])],
)
def test_gathered_batch_is_draw_major(subjects: list[int] | None, expected: list[int]) -> None:
    examples = make_examples(num_subjects=3 if subjects is None else 4, num_examples=4)
    numbers = None if subjects is None else torch.tensor(subjects)
    latents, conditions = examples.gather_examples(INDICES, numbers)
    assert read_ids(latents, 1) == expected and latents.shape == (6, *SHAPE)
    assert read_ids(conditions["prompt_embeds"], 1) == expected
    assert read_ids(conditions["pooled_prompt_embeds"], 1) == expected
    assert examples.gather_prompts(INDICES, numbers) == [f"p{number}" for number in expected]
    assert read_ids(gather_rows(examples.latents, INDICES, numbers), 1) == expected


def test_count_examples_leaves_padding_out() -> None:
    examples = make_examples(num_subjects=2, num_examples=5)
    assert (examples.count_examples(0), examples.count_examples(1)) == (5, 5)
    examples = make_examples(num_subjects=2, num_examples=4, num_counted=[4, 3])
    assert examples.count_examples(1) == 3


def test_to_moves_latents_and_conditions() -> None:
    examples = make_examples(num_subjects=2, num_examples=3)
    moved = examples.to("meta")
    assert {tensor.device.type for tensor in iterate_tensors(moved)} == {"meta"}
    assert moved.prompts == examples.prompts
    assert set(moved.conditions) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_expand_subjects_repeats_one_subject_without_a_copy() -> None:
    examples = make_examples(num_examples=3, num_counted=[2])
    repeated = examples.expand_subjects(4)
    for tensor, single in zip(iterate_tensors(repeated), iterate_tensors(examples), strict=True):
        assert read_ids(tensor, 2) == [[0, 1, 2]] * 4
        assert tensor.data_ptr() == single.data_ptr() and tensor.shape[2:] == single.shape[2:]
    assert repeated.prompts == [["p0", "p1", "p2"]] * 4
    assert repeated.num_examples == (2, 2, 2, 2)
    bare = make_examples(num_examples=3, has_prompts=False).expand_subjects(2)
    assert bare.prompts is None and bare.num_examples is None


def test_pad_and_cat_pads_by_the_first_example_of_each_subject() -> None:
    subjects = [
        make_examples(num_examples=2, num_tokens=3),
        make_examples(num_examples=4, num_tokens=1, start=10),
        make_examples(num_examples=1, num_tokens=2, start=20),
    ]
    examples = TrainingExamples.pad_and_cat(subjects)
    expected = [[0, 1, 0, 0], [10, 11, 12, 13], [20, 20, 20, 20]]
    assert read_ids(examples.latents, 2) == expected
    assert read_ids(examples.conditions["pooled_prompt_embeds"], 2) == expected
    embeds = examples.conditions["prompt_embeds"]
    assert embeds.shape == (3, 4, 3, 5) and read_ids(embeds[:, :, :1], 2) == expected
    assert (embeds[1, :, 1:] == 0).all() and read_ids(embeds[:1], 2) == expected[:1]
    assert examples.prompts == [[f"p{number}" for number in row] for row in expected]
    assert examples.num_examples == [2, 4, 1]
    subjects[1] = make_examples(num_examples=4, start=10, has_prompts=False)
    assert TrainingExamples.pad_and_cat(subjects).prompts is None


def draw_alone(seed: int, num_examples: int, batch_size: int, steps: int) -> list[Any]:
    """Example numbers, u and noise of each step, in this order from one stream."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(num_examples, (batch_size,), generator=generator),
            torch.rand(batch_size, generator=generator),
            torch.randn(batch_size, *SHAPE, generator=generator),
        )
        for _ in range(steps)
    ]


def test_subject_rng_draws_as_if_each_subject_were_alone() -> None:
    """Subject 1 pauses in the second step; its stream goes on in the third."""
    examples = make_examples(3, 4, num_counted=[4, 2, 3])
    rng, batch_size = SubjectRng([7, 8, 9]), 5
    expected = {s: iter(draw_alone(7 + s, n, batch_size, 3)) for s, n in enumerate((4, 2, 3))}
    for subjects in ([0, 1, 2], [2, 0], [1]):
        indices, (u, noise) = rng.sample_batch(examples, batch_size, torch.tensor(subjects))
        k = len(subjects)
        assert indices.shape == (batch_size, k) and u.shape == (batch_size * k,)
        assert noise.shape == (batch_size * k, *SHAPE)
        for i, subject in enumerate(subjects):
            alone = next(expected[subject])
            assert torch.equal(indices[:, i], alone[0]) and torch.equal(u[i::k], alone[1])
            assert torch.equal(noise[i::k], alone[2])


def test_subject_rng_draws_noise_in_the_precision_of_the_latents() -> None:
    examples = make_examples(2, 3)
    latents = examples.latents.half()
    indices, (u, noise) = SubjectRng([0, 1]).sample_batch(
        TrainingExamples(latents, examples.conditions), 2, torch.arange(2)
    )
    assert (indices.dtype, u.dtype, noise.dtype) == (torch.long, torch.float32, torch.float16)


def test_probe_spreads_noise_levels_and_takes_examples_in_turn() -> None:
    examples = make_examples(2, 3, num_counted=[3, 2])
    probe = ValidationProbe.from_examples(examples, [0, 2**63 + 5], num_draws=5, patience=4)
    assert probe.indices.tolist() == [[0, 0], [1, 1], [2, 0], [0, 1], [1, 0]]
    assert probe.u.tolist() == [[pytest.approx(u)] * 2 for u in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert probe.noise.shape == (5, 2, *SHAPE) and probe.noise.dtype == torch.float32
    for i, seed in enumerate((2**63 - 1, 2**63 - 6)):  # complements, modulo 2^63
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(probe.noise[:, i], torch.randn(5, *SHAPE, generator=generator))
    assert probe.examples is examples and (probe.eval_every, probe.patience) == (25, 4)


def test_probe_has_4_draws_by_default_in_the_precision_of_the_latents() -> None:
    examples = make_examples(2, 3)
    half = TrainingExamples(examples.latents.half(), examples.conditions)
    probe = ValidationProbe.from_examples(half, [1, 2], eval_every=7)
    assert len(probe.indices) == len(probe.u) == len(probe.noise) == 4
    assert probe.noise.dtype == torch.float16
    assert (probe.eval_every, probe.patience) == (7, None)


def test_probe_moves_with_its_examples() -> None:
    probe = ValidationProbe.from_examples(make_examples(2, 3), [1, 2], eval_every=7, patience=3)
    moved = probe.to("meta")
    tensors = [*iterate_tensors(moved.examples), moved.indices, moved.u, moved.noise]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.eval_every, moved.patience) == (7, 3)


def test_probe_is_made_on_the_device_of_its_examples() -> None:
    probe = ValidationProbe.from_examples(make_examples(2, 3).to("meta"), [1, 2])
    assert probe.indices.is_meta and probe.u.is_meta and probe.noise.is_meta


def test_draws_follow_their_subjects_and_noise_the_latents() -> None:
    with mock_cuda():
        subjects = torch.arange(2).to(CUDA)
        indices, (u, noise) = SubjectRng([1, 2]).sample_batch(make_examples(2, 3), 4, subjects)
        assert indices.device == u.device == CUDA and noise.device.type == "cpu"
        latents, _ = make_examples(2, 3).to(CUDA).gather_examples(indices)
        assert latents.device == CUDA and latents.shape == (8, *SHAPE)
