"""``TinyPipeline``: a pipeline with all its components, and what a test needs to call it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = ["a red hat on a cat", "dog"]  # of different lengths
SIDE = 32
"""Width and height of images, in pixels; latents are 16 x 16 where a VAE halves them."""


@dataclass(frozen=True)
class DenoiserCallRecord:
    """One call that a pipeline made of its denoiser, and what its scheduler got for it."""

    inputs: dict[str, Any]
    output: Any
    timestep: Tensor
    sample: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class TinyPipeline:
    """A tiny pipeline of a real class.

    Attributes:
        pipe: The pipeline, with tokenizers and text encoders.
        arguments: Of a call without guidance in classifier-free form, but for the prompts.
        unpack: diffusers' own way from the scheduler's latents to [n, c, h, w].
        guidance: Arguments of a call with classifier-free guidance; None where there is none.
        images: Input images [n, 3, h, w] in [0, 1], where the arguments hold PIL images.
        prompts: Prompts of a call; fewer where the pipeline takes fewer.
    """

    pipe: Any
    arguments: dict[str, Any]
    unpack: Callable[[Tensor], Tensor] = field(default=lambda latents: latents)
    guidance: dict[str, Any] | None = None
    images: Tensor | None = None
    prompts: tuple[str, ...] = tuple(PROMPTS)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    def record_calls(self, prompts: list[str], steps: int = 3, **arguments: Any) -> list[Any]:
        """Sample, and return a ``DenoiserCallRecord`` of each step."""
        records, calls = [], []
        step = self.pipe.scheduler.step

        def record_step(prediction: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            inputs, output = calls[-1]
            timestep = torch.as_tensor(timestep)
            records.append(
                DenoiserCallRecord(inputs, output, timestep, sample.clone(), prediction.clone())
            )
            return step(prediction, timestep, sample, **kwargs)

        with _record_forward(self.denoiser, calls):
            self.pipe.scheduler.step = record_step
            try:
                self.pipe(
                    prompt=list(prompts),
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(5),
                    output_type="latent",
                    **(self.arguments | arguments),
                )
            finally:
                del self.pipe.scheduler.step
        return records


@contextmanager
def _record_forward(module: nn.Module, calls: list[Any]) -> Iterator[None]:
    import inspect

    signature = inspect.signature(type(module).forward)
    instance_forward, forward = module.__dict__.get("forward"), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(signature.bind(module, *args, **kwargs).arguments)
        output = forward(*args, **kwargs)
        for name in ("self", "return_dict"):
            inputs.pop(name, None)
        calls.append((inputs, output[0]))
        return output

    module.forward = call
    try:
        yield
    finally:
        del module.forward
        if instance_forward is not None:
            module.forward = instance_forward


def make_vae(channels: int = 4, **options: Any) -> Any:
    """A VAE that halves the sides."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        **options,
    )


def make_image(seed: int = 0, count: int = 1) -> Tensor:
    """Input images of an edit [count, 3, SIDE, SIDE] in [0, 1]."""
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def make_pil_image(width: int, height: int, seed: int = 0) -> Any:
    """Input image of pipelines that take no tensors; ``to_tensor`` gives it to an adapter."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def to_tensor(*images: Any) -> Tensor:
    """Stack PIL images as [n, 3, h, w] in [0, 1]."""
    from torchvision.transforms.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(image) for image in images]) / 255
