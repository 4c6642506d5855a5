"""What K subjects are fitted to, what chance decides at each step, and the draws that follow their progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """What K subjects are fitted to: ``latents`` [K, n, c, h, w] and what the denoiser is told about each
    (``encoder_hidden_states`` [K, n, tokens, width], maybe more, nested as the denoiser takes it). ``counts`` says how
    many of the n each subject has, all unless given; the others are padding."""

    latents: Tensor
    conditions: Mapping[str, Any]
    counts: Sequence[int] | None = None

    def count(self, subject: int) -> int:
        return self.latents.shape[1] if self.counts is None else self.counts[subject]

    def pick(self, choice: Tensor, subjects: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Examples ``choice`` [b, k] of ``subjects`` [k] (all K unless given) as one batch of b * k, example j of the
        i-th subject at j * k + i."""
        subject = torch.arange(choice.shape[1], device=choice.device) if subjects is None else subjects
        subject = subject.expand_as(choice)

        def picked(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: picked(v) for k, v in value.items()}
            return value[subject, choice].flatten(0, 1)

        return picked(self.latents), picked(self.conditions)

    def shared(self, k: int) -> "Examples":
        """One subject's examples as those of ``k`` subjects; nothing is copied."""

        def spread(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: spread(v) for name, v in value.items()}
            return value.expand(k, *value.shape[1:])

        counts = None if self.counts is None else tuple(self.counts) * k
        return Examples(spread(self.latents), spread(self.conditions), counts)

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """Subjects with different numbers of examples in one batch: the shorter ones are padded with their first."""
        counts = [part.latents.shape[1] for part in parts]
        most = max(counts)

        def padded(value: Tensor) -> Tensor:
            return torch.cat([value, value[:, :1].expand(-1, most - value.shape[1], *value.shape[2:])], 1)

        def together(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Mapping):
                return {k: together([v[k] for v in values]) for k in values[0]}
            return torch.cat([padded(v) for v in values])

        return cls(together([p.latents for p in parts]), together([p.conditions for p in parts]), counts)


class Chance:
    """What every step leaves to chance, drawn for each subject from its own seed, whoever else is fitted with it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, examples: Examples, batch: int, subjects: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(choice [b, k], (u [b * k], noise [b * k, c, h, w])) for ``subjects`` [k], as ``denoising_loss`` takes it."""
        shape = examples.latents.shape[2:]
        choices, places, noises = [], [], []
        for i in subjects.tolist():
            generator = self.generators[i]
            choices.append(torch.randint(examples.count(i), (batch,), generator=generator))
            places.append(torch.rand(batch, generator=generator))
            noises.append(torch.randn(batch, *shape, generator=generator))
        choice, u, noise = (torch.stack(t, 1).to(subjects.device) for t in (choices, places, noises))
        return choice, (u.flatten(), noise.flatten(0, 1).to(examples.latents))


@dataclass(frozen=True)
class Probe:
    """Fixed draws on which each subject's loss is looked at every ``every`` steps: ``choice`` and ``u`` [m, K],
    ``noise`` [m, K, c, h, w]. A subject ends after ``patience`` looks in a row that were no better than its best; it
    keeps what it was at its best."""

    examples: Examples
    choice: Tensor
    u: Tensor
    noise: Tensor
    every: int = 25
    patience: int | None = None

    @classmethod
    def of(
        cls, examples: Examples, seeds: Sequence[int], draws: int = 4, every: int = 25, patience: int | None = None
    ) -> "Probe":
        """Each subject's examples in turn, at noise levels spread evenly, noise by the subject's seed."""
        device = examples.latents.device
        noise = [
            torch.randn(draws, *examples.latents.shape[2:], generator=torch.Generator().manual_seed(~seed % 2**63))
            for seed in seeds
        ]
        choice = torch.tensor([[j % examples.count(i) for i in range(len(seeds))] for j in range(draws)])
        u = ((torch.arange(draws) + 0.5) / draws)[:, None].expand(-1, len(seeds))
        noises = torch.stack(noise, 1).to(examples.latents)
        return cls(examples, choice.to(device), u.to(device), noises, every, patience)
