"""Gradients of LoRAs through frozen transformers in half precision, with recomputed activations."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.lora.weights import LoraWeights
from hyperlora.training.modules.frozen_base import load_training_base
from hyperlora.training.sharding import list_block_names
from tests.tiny_pipelines.base import SIDE
from tests.training.conftest import TRANSFORMERS

PROMPTS = ["a cat", "a dog on a hill"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_through_bfloat16_and_checkpoints(name: str, workspace: Path) -> None:
    """As in the configurations: the base in bfloat16, autocast around it, blocks recomputed."""
    folder = workspace / "tiny" / name
    full = compute_gradient(load_training_base(folder), is_mixed=False)
    assert full.isfinite().all()
    assert full.norm() > 0
    # without checkpoints another kernel of attention is chosen, which rounds differently
    assert (
        measure_error(compute_gradient(checkpoint(folder, "float32"), is_mixed=False), full) < 1e-4
    )
    half = compute_gradient(load_training_base(folder, dtype="bfloat16"), is_mixed=True)
    assert measure_error(half, full) < 0.1
    recomputed = compute_gradient(checkpoint(folder, "bfloat16"), is_mixed=True)
    assert measure_error(recomputed, full) < 0.1


def checkpoint(folder: Path, dtype: str) -> DiffusionBase:
    """Load a base that recomputes activations."""
    base = load_training_base(folder, dtype=dtype)
    base.denoiser.enable_gradient_checkpointing()
    return base


def measure_error(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


def compute_gradient(base: DiffusionBase, is_mixed: bool) -> Tensor:
    """The gradient of a training loss with respect to one LoRA per sample, as one vector."""
    layout = base.make_layout("attention", 4)
    generator = torch.Generator().manual_seed(0)
    flat = 0.1 * torch.randn(len(PROMPTS), layout.numel, generator=generator)
    flat.requires_grad_()
    images = torch.rand(len(PROMPTS), 3, SIDE, SIDE, generator=generator)
    latents = base.encode_images(images).float()
    conditions = base.encode_prompts(PROMPTS, images=images)
    if base.family.edits_images:
        conditions["image_latents"] = latents
    noise = torch.randn(latents.shape, generator=generator)
    uniform = torch.tensor([0.3, 0.7])
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
        base.inject_lora(LoraWeights.unflatten(layout, flat)),
    ):
        loss = compute_denoising_loss(
            base.predict,
            base.noise_scheduler,
            latents,
            conditions,
            noise_sample=(uniform, noise),
        ).mean()
    count = count_recomputed_blocks(base)
    loss.backward()
    assert (count[0] > 0) == base.denoiser.is_gradient_checkpointing
    assert flat.grad is not None
    assert all(p.grad is None for p in base.denoiser.parameters())
    return flat.grad.flatten()


def count_recomputed_blocks(base: DiffusionBase) -> list[int]:
    """Count the forward passes of blocks during backward passes, in a list."""
    count = [0]

    def record(*_: object) -> None:
        count[0] += torch._C._current_graph_task_id() != -1

    for module in base.denoiser.modules():
        if type(module).__name__ in list_block_names(base.denoiser):
            module.register_forward_pre_hook(record)
    return count
