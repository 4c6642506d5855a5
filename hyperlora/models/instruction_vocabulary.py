"""``Vocabulary``: what can be said of a change, as prompts of the edit base; what a network says of it, as numbers.

Several groups, each of which says one thing or nothing. Of a *choice* that is one of its prompts; of a *mixture* any
point of a box: its first prompt is a corner, the others where the edges from it lead (colours: black, red, green,
blue). Prompts may be blends (``hyperlora.prompt_blending``). What all groups say is added up. ``back`` is a pattern, such as
``back to {}``, for what the negative of a LoRA says: the prompts of what was there before. ``further`` prompts are
known to the base, and the network does not learn to say them (``hyperlora.pipelines.instruction_search``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import BadRequest
from hyperlora.prompt_blending import parts_of, reworded, told

PRECISELY: Final = 50.0
"""Weight of the squared error of a point, beside the cross-entropy of whether there is one."""
_MEANT: Final = 0.5
"""A prompt with a larger weight in an instruction is meant, not mixed in."""


@dataclass(frozen=True)
class Meaning:
    """Of each of n edits, what is said: ``choices`` [n, choices], 0 for nothing or 1 + the number of the prompt, and
    one [n, edges] of ``points`` for each mixture, NaN for nothing."""

    choices: Tensor
    points: Sequence[Tensor]

    def to(self, device: torch.device) -> "Meaning":
        return Meaning(self.choices.to(device), [point.to(device) for point in self.points])


@dataclass(frozen=True)
class Vocabulary:
    """Groups of prompts by name. Raises ``BadRequest`` if there are none, or too few of one."""

    choices: Mapping[str, Sequence[str]]
    mixtures: Mapping[str, Sequence[str]]
    back: str | None = None
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        few = [k for k, v in self.choices.items() if not v] + [k for k, v in self.mixtures.items() if len(v) < 2]
        if few or not self.prompts:
            raise BadRequest(f"a vocabulary needs a prompt for each choice and two for each mixture; too few: {few}")
        if self.back is not None:
            reworded("", self.back)  # refuses what is no pattern

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Vocabulary":
        """From a configuration: ``choices``, ``mixtures``, ``back`` and ``further``."""
        return cls(given.get("choices", {}), given.get("mixtures", {}), given.get("back"), given.get("further", ()))

    @cached_property
    def prompts(self) -> list[str]:
        return [prompt for group in (*self.choices.values(), *self.mixtures.values()) for prompt in group]

    @cached_property
    def ways_back(self) -> list[str]:
        """What asks to go back to what each of ``prompts`` asks for; empty without a pattern for it."""
        return [reworded(prompt, self.back) for prompt in self.prompts] if self.back else []

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers say each group: of a choice, logits of nothing and of each prompt; of a mixture the logit of
        there being one, and its point."""
        return [1 + len(group) for group in self.choices.values()] + [len(group) for group in self.mixtures.values()]

    def weights(self, said: Tensor) -> Tensor:
        """How much of each of ``prompts`` is in what is ``said`` [n, sum of sizes]: [n, prompts]. The likeliest is
        said of each group; where nothing is likelier, all weights are 0."""
        parts = said.split(self.sizes, -1)
        named = [F.one_hot(part.argmax(-1), part.shape[-1])[:, 1:] for part in parts[: len(self.choices)]]
        return torch.cat([*(one.to(said) for one in named), *map(_mixed, parts[len(self.choices) :])], -1)

    def told(self, weights: Tensor) -> list[str]:
        """Weights [n, prompts] as instructions."""
        return [told(dict(zip(self.prompts, row, strict=True))) for row in weights.tolist()]

    def loss(self, said: Tensor, meant: Meaning) -> Tensor:
        """Cross-entropy of every group, and the error of points where there are some: [n]."""
        parts = said.split(self.sizes, -1)
        named, mixed = parts[: len(self.choices)], parts[len(self.choices) :]
        losses = [F.cross_entropy(p, meant.choices[:, i], reduction="none") for i, p in enumerate(named)]
        for part, point in zip(mixed, meant.points, strict=True):
            there = ~point.isnan().any(-1)
            losses.append(F.binary_cross_entropy_with_logits(part[:, 0], there.to(part), reduction="none"))
            losses.append(PRECISELY * (part[:, 1:] - point.nan_to_num()).square().sum(-1) * there)
        return torch.stack(losses).sum(0)

    def right(self, said: Tensor, meant: Meaning) -> Tensor:
        """Whether what is said is what is meant, points aside: [n]."""
        parts = said.split(self.sizes, -1)
        named, mixed = parts[: len(self.choices)], parts[len(self.choices) :]
        same = [part.argmax(-1) == meant.choices[:, i] for i, part in enumerate(named)]
        same += [(part[:, 0] > 0) != point.isnan().any(-1) for part, point in zip(mixed, meant.points, strict=True)]
        return torch.stack(same).all(0)

    def meant(self, instructions: Sequence[str]) -> Meaning:
        """What instructions (or blends) of these prompts say; of a mixture the nearest point, so that a colour's name
        is its place in the box. What no group knows is passed over."""
        each = [self._meant(instruction) for instruction in instructions]
        choices = torch.tensor([choices for choices, _ in each]).view(len(each), len(self.choices))
        return Meaning(choices, [torch.stack(points) for points in zip(*(points for _, points in each), strict=True)])

    def _meant(self, instruction: str) -> tuple[list[int], list[Tensor]]:
        parts = parts_of(instruction)
        choices = [
            next((1 + i for i, prompt in enumerate(group) if parts.get(prompt, 0.0) > _MEANT), 0)
            for group in self.choices.values()
        ]
        return choices, [box.point(parts) for box in self._boxes]

    @cached_property
    def _boxes(self) -> list["_Box"]:
        return [_Box(group) for group in self.mixtures.values()]


class _Box:
    """A mixture in the space of the plain prompts that its own are blended of."""

    def __init__(self, prompts: Sequence[str]) -> None:
        blends = [parts_of(prompt) for prompt in prompts]
        self.plain = sorted({part for parts in blends for part in parts})
        corners = torch.tensor([[parts.get(part, 0.0) for part in self.plain] for parts in blends]).double()
        self.corner = corners[0]
        self.inverse = torch.linalg.pinv((corners[1:] - corners[0]).mT)

    def point(self, parts: Mapping[str, float]) -> Tensor:
        """[edges], NaN if no part is of this mixture."""
        mixed = torch.tensor([parts.get(part, 0.0) for part in self.plain]).double()
        if not mixed.any():
            return torch.full((len(self.inverse),), torch.nan)
        return (self.inverse @ (mixed - self.corner)).float()


def _mixed(part: Tensor) -> Tensor:
    """Weights of a mixture's prompts [n, edges + 1], of its numbers."""
    point = part[:, 1:].clamp(0, 1)
    weights = torch.cat([1 - point.sum(-1, keepdim=True), point], -1)
    return weights * (part[:, :1] > 0)
