"""The one optimiser set-up all trainings share."""

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import lightning as L
import torch
from torch import nn


def adamw_one_cycle(
    module: L.LightningModule,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> dict[str, Any]:
    """AdamW over the parameters that train; the rate rises for the fraction ``warmup`` of the trainer's steps, then
    falls to zero along a cosine. A run resumed with more steps goes on along the longer schedule."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    steps = int(module.trainer.estimated_stepping_batches)
    rising = max(1, int(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * cos(pi * min(1.0, (step - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
