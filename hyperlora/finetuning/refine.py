"""Refine a predicted LoRA on its photos by rank-relaxed fine-tuning (2307.06949, §4.3)."""

from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyperlora.compute import fork_rng
from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.config import RefineConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights

DEFAULT_RANK: Final = 8
"""Rank of the LoRA on top, unless the config gives one."""


def refine_lora(
    base: DiffusionBase,
    predicted: LoraWeights,
    photos: Tensor,
    config: RefineConfig | None = None,
    *,
    prompt: str = "a portrait of sks person",
) -> LoraWeights:
    """Fit a LoRA of larger rank on top of each predicted LoRA and merge the two by SVD.

    The predicted LoRAs stay frozen. The LoRA on top starts at ΔW = 0 and minimizes the denoising
    loss on the photos. Without ``config.is_on_top`` the factors of the predicted LoRAs themselves
    minimize it. The same arguments give the same LoRAs.

    Args:
        base: The frozen base.
        predicted: The LoRAs to refine, a batch [K].
        photos: Photos of each subject [K, views, 3, h, w] in [0, 1].
        config: Steps, ranks, learning rate and seed; by default ``RefineConfig()``.
        prompt: Prompt of every photo.

    Returns:
        The refined LoRAs, a batch [K], on the device of the base. Without ``config.out_rank``
        they have all directions of both: cut back to the predicted rank, most of the fit is lost.

    Raises:
        InvalidArgumentError: The base is offloaded so that no gradient flows through it.
    """
    config = config or RefineConfig()
    predicted = predicted.to(base.device)
    config.check_ranks(predicted.layout)
    layout = predicted.layout
    out_rank = config.out_rank or layout.rank
    is_on_top = config.is_on_top or out_rank > layout.rank  # which only a LoRA on top can fill
    if is_on_top:
        layout = layout.with_rank(config.rank or DEFAULT_RANK)
    examples = make_photo_examples(base, photos, prompt, config.resolution)
    with fork_rng(base.device):
        torch.manual_seed(config.seed)  # one random stream for the start and for the training
        init_codes = predicted.flatten().float()  # [K, P]
        if is_on_top:
            init_lora = LoraWeights.zeros(layout, (), layout.init_std)
            init_codes = init_lora.flatten().expand(len(photos), -1)
        result = fine_tune_loras(
            base,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            config.fine_tune,
            base_loras=predicted if is_on_top else None,
        )
    if is_on_top:
        return resize_sum(predicted + result.weights, config.out_rank)
    return result.weights if out_rank == layout.rank else result.weights.resize(out_rank)


def resize_sum(loras: LoraWeights, out_rank: int | None) -> LoraWeights:
    """Write the sum of predicted LoRAs and of those on top as one LoRA each.

    Args:
        loras: The sums, a batch [K]; their rank is the sum of both ranks.
        out_rank: Rank of the result; None for the smallest that loses nothing.

    Returns:
        The LoRAs, with equal singular values in both factors.
    """
    return loras.resize(out_rank or min(loras.layout.rank, loras.layout.max_rank))


def make_photo_examples(
    base: DiffusionBase, photos: Tensor, prompt: str, resolution: int | None = None
) -> TrainingExamples:
    """Make training examples from photos that share one prompt.

    Args:
        base: The base that encodes photos and prompt.
        photos: Photos of each subject [K, n, 3, h, w] in [0, 1], on any device; resized to the
            resolution if they have another one.
        prompt: The prompt of every photo.
        resolution: Pixels per side, at most those of the base; None for those.

    Returns:
        Latents [K, n, c, h/f, w/f] with the conditions of the prompt.

    Raises:
        InvalidArgumentError: The base generates nothing without an input image.
    """
    base.check_generates_images()
    num_subjects, num_photos = photos.shape[:2]
    size = (min(resolution or base.resolution, base.resolution),) * 2
    pixels = photos.flatten(0, 1)  # [K * n, 3, h, w]
    if pixels.shape[-2:] != size:
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 1)  # bicubic interpolation overshoots
    latents = base.encode_images(pixels).unflatten(0, (num_subjects, num_photos))
    conditions = map_tensors(
        lambda value: value[None].expand(num_subjects, num_photos, *value.shape[1:]),
        base.encode_prompts([prompt]),  # [1, ...]
    )  # [K, n, ...]
    prompts = [[prompt] * num_photos] * num_subjects
    return TrainingExamples(latents, conditions, prompts)
