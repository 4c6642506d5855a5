"""Of several LoRAs of the same photos, the likest: portraits drawn with each, compared with the photos."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.text_to_image import render
from hyperlora.encoders.identity_similarity import Likeness
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class Chooser:
    """``prompts`` are drawn on ``base`` in ``steps`` steps, with the same noise for every LoRA, so that they differ by
    the LoRA alone."""

    base: Base
    likeness: Likeness
    prompts: Sequence[str]
    steps: int = 10
    guidance: float = 3.0

    def __call__(self, loras: LoraWeights, photos: Tensor) -> Tensor:
        """How much each of ``loras`` (batch n) shows who is on ``photos`` [views, 3, h, w], [n]."""
        n, m = len(loras), len(self.prompts)
        each = loras[torch.arange(n).repeat_interleave(m)]
        pictures = render(
            self.base, list(self.prompts) * n, each, seeds=list(range(m)) * n, steps=self.steps, guidance=self.guidance
        )
        size = self.likeness.image_size
        drawn = torch.stack([to_tensor(picture, size) for picture in pictures])
        return self.likeness(photos.cpu(), drawn).view(n, m).mean(1)


def portraits_of(trigger: str) -> tuple[str, ...]:
    """Plain prompts to judge a likeness by."""
    return (f"a portrait of {trigger}", f"a portrait of {trigger}, smiling")
