"""One LoRA fitted directly to before/after pairs, in the manner of PairEdit (2506.07992): what differential LoRAs and a
network that makes LoRAs from pairs are compared with.

A content LoRA per pair first learns the picture before. With those frozen below it, one LoRA shared by all pairs learns
to move what the denoiser expects by η σ (after - before).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_builder.baselines.differential_lora import check_pairs
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights


def fit_pair_edit(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    *,
    preset: str = "attention+mlp",
    rank: int = 8,
    finetune_steps: int = 300,
    lr: float = 2e-3,
    batch_size: int = 2,
    eta: float = 4.0,
    prompt: str = "",
    seed: int = 0,
    label: str | None = None,
) -> LoraWeights:
    """The change from ``before`` to ``after``, both [pairs, 3, h, w] in [0, 1], as one LoRA of ``rank``; ``finetune_steps`` are
    shared equally by the content LoRAs and the change. Raises ``InvalidArgumentError`` as ``fit_differential_lora`` does."""
    check_pairs(before, after)
    component = next(iter(base.modules))
    layout = make_layout({component: base.denoiser}, preset, rank, base.id)
    before_examples = make_photo_examples(base, before[:, None], prompt)
    x0_offsets = (
        make_photo_examples(base, after[:, None], prompt).latents - before_examples.latents
    ) * eta
    init_std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    num_pairs = len(before)

    def fit_loras(expand: Callable[[Tensor], LoraWeights], **fit_options: Any) -> LoraWeights:
        return fine_tune_loras(
            base.denoiser,
            base.noise_scheduler,
            before_examples,
            init_codes,
            expand,
            num_steps=max(1, finetune_steps // 2),
            lr=lr,
            batch_size=batch_size,
            progress_label=label,
            **fit_options,
        ).weights

    def expand_shared_lora(codes: Tensor) -> LoraWeights:
        return LoraWeights.unflatten(layout, codes.mean(0).expand(num_pairs, -1))

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        init_codes = (
            LoraWeights.zeros(layout, (), init_std)
            .flatten()
            .to(before.device)
            .expand(num_pairs, -1)
        )
        content_loras = fit_loras(partial(LoraWeights.unflatten, layout))
        return fit_loras(expand_shared_lora, frozen=content_loras, changes=x0_offsets)[0]
