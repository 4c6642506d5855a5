"""A base whose prediction is a polynomial, so that fine-tuning takes milliseconds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

SHAPE = (2, 4, 3)  # channels, height, width of the latents
LAYOUT = LoraLayout((TargetModule("unet.a", 2, 3), TargetModule("unet.b", 2, 1)), 1, "toy")
TEXT_LAYOUT = LoraLayout((LAYOUT.targets[0], TargetModule("text_encoder.b", 2, 1)), 1, "toy")


class ToyBase:
    """Sample j * k + i sees the LoRA i of k; a prompt is encoded as its length.

    Args:
        device: Where the results are.
        offload: As ``DiffusionBase.offload``.
    """

    check_gradients = DiffusionBase.check_gradients

    def __init__(self, device: str = "cpu", offload: str = "none") -> None:
        self.id, self.device, self.offload = "toy", torch.device(device), offload
        self.family = SimpleNamespace(denoiser_name="unet")
        self.noise_scheduler: Any = DDPMScheduler()
        self.deltas: Tensor | None = None

    @contextmanager
    def inject_lora(self, loras: LoraWeights) -> Iterator[None]:
        """Use the first ΔW of each LoRA [k, 6] inside the block."""
        self.deltas = loras.get_delta_weights()[0].flatten(1)
        yield
        self.deltas = None

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        """Predict from latents [n, c, h, w], timesteps [n] and two conditions."""
        assert self.deltas is not None
        d = self.deltas.repeat(len(latents) // len(self.deltas), 1).T.unflatten(1, (-1, 1, 1, 1))
        t = timesteps.view(-1, 1, 1, 1) / 1000
        p, q = (values.flatten(1).mean(1).view(-1, 1, 1, 1) for values in conditions.values())
        return d[0] * latents + d[1] * t + d[2] * p + d[3] * q + d[4] * latents**2 + d[5] * t * p

    def encode_prompts(self, prompts: Sequence[str], requires_grad: bool = False) -> Any:
        """Encode prompts as their lengths; the gradient is that of a text encoder's LoRA."""
        assert self.deltas is not None and requires_grad
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {"prompt_embeds": lengths.view(-1, 1, 1)}


def make_toy_examples(num_subjects: int, num_examples: int, seed: int = 0) -> TrainingExamples:
    """Make random examples, whose prompts are as long as their embeddings are large."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_subjects, num_examples)
    lengths = torch.randint(3, shape, generator=generator)
    return TrainingExamples(
        torch.randn(*shape, *SHAPE, generator=generator),
        {
            "prompt_embeds": lengths[..., None, None].float(),
            "pooled_prompt_embeds": torch.randn(*shape, 1, generator=generator),
        },
        [["x" * length for length in row] for row in lengths.tolist()],
    )
