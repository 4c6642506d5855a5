"""``IdentityReranker``: rank several LoRAs of the same photos by the identity in their images."""

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
    """Scores LoRAs by the identity similarity between their images and the photos.

    Every LoRA generates the same prompts from the same noise, so that the images differ by the
    LoRA alone.

    Attributes:
        base: The base that generates the images.
        identity_similarity: The score of an image, given photos.
        prompts: One image per prompt and LoRA.
        num_inference_steps: Denoising steps of an image.
        guidance_scale: Classifier-free guidance of an image.
    """

    base: DiffusionBase
    identity_similarity: IdentitySimilarity
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
        size = self.identity_similarity.image_size
        pixels = torch.stack([to_tensor(image, size) for image in images])
        similarities = self.identity_similarity(photos, pixels)  # [n * prompts]
        return similarities.view(num_loras, num_prompts).mean(1)


def make_scoring_prompts(trigger_phrase: str) -> tuple[str, ...]:
    """Return plain prompts of a subject, whose images show the face well."""
    return (f"a portrait of {trigger_phrase}", f"a portrait of {trigger_phrase}, smiling")
