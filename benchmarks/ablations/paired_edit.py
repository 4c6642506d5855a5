"""One LoRA fitted directly to before/after pairs, in the manner of PairEdit (2506.07992).

It is the reference for differential LoRAs and for a network that predicts LoRAs from pairs. A
content LoRA per pair first learns the image before the edit. Below it, frozen, lie the content
LoRAs while one LoRA shared by all pairs learns to move the predicted x0 by η (after - before).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data_builder.baselines.differential_lora import check_pairs
from hyperlora.compute import fork_rng
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class PairEditConfig:
    """Settings of ``fit_pair_edit``.

    Attributes:
        preset: Adapted modules.
        rank: Rank of the LoRAs.
        finetune_steps: Optimizer steps, half of them for the content LoRAs.
        lr: Learning rate of Adam.
        batch_size: Examples of each LoRA per step.
        eta: Scale η of the edit.
        prompt: Prompt of all images.
        seed: Seed of the initial factors, timesteps and noise.
    """

    preset: str = "attention+mlp"
    rank: int = 8
    finetune_steps: int = 300
    lr: float = 2e-3
    batch_size: int = 2
    eta: float = 4.0
    prompt: str = ""
    seed: int = 0


def fit_pair_edit(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    config: PairEditConfig | None = None,
    *,
    progress_label: str | None = None,
) -> LoraWeights:
    """Fit one LoRA to the edit that all pairs share.

    Args:
        base: Frozen base model.
        before: Images before the edit [pairs, 3, h, w] in [0, 1].
        after: Images after the edit [pairs, 3, h, w] in [0, 1].
        config: Settings of the fit.
        progress_label: Label of a progress bar; None: no bar.

    Returns:
        One LoRA of rank ``config.rank``.

    Raises:
        InvalidArgumentError: If the numbers of images differ or the images of a pair are equal.
    """
    config = config or PairEditConfig()
    check_pairs(before, after)
    num_pairs = len(before)
    layout = base.make_layout(config.preset, config.rank)
    before_examples = make_photo_examples(base, before[:, None], config.prompt)
    after_examples = make_photo_examples(base, after[:, None], config.prompt)
    x0_offsets = (after_examples.latents - before_examples.latents) * config.eta  # [n, 1, c, h, w]
    fine_tune_config = FineTuneConfig(
        num_steps=max(1, config.finetune_steps // 2),
        lr=config.lr,
        batch_size=config.batch_size,
        progress_label=progress_label,
    )

    def fit_loras(
        decode_codes: Callable[[Tensor], LoraWeights],
        base_loras: LoraWeights | None = None,
        x0_offsets: Tensor | None = None,
    ) -> LoraWeights:
        return fine_tune_loras(
            base,
            before_examples,
            init_codes,
            decode_codes,
            fine_tune_config,
            base_loras=base_loras,
            x0_offsets=x0_offsets,
        ).weights

    def decode_shared_lora(codes: Tensor) -> LoraWeights:
        return LoraWeights.unflatten(layout, codes.mean(0).expand(num_pairs, -1))

    with fork_rng(before.device):
        torch.manual_seed(config.seed)  # one random stream for the start and for both fits
        init_lora = LoraWeights.zeros(layout, (), layout.init_std)
        init_codes = init_lora.flatten().to(before.device).expand(num_pairs, -1)  # [pairs, P]
        content_loras = fit_loras(partial(LoraWeights.unflatten, layout))
        return fit_loras(decode_shared_lora, content_loras, x0_offsets)[0]
