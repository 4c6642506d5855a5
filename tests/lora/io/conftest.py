"""LoRAs for the tiny models; hypothesis without deadline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.weights import LoraWeights

settings.register_profile("tensors", deadline=None, max_examples=40, database=None)
settings.load_profile("tensors")


@pytest.fixture
def modules(pipe: Any) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.fixture
def random_lora() -> Callable[..., LoraWeights]:
    def make(
        modules: dict[str, nn.Module], preset: str = "attention+conv", rank: int = 3, seed: int = 0
    ) -> LoraWeights:
        layout = make_layout(modules, preset, rank, "tiny/base")
        generator = torch.Generator().manual_seed(seed)
        return LoraWeights.unflatten(layout, 0.2 * torch.randn(layout.numel, generator=generator))

    return make
