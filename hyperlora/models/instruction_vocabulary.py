"""``InstructionVocabulary``: what can be said of a change, as prompts of the edit base; what a network says of it, as numbers.

Several groups, each of which says one thing or nothing. Of a *choice* that is one of its prompts; of a *mixture* any
point of a box: its first prompt is a corner, the others where the edges from it lead (colours: black, red, green,
blue). Prompts may be blends (``main_callback.prompt_blending``). What all groups say is added up. ``undo_template`` is a pattern, such as
``undo_template to {}``, for what the negative of a LoRA says: the prompts of what was there before. ``zero_shot_prompts`` prompts are
known to the base, and the network does not learn to say them (``main_callback.pipelines.instruction_search``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.prompt_blending import apply_prompt_template, combine_blends, parse_blend

POINT_LOSS_WEIGHT: Final = 50.0
"""Weight of the squared error of a point, beside the cross-entropy of whether there is one."""
_PRESENCE_THRESHOLD: Final = 0.5
"""A prompt with a larger weight in an instruction is meant, not mixed in."""


@dataclass(frozen=True)
class InstructionTargets:
    """Of each of n edits, what is said: ``categories`` [n, choices], 0 for nothing or 1 + the number of the prompt, and
    one [n, edges] of ``points`` for each mixture, NaN for nothing."""

    categories: Tensor
    points: Sequence[Tensor]

    def to(self, device: torch.device) -> "InstructionTargets":
        return InstructionTargets(
            self.categories.to(device), [point.to(device) for point in self.points]
        )


@dataclass(frozen=True)
class InstructionVocabulary:
    """Groups of prompts by name. Raises ``InvalidArgumentError`` if there are none, or too few of one."""

    categories: Mapping[str, Sequence[str]]
    color_axes: Mapping[str, Sequence[str]]
    undo_template: str | None = None
    zero_shot_prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        too_small_groups = [k for k, v in self.categories.items() if not v] + [
            k for k, v in self.color_axes.items() if len(v) < 2
        ]
        if too_small_groups or not self.prompts:
            raise InvalidArgumentError(
                f"a vocabulary needs a prompt for each choice and two for each mixture; too few: {too_small_groups}"
            )
        if self.undo_template is not None:
            apply_prompt_template("", self.undo_template)  # refuses what is no pattern

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "InstructionVocabulary":
        """From a configuration: ``categories``, ``color_axes``, ``undo_template`` and ``zero_shot_prompts``."""
        return cls(
            config.get("choices", {}),
            config.get("mixtures", {}),
            config.get("back"),
            config.get("further", ()),
        )

    @cached_property
    def prompts(self) -> list[str]:
        return [
            prompt
            for group in (*self.categories.values(), *self.color_axes.values())
            for prompt in group
        ]

    @cached_property
    def undo_prompts(self) -> list[str]:
        """What asks to go back to what each of ``prompts`` asks for; empty without a pattern for it."""
        return (
            [apply_prompt_template(prompt, self.undo_template) for prompt in self.prompts]
            if self.undo_template
            else []
        )

    @cached_property
    def logit_sizes(self) -> list[int]:
        """How many numbers say each group: of a choice, logits of nothing and of each prompt; of a mixture the logit of
        there being one, and its point."""
        return [1 + len(group) for group in self.categories.values()] + [
            len(group) for group in self.color_axes.values()
        ]

    def compute_prompt_weights(self, logits: Tensor) -> Tensor:
        """How much of each of ``prompts`` is in what is ``logits`` [n, sum of sizes]: [n, prompts]. The likeliest is
        said of each group; where nothing is likelier, all weights are 0."""
        group_logits = logits.split(self.logit_sizes, -1)
        one_hots = [
            F.one_hot(group.argmax(-1), group.shape[-1])[:, 1:]
            for group in group_logits[: len(self.categories)]
        ]
        return torch.cat(
            [
                *(one_hot.to(logits) for one_hot in one_hots),
                *map(_compute_axis_weights, group_logits[len(self.categories) :]),
            ],
            -1,
        )

    def decode(self, prompt_weights: Tensor) -> list[str]:
        """Weights [n, prompts] as instructions."""
        return [
            combine_blends(dict(zip(self.prompts, row, strict=True)))
            for row in prompt_weights.tolist()
        ]

    def compute_loss(self, logits: Tensor, targets: InstructionTargets) -> Tensor:
        """Cross-entropy of every group, and the error of points where there are some: [n]."""
        group_logits = logits.split(self.logit_sizes, -1)
        category_logits, axis_logits = (
            group_logits[: len(self.categories)],
            group_logits[len(self.categories) :],
        )
        losses = [
            F.cross_entropy(category_logit, targets.categories[:, i], reduction="none")
            for i, category_logit in enumerate(category_logits)
        ]
        for axis_logit, point in zip(axis_logits, targets.points, strict=True):
            is_present = ~point.isnan().any(-1)
            losses.append(
                F.binary_cross_entropy_with_logits(
                    axis_logit[:, 0], is_present.to(axis_logit), reduction="none"
                )
            )
            losses.append(
                POINT_LOSS_WEIGHT
                * (axis_logit[:, 1:] - point.nan_to_num()).square().sum(-1)
                * is_present
            )
        return torch.stack(losses).sum(0)

    def is_correct(self, logits: Tensor, targets: InstructionTargets) -> Tensor:
        """Whether what is said is what is meant, points aside: [n]."""
        group_logits = logits.split(self.logit_sizes, -1)
        category_logits, axis_logits = (
            group_logits[: len(self.categories)],
            group_logits[len(self.categories) :],
        )
        matches = [
            group.argmax(-1) == targets.categories[:, i] for i, group in enumerate(category_logits)
        ]
        matches += [
            (group[:, 0] > 0) != point.isnan().any(-1)
            for group, point in zip(axis_logits, targets.points, strict=True)
        ]
        return torch.stack(matches).all(0)

    def encode(self, instructions: Sequence[str]) -> InstructionTargets:
        """What instructions (or blends) of these prompts say; of a mixture the nearest point, so that a colour's name
        is its place in the box. What no group knows is passed over."""
        encoded_instructions = [
            self._encode_instruction(instruction) for instruction in instructions
        ]
        categories = torch.tensor([categories for categories, _ in encoded_instructions]).view(
            len(encoded_instructions), len(self.categories)
        )
        return InstructionTargets(
            categories,
            [
                torch.stack(points)
                for points in zip(*(points for _, points in encoded_instructions), strict=True)
            ],
        )

    def _encode_instruction(self, instruction: str) -> tuple[list[int], list[Tensor]]:
        prompt_weights = parse_blend(instruction)
        categories = [
            next(
                (
                    1 + i
                    for i, prompt in enumerate(group)
                    if prompt_weights.get(prompt, 0.0) > _PRESENCE_THRESHOLD
                ),
                0,
            )
            for group in self.categories.values()
        ]
        return categories, [
            color_space.compute_point(prompt_weights) for color_space in self._color_spaces
        ]

    @cached_property
    def _color_spaces(self) -> list["_ColorSpace"]:
        return [_ColorSpace(group) for group in self.color_axes.values()]


class _ColorSpace:
    """A mixture in the space of the plain prompts that its own are blended of."""

    def __init__(self, prompts: Sequence[str]) -> None:
        parsed_prompts = [parse_blend(prompt) for prompt in prompts]
        self.base_prompts = sorted(
            {base_prompt for prompt_weights in parsed_prompts for base_prompt in prompt_weights}
        )
        corners = torch.tensor(
            [
                [prompt_weights.get(base_prompt, 0.0) for base_prompt in self.base_prompts]
                for prompt_weights in parsed_prompts
            ]
        ).double()
        self.origin = corners[0]
        self.axes_pinv = torch.linalg.pinv((corners[1:] - corners[0]).mT)

    def compute_point(self, prompt_weights: Mapping[str, float]) -> Tensor:
        """[edges], NaN if no part is of this mixture."""
        base_weights = torch.tensor(
            [prompt_weights.get(base_prompt, 0.0) for base_prompt in self.base_prompts]
        ).double()
        if not base_weights.any():
            return torch.full((len(self.axes_pinv),), torch.nan)
        return (self.axes_pinv @ (base_weights - self.origin)).float()


def _compute_axis_weights(axis_logits: Tensor) -> Tensor:
    """Weights of a mixture's prompts [n, edges + 1], of its numbers."""
    point = axis_logits[:, 1:].clamp(0, 1)
    weights = torch.cat([1 - point.sum(-1, keepdim=True), point], -1)
    return weights * (axis_logits[:, :1] > 0)
