"""``InstructionVocabulary``: the instructions that a network can predict, and their encoding.

The vocabulary has groups, and an instruction has at most one value of each.

* A *category* (such as hair) has one prompt per value.
* A *color space* (such as the color of the hair) has one prompt for its origin (black) and one for
  the end of each axis (red, green, blue). Any point of the unit box is a color. Its prompt is the
  sum of these prompts with weights 1 - Σ x_i, x_1, x_2, ...

The predicted prompts of all groups are added up. They may be blends
(``hyperlora.prompt_blending``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final, Self, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.prompt_blending import apply_prompt_template, combine_blends, parse_blend

# an error of 0.1 on one axis costs 50 · 0.1² = 0.5, as much as a presence of probability 0.6
POINT_LOSS_WEIGHT: Final = 50.0
"""Weight of the squared error of a color, beside the cross-entropy of its presence."""
_PRESENCE_THRESHOLD: Final = 0.5
"""Weight in an instruction above which a category's prompt counts as present."""


class InstructionVocabularyConfig(TypedDict, total=False):
    """Fields of an ``InstructionVocabulary``, as in ``vocabulary.json``; all may be missing."""

    categories: Mapping[str, Sequence[str]]
    color_axes: Mapping[str, Sequence[str]]
    undo_template: str | None
    zero_shot_prompts: Sequence[str]


@dataclass(frozen=True)
class InstructionTargets:
    """Encoded instructions of a batch of edits.

    Attributes:
        categories: [batch, num_categories]; 0 for no value, else 1 + the index of the prompt.
        points: For each color space the colors [batch, num_axes], NaN for none.
    """

    categories: Tensor
    points: Sequence[Tensor]

    def to(self, device: torch.device) -> "InstructionTargets":
        """Copy all tensors to ``device``."""
        return InstructionTargets(
            self.categories.to(device), [point.to(device) for point in self.points]
        )


@dataclass(frozen=True)
class InstructionVocabulary:
    """Groups of prompts by name.

    Letters of shapes: B edits (batch), J logits, J_i logits of group i, U prompts, C categories, m
    axes of a color space, W plain prompts of which its prompts are blends.

    Attributes:
        categories: Prompts of each category, at least one.
        color_axes: Prompts of each color space, at least two: the origin, then the axis ends.
        undo_template: Pattern with ``{}``, such as ``back to {}``, that makes a prompt which
            restores what the original image showed. None if the base knows no such prompts.
        zero_shot_prompts: Prompts that the base knows and the network does not predict. They are
            candidates of ``hyperlora.pipelines.instruction_search``.

    Raises:
        InvalidArgumentError: If there are no groups or a group has too few prompts, or if the
            pattern has no ``{}``.
    """

    categories: Mapping[str, Sequence[str]]
    color_axes: Mapping[str, Sequence[str]]
    undo_template: str | None = None
    zero_shot_prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        too_small_groups = [name for name, group in self.categories.items() if not group]
        too_small_groups += [name for name, group in self.color_axes.items() if len(group) < 2]
        if too_small_groups or not self.prompts:
            raise InvalidArgumentError(
                "a vocabulary needs a prompt for each category and two for each color axis; "
                f"too few: {too_small_groups}"
            )
        if self.undo_template is not None:
            apply_prompt_template("", self.undo_template)  # raises if it is no pattern

    @classmethod
    def from_config(cls, config: InstructionVocabularyConfig) -> Self:
        """Build a vocabulary from a part of ``config.json`` or from ``vocabulary.json``."""
        return cls(
            config.get("categories", {}),
            config.get("color_axes", {}),
            config.get("undo_template"),
            config.get("zero_shot_prompts", ()),
        )

    def to_config(self) -> InstructionVocabularyConfig:
        """Return what ``from_config`` takes, as plain JSON types."""
        config: InstructionVocabularyConfig = asdict(self)  # type: ignore[assignment]
        return config

    @cached_property
    def prompts(self) -> list[str]:
        """Prompts of all categories, then of all color spaces."""
        # the order of the U columns of prompt weights, and of the groups of logits
        groups = (*self.categories.values(), *self.color_axes.values())
        return [prompt for group in groups for prompt in group]

    @cached_property
    def undo_prompts(self) -> list[str]:
        """The undo prompt of each of ``prompts``; empty without ``undo_template``."""
        if not self.undo_template:
            return []
        return [apply_prompt_template(prompt, self.undo_template) for prompt in self.prompts]

    @cached_property
    def logit_sizes(self) -> list[int]:
        """Logits per group.

        A category has one for no value and one per prompt. A color space has one for its presence
        and one coordinate per axis.
        """
        # Example: hair (a bob, a bun) and sky (black, red, blue) have the J = 6 logits
        #   no value, a bob, a bun | presence, red, blue
        # and sizes 3 and 3. The origin (black) has no logit: its weight is 1 - red - blue.
        category_sizes = [1 + len(group) for group in self.categories.values()]
        return category_sizes + [len(group) for group in self.color_axes.values()]

    def compute_prompt_weights(self, logits: Tensor) -> Tensor:
        """Compute the weight of each prompt in a predicted instruction.

        Of each category, the prompt with the largest logit has weight 1, the others 0. All have 0
        if the logit of no value is the largest, or as large.

        Args:
            logits: [batch, sum(logit_sizes)].

        Returns:
            Weights of ``prompts``, [batch, num_prompts].
        """
        category_logits, axis_logits = self._split_logits(logits)  # each [B, J_i]
        # Of equal logits, argmax takes the first: no value. Its column is dropped: [B, J_i - 1].
        category_weights = [
            F.one_hot(group.argmax(-1), group.shape[-1])[:, 1:].to(logits)
            for group in category_logits
        ]
        axis_weights = [_compute_axis_weights(group) for group in axis_logits]  # each [B, 1 + m]
        return torch.cat([*category_weights, *axis_weights], -1)  # [B, U]

    def decode(self, prompt_weights: Tensor) -> list[str]:
        """Write instructions from prompt weights [batch, num_prompts], as blends."""
        return [
            combine_blends(dict(zip(self.prompts, row, strict=True)))
            for row in prompt_weights.tolist()
        ]

    def compute_loss(self, logits: Tensor, targets: InstructionTargets) -> Tensor:
        """Compute the loss of predicted instructions.

        Each category adds its cross-entropy, and each color the binary cross-entropy of its
        presence. A color that is present also adds ``POINT_LOSS_WEIGHT`` times its squared error.

        Args:
            logits: [batch, sum(logit_sizes)].
            targets: Encoded instructions of the edits.

        Returns:
            Loss per edit, [batch].
        """
        category_logits, axis_logits = self._split_logits(logits)  # each [B, J_i]
        losses = [
            F.cross_entropy(group, targets.categories[:, i], reduction="none")  # [B]
            for i, group in enumerate(category_logits)
        ]
        for group, point in zip(axis_logits, targets.points, strict=True):
            # not clamped to [0, 1] as in decoding: outside of it, a clamp has no gradient
            presence_logit, coordinates = group[:, 0], group[:, 1:]  # [B], [B, m]
            is_present = ~point.isnan().any(-1)  # [B]
            presence_loss = F.binary_cross_entropy_with_logits(
                presence_logit, is_present.to(group), reduction="none"
            )  # [B]
            # NaN becomes 0 first: NaN times a mask of 0 would be NaN
            squared_error = (coordinates - point.nan_to_num()).square().sum(-1)  # [B]
            losses += [presence_loss, POINT_LOSS_WEIGHT * squared_error * is_present]
        return torch.stack(losses).sum(0)  # over C + 2 losses per color space, [B]

    def is_correct(self, logits: Tensor, targets: InstructionTargets) -> Tensor:
        """Compare predicted instructions with their targets, without the colors' coordinates.

        Args:
            logits: [batch, sum(logit_sizes)].
            targets: Encoded instructions of the edits.

        Returns:
            Whether every category and the presence of every color are right, bool [batch].
        """
        category_logits, axis_logits = self._split_logits(logits)  # each [B, J_i]
        matches = [
            group.argmax(-1) == targets.categories[:, i] for i, group in enumerate(category_logits)
        ]
        # a logit above 0 is a probability above 1/2
        matches += [
            (group[:, 0] > 0) == ~point.isnan().any(-1)
            for group, point in zip(axis_logits, targets.points, strict=True)
        ]
        return torch.stack(matches).all(0)  # over all groups, [B]

    def encode(self, instructions: Sequence[str]) -> InstructionTargets:
        """Encode instructions or blends of them; the inverse of ``decode``.

        The name of a color becomes the nearest point of its color space. Prompts that are in no
        group are ignored.
        """
        prompt_weights = [parse_blend(instruction) for instruction in instructions]
        categories = torch.tensor([self._encode_categories(weights) for weights in prompt_weights])
        points = [
            torch.stack([color_space.compute_point(weights) for weights in prompt_weights])
            for color_space in self._color_spaces
        ]
        # [B, C], and for each color space [B, m]
        return InstructionTargets(
            categories.view(len(prompt_weights), len(self.categories)), points
        )

    def _split_logits(self, logits: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Split logits into those of each category and those of each color space."""
        group_logits = logits.split(self.logit_sizes, -1)  # each [B, J_i]
        return group_logits[: len(self.categories)], group_logits[len(self.categories) :]

    def _encode_categories(self, prompt_weights: Mapping[str, float]) -> list[int]:
        """Of each category 1 + the index of the first prompt that is present, else 0."""
        return [
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

    @cached_property
    def _color_spaces(self) -> list["_ColorSpace"]:
        return [_ColorSpace(group) for group in self.color_axes.values()]


class _ColorSpace:
    """Affine map between colors and weights of plain prompts, of which the axis prompts are blends.

    Let o be the weights of the origin and a_i those of the axis ends. A color x has the weights
    w = o + A x with A = [a_1 - o, a_2 - o, ...]. The inverse is x = A⁺ (w - o).
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        parsed_prompts = [parse_blend(prompt) for prompt in prompts]
        self.base_prompts = sorted(
            {base_prompt for prompt_weights in parsed_prompts for base_prompt in prompt_weights}
        )
        # o, a_1, a_2, ... as rows, [1 + m, W]
        corners = torch.stack([self._to_vector(weights) for weights in parsed_prompts])
        self.origin = corners[0]  # o [W]
        self.axes_pinv = torch.linalg.pinv((corners[1:] - corners[0]).mT)  # A⁺ [m, W] of A [W, m]

    def compute_point(self, prompt_weights: Mapping[str, float]) -> Tensor:
        """Compute the color [num_axes] of an instruction; NaN if it has none of these prompts."""
        base_weights = self._to_vector(prompt_weights)  # w [W]
        if not base_weights.any():
            return torch.full((len(self.axes_pinv),), torch.nan)
        # Least squares: weights that are no o + A x, such as a color's name, give the nearest x.
        return (self.axes_pinv @ (base_weights - self.origin)).float()  # x [m]

    def _to_vector(self, prompt_weights: Mapping[str, float]) -> Tensor:
        """The weights of ``base_prompts``, [num_base_prompts]."""
        weights = [prompt_weights.get(base_prompt, 0.0) for base_prompt in self.base_prompts]
        return torch.tensor(weights).double()


def _compute_axis_weights(axis_logits: Tensor) -> Tensor:
    """Weights of origin and axis prompts [batch, 1 + num_axes], from logits of that shape."""
    presence_logit, point = axis_logits[:, :1], axis_logits[:, 1:].clamp(0, 1)  # [B, 1], x [B, m]
    # 1 - Σ x_i, x_1, x_2, ...: below 0 for the origin of yellow = red + green - black
    weights = torch.cat([1 - point.sum(-1, keepdim=True), point], -1)  # [B, 1 + m]
    return weights * (presence_logit > 0)  # all 0 without the color
