"""``PositionedTokensFamily``: denoisers that take tokens with position ids, as FLUX does."""

import torch
from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, Window


class PositionedTokensFamily(PipelineFamily):
    """Adapter of denoisers whose tokens have ids (0, row, column, ...) in ``img_ids``.

    Tokens of an input image have another first id, and follow those of the noisy latents.
    """

    @override
    def get_grid(self, inputs: DenoiserInputs) -> tuple[int, int]:
        """Return rows and columns of the noisy latents' tokens, by their position ids."""
        rows, columns = self._get_positions(inputs).amax(0).add(1).tolist()
        return rows, columns

    @override
    def crop_inputs(self, inputs: DenoiserInputs, window: Window) -> DenoiserInputs:
        """Restrict a call to the tokens of a rectangle; those of an input image stay."""
        top, left, height, width = window
        row, column = self._get_positions(inputs).unbind(-1)  # [h/2 w/2] each
        is_inside = (row >= top) & (row < top + height) & (column >= left)
        is_inside &= column < left + width
        num_others = inputs["img_ids"].shape[-2] - len(is_inside)  # of an input image
        keep = torch.cat([is_inside, is_inside.new_ones(num_others)])
        return {
            **inputs,
            "hidden_states": inputs["hidden_states"][:, keep],
            "img_ids": inputs["img_ids"][..., keep, :],
        }

    def _get_positions(self, inputs: DenoiserInputs) -> Tensor:
        """Return row and column of each token of the noisy latents, [h/2 w/2, 2]."""
        ids = inputs["img_ids"].reshape(-1, inputs["img_ids"].shape[-1])  # of one sample, at least
        ids = ids[: inputs["img_ids"].shape[-2]].long()
        return ids[ids[:, 0] == 0, 1:3]
