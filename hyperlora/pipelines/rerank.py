"""Of several LoRAs of the same photos, the likest: portraits drawn with each, compared with the photos."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class IdentityReranker:
    """``prompts`` are drawn on ``base`` in ``num_inference_steps`` steps, with the same noise for every LoRA, so that they differ by
    the LoRA alone."""

    base: DiffusionBase
    identity_similarity: IdentitySimilarity
    prompts: Sequence[str]
    num_inference_steps: int = 10
    guidance_scale: float = 3.0

    def __call__(self, loras: LoraWeights, photos: Tensor) -> Tensor:
        """How much each of ``measure_lora_throughput`` (batch n) shows who is on ``load_photos`` [views, 3, h, w], [n]."""
        num_loras, num_prompts = len(loras), len(self.prompts)
        repeated_loras = loras[torch.arange(num_loras).repeat_interleave(num_prompts)]
        images = generate_images(
            self.base,
            list(self.prompts) * num_loras,
            repeated_loras,
            seeds=list(range(num_prompts)) * num_loras,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        size = self.identity_similarity.image_size
        image_tensors = torch.stack([to_tensor(image, size) for image in images])
        return (
            self.identity_similarity(photos.cpu(), image_tensors)
            .view(num_loras, num_prompts)
            .mean(1)
        )


def make_scoring_prompts(trigger_phrase: str) -> tuple[str, ...]:
    """Plain prompts to judge a likeness by."""
    return (f"a portrait of {trigger_phrase}", f"a portrait of {trigger_phrase}, smiling")
