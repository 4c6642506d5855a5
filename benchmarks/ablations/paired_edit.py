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
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.finetuning.refine import photo_examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.weights import LoraWeights


def paired(
    base: Base,
    before: Tensor,
    after: Tensor,
    *,
    preset: str = "attention+mlp",
    rank: int = 8,
    steps: int = 300,
    lr: float = 2e-3,
    batch: int = 2,
    eta: float = 4.0,
    prompt: str = "",
    seed: int = 0,
    label: str | None = None,
) -> LoraWeights:
    """The change from ``before`` to ``after``, both [pairs, 3, h, w] in [0, 1], as one LoRA of ``rank``; ``steps`` are
    shared equally by the content LoRAs and the change. Raises ``BadRequest`` as ``differential`` does."""
    check_pairs(before, after)
    component = next(iter(base.modules))
    layout = layout_of({component: base.denoiser}, preset, rank, base.id)
    here = photo_examples(base, before[:, None], prompt)
    changes = (photo_examples(base, after[:, None], prompt).latents - here.latents) * eta
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    n = len(before)

    def fitted(expand: Callable[[Tensor], LoraWeights], **more: Any) -> LoraWeights:
        return fit(
            base.denoiser, base.noise_schedule, here, start, expand, steps=max(1, steps // 2), lr=lr, batch=batch,
            label=label, **more,
        ).weights  # fmt: skip

    def shared(codes: Tensor) -> LoraWeights:
        return LoraWeights.unflatten(layout, codes.mean(0).expand(n, -1))

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        start = LoraWeights.zeros(layout, (), std).flatten().to(before.device).expand(n, -1)
        content = fitted(partial(LoraWeights.unflatten, layout))
        return fitted(shared, frozen=content, changes=changes)[0]
