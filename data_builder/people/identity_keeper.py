"""``IdentityKeeper``: what draws further images of the person on a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from PIL import Image

MAX_BATCH_SIZE: Final = 4
"""Images that are sampled together."""


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled.

    Attributes:
        num_inference_steps: Denoising steps; None for the family's default.
        guidance_scale: Scale of classifier-free guidance; None for the family's default.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None


class IdentityKeeper(Protocol):
    """Draws people on a base: references from prompts alone, and more images of a reference."""

    @property
    def scenes(self) -> Sequence[str]:
        """Scenes that it knows; empty for the built-in ones."""

    def make_prompt(self, noun: str, scene: str) -> str:
        """Make the prompt of an image of the person.

        Args:
            noun: The words for the person where there is no trigger phrase.
            scene: What else the image shows.

        Returns:
            The prompt.
        """

    def draw_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        reference: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Draw one image per prompt.

        Args:
            prompts: n prompts.
            seeds: n seeds.
            reference: The person to keep; None for whom the prompt describes.

        Returns:
            n RGB images.

        Raises:
            InvalidImageError: It finds nothing that it knows on the reference, e.g. no face.
        """
