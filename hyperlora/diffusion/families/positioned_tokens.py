"""``PositionedTokensFamily``: what FLUX.1, FLUX.2 and their kin have in common."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, Window


class PositionedTokensFamily(PipelineFamily):
    """Adapter of denoisers whose tokens have ids (0, row, column, ...) in ``img_ids``.

    Tokens of an input image have another first id, and follow those of the noisy latents. Guidance
    is distilled where the denoiser embeds its scale: then no prompt is negative.
    """

    takes_negative_prompts: ClassVar[bool] = False
    schedulers: ClassVar[tuple[str, ...]] = (
        "FlowMatchEulerDiscrete",
        "FlowMatchLCM",
        "DPMSolverMultistep",
        "UniPCMultistep",
    )

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make the scale that the denoiser embeds."""
        return {"guidance_scale": guidance_scale}

    def make_guidance(self, latents: Tensor, guidance_scale: float | None) -> Tensor | None:
        """Make the guidance that a denoiser embeds.

        Args:
            latents: [n, ...].
            guidance_scale: None for the default of samples, so that training fits use.

        Returns:
            [n] in float32; None for a denoiser that embeds none.
        """
        if not self.denoiser.config.guidance_embeds:
            return None
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        return torch.full((len(latents),), scale, device=latents.device)

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
