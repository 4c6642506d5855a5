"""``IdentityReranker``: rank several LoRAs of the same photos by the identity in their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.weights import LoraWeights


class ImageJudge(Protocol):
    """Scores images against photos, as ``IdentitySimilarity`` and ``FaceSimilarity`` do."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images."""
        ...

    def __call__(self, photos: Tensor, images: Tensor) -> Tensor:
        """Score images [n, 3, h, w] against the photos [views, 3, h, w] of a subject: [n]."""
        ...


@dataclass(frozen=True)
class IdentityReranker:
    """Scores LoRAs by the identity similarity between their images and the photos.

    Every LoRA generates the same prompts from the same noise, so that the images differ by the
    LoRA alone.

    Attributes:
        base: The base that generates the images.
        judge: The score of an image, given photos.
        prompts: One image per prompt and LoRA.
        num_inference_steps: Denoising steps of an image.
        guidance_scale: Classifier-free guidance of an image.
    """

    base: DiffusionBase
    judge: ImageJudge
    prompts: Sequence[str]
    num_inference_steps: int = 10
    guidance_scale: float = 3.0

    def __call__(self, loras: LoraWeights, photos: Tensor) -> Tensor:
        """Score LoRAs of one subject.

        Args:
            loras: The candidates, batch n.
            photos: The photos of the subject, [views, 3, h, w] in [0, 1].

        Returns:
            The mean identity similarity of each candidate, [n].
        """
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
        size = self.judge.image_size
        pixels = torch.stack([to_tensor(image, size) for image in images])
        similarities = self.judge(photos, pixels)  # [n * prompts]
        return similarities.view(num_loras, num_prompts).mean(1)


def make_scoring_prompts(trigger_phrase: str) -> tuple[str, ...]:
    """Return plain prompts of a subject, whose images show the face well."""
    return (f"a portrait of {trigger_phrase}", f"a portrait of {trigger_phrase}, smiling")
