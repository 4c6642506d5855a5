"""Training examples of K subjects, the random draws of each step, and the validation draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperlora.diffusion.conditions import Conditions, map_tensors, pad_tokens

NoiseSample = tuple[Tensor, Tensor]
"""(u, noise) for a batch of n: u [n] in [0, 1) gives the timestep, noise [n, c, h, w] is added."""


@dataclass(frozen=True)
class TrainingExamples:
    """Training examples of K subjects, n for each.

    Attributes:
        latents: Clean latents [K, n, c, h, w].
        conditions: Of each example, [K, n, ...] each, e.g. ``prompt_embeds`` [K, n, tokens,
            width].
        prompts: Prompts of each example [K][n], for LoRAs of text encoders, which change the
            conditions at every step. None where they are not needed.
        num_examples: Examples of each subject [K]; the remaining ones of the n are padding.
            None: all n.
    """

    latents: Tensor
    conditions: Conditions
    prompts: Sequence[Sequence[str]] | None = None
    num_examples: Sequence[int] | None = None

    def count_examples(self, subject: int) -> int:
        """Count the examples of one subject, without padding."""
        return self.latents.shape[1] if self.num_examples is None else self.num_examples[subject]

    def gather_examples(
        self, indices: Tensor, subjects: Tensor | None = None
    ) -> tuple[Tensor, Conditions]:
        """Gather examples of several subjects into one batch.

        Args:
            indices: Numbers of the examples to take [b, k].
            subjects: Numbers of the k subjects [k]; all K by default.

        Returns:
            Latents [b * k, c, h, w] and conditions [b * k, ...]. Example j of the i-th subject
            stands at j * k + i, the order in which ``inject_lora`` assigns LoRAs to samples.
        """
        latents = gather_rows(self.latents, indices, subjects)
        conditions = map_tensors(lambda t: gather_rows(t, indices, subjects), self.conditions)
        return latents, conditions

    def gather_prompts(self, indices: Tensor, subjects: Tensor | None = None) -> list[str]:
        """Gather the prompts of the examples that ``gather_examples`` returns, in its order.

        Args:
            indices: Numbers of the examples [b, k].
            subjects: Numbers of the k subjects [k]; all K by default.

        Returns:
            b * k prompts.
        """
        assert self.prompts is not None, "these examples were made without prompts"
        numbers = range(indices.shape[1]) if subjects is None else subjects.tolist()
        return [
            self.prompts[subject][index]
            for row in indices.tolist()
            for subject, index in zip(numbers, row, strict=True)
        ]

    def to(self, device: torch.device | str) -> "TrainingExamples":
        """Move latents and conditions, as ``Tensor.to`` does."""
        conditions = map_tensors(lambda value: value.to(device), self.conditions)
        return replace(self, latents=self.latents.to(device), conditions=conditions)

    def expand_subjects(self, num_subjects: int) -> "TrainingExamples":
        """Repeat the examples of one subject for ``num_subjects`` subjects, without a copy."""

        def expand_tensor(value: Tensor) -> Tensor:
            """Expand the subject axis from 1."""
            return value.expand(num_subjects, *value.shape[1:])  # [K, n, ...]

        num_examples = (
            None if self.num_examples is None else tuple(self.num_examples) * num_subjects
        )
        return TrainingExamples(
            expand_tensor(self.latents),
            map_tensors(expand_tensor, self.conditions),
            None if self.prompts is None else list(self.prompts) * num_subjects,
            num_examples,
        )

    @classmethod
    def pad_and_cat(cls, subjects: Sequence["TrainingExamples"]) -> "TrainingExamples":
        """Concatenate subjects with different numbers of examples, padded by their first one."""
        num_examples = [subject.latents.shape[1] for subject in subjects]
        max_examples = max(num_examples)

        def pad_tensor(value: Tensor) -> Tensor:
            """Pad the example axis to ``max_examples``."""
            num_missing = max_examples - value.shape[1]
            return torch.cat([value, value[:, :1].expand(-1, num_missing, *value.shape[2:])], 1)

        def cat_tensors(*values: Tensor) -> Tensor:
            """Pad and concatenate along the subject axis."""
            return torch.cat([pad_tensor(value) for value in values])  # [K, max_examples, ...]

        return cls(
            cat_tensors(*(subject.latents for subject in subjects)),
            map_tensors(cat_tensors, *pad_tokens([subject.conditions for subject in subjects])),
            _pad_prompts(subjects, max_examples),
            num_examples,
        )


def _pad_prompts(subjects: Sequence[TrainingExamples], max_examples: int) -> list[list[str]] | None:
    """Pad the prompts of each subject by its first one; None if a subject has none."""
    rows = []
    for subject in subjects:
        if subject.prompts is None:
            return None
        rows += [[*row, *row[:1] * (max_examples - len(row))] for row in map(list, subject.prompts)]
    return rows


def gather_rows(values: Tensor, indices: Tensor, subjects: Tensor | None = None) -> Tensor:
    """Gather rows of [K, n, ...] into one batch.

    Args:
        values: Values of n examples of K subjects [K, n, ...].
        indices: Numbers of the examples to take [b, k].
        subjects: Numbers of the k subjects [k]; all K by default.

    Returns:
        [b * k, ...], example j of the i-th subject at j * k + i.
    """
    if subjects is None:
        subjects = torch.arange(indices.shape[1], device=indices.device)
    return values[subjects.expand_as(indices), indices].flatten(0, 1)


class SubjectRng:
    """One random stream per subject, so that draws do not depend on the other subjects.

    Args:
        seeds: One seed for each of the K subjects.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample_batch(
        self, examples: TrainingExamples, batch_size: int, subjects: Tensor
    ) -> tuple[Tensor, NoiseSample]:
        """Draw the random numbers of one step.

        Args:
            examples: The examples of all K subjects.
            batch_size: Examples b of each subject.
            subjects: Numbers of the k subjects to draw for [k].

        Returns:
            Example numbers [b, k] and (u [b * k], noise [b * k, c, h, w]), as
            ``compute_denoising_loss`` takes it.
        """
        shape = examples.latents.shape[2:]  # (c, h, w)
        index_list, u_list, noise_list = [], [], []
        for subject in subjects.tolist():
            generator = self.generators[subject]
            num_examples = examples.count_examples(subject)
            index_list.append(torch.randint(num_examples, (batch_size,), generator=generator))
            u_list.append(torch.rand(batch_size, generator=generator))
            noise_list.append(torch.randn(batch_size, *shape, generator=generator))
        indices = torch.stack(index_list, 1).to(subjects.device)  # [b, k]
        u = torch.stack(u_list, 1).to(subjects.device)  # [b, k]
        noise = torch.stack(noise_list, 1).to(subjects.device)  # [b, k, c, h, w]
        return indices, (u.flatten(), noise.flatten(0, 1).to(examples.latents))


@dataclass(frozen=True)
class ValidationProbe:
    """Fixed draws on which the loss of each subject is validated, and the early stopping by it.

    Attributes:
        examples: The validation examples of K subjects.
        indices: Example numbers of m draws [m, K].
        u: Timestep draws in [0, 1) [m, K].
        noise: Noise [m, K, c, h, w].
        eval_every: Steps between two validations.
        patience: A subject stops after this many validations in a row without improvement; its
            result is that of its lowest loss. None: no early stopping.
    """

    examples: TrainingExamples
    indices: Tensor
    u: Tensor
    noise: Tensor
    eval_every: int = 25
    patience: int | None = None

    def to(self, device: torch.device | str) -> "ValidationProbe":
        """Move the examples and the draws, as ``Tensor.to`` does."""
        return replace(
            self,
            examples=self.examples.to(device),
            indices=self.indices.to(device),
            u=self.u.to(device),
            noise=self.noise.to(device),
        )

    @classmethod
    def from_examples(
        cls,
        examples: TrainingExamples,
        seeds: Sequence[int],
        num_draws: int = 4,
        eval_every: int = 25,
        patience: int | None = None,
    ) -> "ValidationProbe":
        """Make draws that take the examples of each subject in turn, at evenly spread noise levels.

        Args:
            examples: The validation examples of K subjects.
            seeds: One seed for each subject [K], for its noise.
            num_draws: Draws m of each subject.
            eval_every: Steps between two validations.
            patience: Validations without improvement before a subject stops; None: no early stop.

        Returns:
            The probe.
        """
        device = examples.latents.device
        shape = examples.latents.shape[2:]  # (c, h, w)
        # the complement of a seed gives a stream that training with the seed does not use
        noise_per_subject = [
            torch.randn(num_draws, *shape, generator=torch.Generator().manual_seed(~seed % 2**63))
            for seed in seeds
        ]
        noise = torch.stack(noise_per_subject, 1).to(examples.latents)  # [m, K, c, h, w]
        indices = torch.tensor(
            [[j % examples.count_examples(i) for i in range(len(seeds))] for j in range(num_draws)]
        )  # [m, K]
        u = ((torch.arange(num_draws) + 0.5) / num_draws)[:, None].expand(-1, len(seeds))  # [m, K]
        return cls(examples, indices.to(device), u.to(device), noise, eval_every, patience)
