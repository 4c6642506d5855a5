"""Z-Image (2511.22699), base and Turbo."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
    Window,
    broadcast_timesteps,
)


class ZImageFamily(PipelineFamily):
    """Adapter of Z-Image: lists of samples, prompts of their own lengths, time that runs upward."""

    modelspec_name = "Z-Image"
    denoiser_class_name = "ZImageTransformer2DModel"
    batches_branches = True
    schedulers = ("FlowMatchEulerDiscrete", "FlowMatchLCM")
    latents_input = "x"
    timestep_input = "t"
    time_runs_upward = True
    listed_inputs = frozenset({"x", "cap_feats"})
    size_multiple = grid_multiple = 2
    attention_pattern = r"(^|\.)attention\.(to_[qkv]|to_out\.0)$"
    feed_forward_pattern = r"\.feed_forward\.w[123]$"

    @property
    @override
    def resolution(self) -> int:
        """Side in pixels of the images that the pipeline samples by default; the model has none."""
        return 1024

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with Qwen3, padded to the longest."""
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False
        )  # n times [tokens, width]
        masks = [embed.new_ones(len(embed), dtype=torch.bool) for embed in embeds]
        return {
            "prompt_embeds": pad_sequence(embeds, batch_first=True),  # [n, tokens, width]
            "prompt_embeds_mask": pad_sequence(masks, batch_first=True),  # [n, tokens]
        }

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Make the list of embeddings that the pipeline takes."""
        return {"prompt_embeds": _split_prompts(conditions)}

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and prompts; the pipeline's scale is smaller by 1, and 0 is no guidance."""
        return {"guidance_scale": max(guidance_scale - 1, 0.0), "negative_prompt": negative_prompts}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        # float32 times as the pipeline's own: the latents' dtype would round them
        times = broadcast_timesteps(timesteps, latents.float())
        return {
            "x": list(latents.unsqueeze(2).unbind()),  # n times [c, 1, h, w], one frame
            "t": (1000 - times) / 1000,  # 1 - σ: 0 is noise, 1 clean
            "cap_feats": _split_prompts(conditions),  # n times [tokens, width]
        }

    @override
    def get_grid(self, inputs: DenoiserInputs) -> tuple[int, int]:
        """Return rows and columns of the first sample's latents [c, 1, h, w]."""
        return inputs["x"][0].shape[-2], inputs["x"][0].shape[-1]

    @override
    def crop_inputs(self, inputs: DenoiserInputs, window: Window) -> DenoiserInputs:
        """Restrict a call to a rectangle of its latents."""
        top, left, height, width = window
        cropped = [x[..., top : top + height, left : left + width] for x in inputs["x"]]
        return {**inputs, "x": cropped}

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Stack n times [c, 1, h, w] and turn x_0 - ε into the scheduler's velocity ε - x_0."""
        return -torch.stack(list(output)).squeeze(2)

    @override
    def combine_branches(self, model_output: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Apply guidance as the pipeline does, whose w is smaller by 1: v(c) + w (v(c) - v(∅)).

        Args:
            model_output: Predictions of the conditional and the unconditional branch [2 n, ...].
            guidance_scale: w, by default that of the running pipeline.

        Returns:
            The guided prediction [n, ...].
        """
        scale = self._get_guidance_scale(guidance_scale)
        text_output, uncond_output = model_output.chunk(2)  # [n, ...] each
        return text_output + scale * (text_output - uncond_output)


def _split_prompts(conditions: Conditions) -> list[Tensor]:
    """Split padded embeddings [n, tokens, width] into n of their own lengths."""
    pairs = zip(conditions["prompt_embeds"], conditions["prompt_embeds_mask"], strict=True)
    return [embed[mask] for embed, mask in pairs]
