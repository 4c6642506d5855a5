"""Limits of the pixels that one request and one batch may denoise."""

from dataclasses import dataclass
from typing import Final

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.service.settings import EngineLimits

_MILLION: Final = 10**6


@dataclass(frozen=True)
class PixelBudget:
    """What the images of one base may cost.

    Attributes:
        base: The base that denoises.
        limits: The limits of the engine.
        default_num_steps: Denoising steps of a request that names none.
    """

    base: DiffusionBase
    limits: EngineLimits
    default_num_steps: int

    @property
    def max_pixel_steps(self) -> int:
        """Pixels times denoising steps of one image: the limit, or the base's default image."""
        default = self.default_num_steps * self.base.resolution**2
        return max(self.limits.max_pixel_steps, default)

    @property
    def max_pixels(self) -> int:
        """Pixels of one step, which nothing interrupts: the limit, or all default steps."""
        return max(self.limits.max_pixels, self.default_num_steps * self.base.resolution**2)

    def check_request(
        self,
        num_inference_steps: int | None,
        width: int | None = None,
        height: int | None = None,
        num_passes: int = 1,
    ) -> None:
        """Check that an image does not take too long.

        Args:
            num_inference_steps: Denoising steps; None for the default.
            width: Pixels; None for the base's resolution.
            height: Pixels, likewise.
            num_passes: Forward passes of one step, without those of guidance.

        Raises:
            InvalidArgumentError: It is more than ``limits.max_pixel_steps``, and more than the
                base's default image with as many passes; or one step is more than ``max_pixels``.
        """
        resolution = self.base.resolution
        width, height = width or resolution, height or resolution
        num_steps = num_inference_steps or self.default_num_steps
        default_cost = self.default_num_steps * resolution**2 * num_passes
        max_cost = max(self.limits.max_pixel_steps, default_cost)
        passes = f", each {num_passes} times," if num_passes > 1 else ""
        if (cost := num_steps * width * height * num_passes) > max_cost:
            raise InvalidArgumentError(
                f"{num_steps} steps of {width}×{height} pixels{passes} are "
                f"{cost / _MILLION:.1f} million pixel steps, at most {max_cost / _MILLION:.1f} "
                "million are taken: ask for fewer steps or a smaller image"
            )
        if (num_pixels := width * height * num_passes) > self.max_pixels:
            raise InvalidArgumentError(
                f"one step of {width}×{height} pixels{passes} is {num_pixels / _MILLION:.2f} "
                f"million pixels, at most {self.max_pixels / _MILLION:.2f} million are taken, "
                "since others wait for it: ask for a smaller image"
            )

    def compute_batch_size(self, width: int | None = None, height: int | None = None) -> int:
        """Compute how many images of one size may share a batch, at least 1.

        Args:
            width: Pixels; None for the base's resolution.
            height: Pixels, likewise.
        """
        num_pixels = (width or self.base.resolution) * (height or self.base.resolution)
        return max(1, min(self.limits.max_image_batch, self.limits.max_batch_pixels // num_pixels))
