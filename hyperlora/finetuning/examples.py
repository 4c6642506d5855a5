"""What K subjects are fitted to, what chance decides at each step, and the draws that follow their progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingExamples:
    """What K subjects are fitted to: ``latents`` [K, n, c, h, w] and what the denoiser is told about each
    (``encoder_hidden_states`` [K, n, tokens, width], maybe more, nested as the denoiser takes it). ``num_examples`` says how
    many of the n each subject has, all unless given; the others are padding."""

    latents: Tensor
    conditions: Mapping[str, Any]
    num_examples: Sequence[int] | None = None

    def count_examples(self, subject: int) -> int:
        return self.latents.shape[1] if self.num_examples is None else self.num_examples[subject]

    def gather_examples(
        self, indices: Tensor, subjects: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Examples ``indices`` [b, k] of ``subjects`` [k] (all K unless given) as one batch of b * k, example j of the
        i-th subject at j * k + i."""
        subject_indices = (
            torch.arange(indices.shape[1], device=indices.device) if subjects is None else subjects
        )
        subject_indices = subject_indices.expand_as(indices)

        def gather_tensors(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: gather_tensors(v) for k, v in value.items()}
            return value[subject_indices, indices].flatten(0, 1)

        return gather_tensors(self.latents), gather_tensors(self.conditions)

    def expand_subjects(self, num_subjects: int) -> "TrainingExamples":
        """One subject's examples as those of ``num_subjects`` subjects; nothing is copied."""

        def expand_tensors(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: expand_tensors(v) for name, v in value.items()}
            return value.expand(num_subjects, *value.shape[1:])

        num_examples = (
            None if self.num_examples is None else tuple(self.num_examples) * num_subjects
        )
        return TrainingExamples(
            expand_tensors(self.latents), expand_tensors(self.conditions), num_examples
        )

    @classmethod
    def pad_and_cat(cls, subjects: Sequence["TrainingExamples"]) -> "TrainingExamples":
        """Subjects with different numbers of examples in one batch: the shorter ones are padded with their first."""
        num_examples = [subject.latents.shape[1] for subject in subjects]
        max_examples = max(num_examples)

        def pad_examples(value: Tensor) -> Tensor:
            return torch.cat(
                [value, value[:, :1].expand(-1, max_examples - value.shape[1], *value.shape[2:])], 1
            )

        def cat_tensors(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Mapping):
                return {k: cat_tensors([v[k] for v in values]) for k in values[0]}
            return torch.cat([pad_examples(v) for v in values])

        return cls(
            cat_tensors([p.latents for p in subjects]),
            cat_tensors([p.conditions for p in subjects]),
            num_examples,
        )


class SubjectRng:
    """What every step leaves to chance, drawn for each subject from its own seed, whoever else is fitted with it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample_batch(
        self, examples: TrainingExamples, batch_size: int, subjects: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(choice [b, k], (u [b * k], noise [b * k, c, h, w])) for ``subjects`` [k], as ``compute_denoising_loss`` takes it."""
        shape = examples.latents.shape[2:]
        index_list, u_list, noise_list = [], [], []
        for i in subjects.tolist():
            generator = self.generators[i]
            index_list.append(
                torch.randint(examples.count_examples(i), (batch_size,), generator=generator)
            )
            u_list.append(torch.rand(batch_size, generator=generator))
            noise_list.append(torch.randn(batch_size, *shape, generator=generator))
        indices, u, noise = (
            torch.stack(t, 1).to(subjects.device) for t in (index_list, u_list, noise_list)
        )
        return indices, (u.flatten(), noise.flatten(0, 1).to(examples.latents))


@dataclass(frozen=True)
class ValidationProbe:
    """Fixed draws on which each subject's loss is looked at every ``eval_every`` steps: ``indices`` and ``u`` [m, K],
    ``noise`` [m, K, c, h, w]. A subject ends after ``patience`` looks in a row that were no better than its best; it
    keeps what it was at its best."""

    examples: TrainingExamples
    indices: Tensor
    u: Tensor
    noise: Tensor
    eval_every: int = 25
    patience: int | None = None

    @classmethod
    def from_examples(
        cls,
        examples: TrainingExamples,
        seeds: Sequence[int],
        num_draws: int = 4,
        eval_every: int = 25,
        patience: int | None = None,
    ) -> "ValidationProbe":
        """Each subject's examples in turn, at noise levels spread evenly, noise by the subject's seed."""
        device = examples.latents.device
        noise_per_subject = [
            torch.randn(
                num_draws,
                *examples.latents.shape[2:],
                generator=torch.Generator().manual_seed(~seed % 2**63),
            )
            for seed in seeds
        ]
        indices = torch.tensor(
            [[j % examples.count_examples(i) for i in range(len(seeds))] for j in range(num_draws)]
        )
        u = ((torch.arange(num_draws) + 0.5) / num_draws)[:, None].expand(-1, len(seeds))
        noise_batch = torch.stack(noise_per_subject, 1).to(examples.latents)
        return cls(examples, indices.to(device), u.to(device), noise_batch, eval_every, patience)
