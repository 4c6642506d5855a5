"""Which attention kernel suits small networks on a CPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def quick_attention(like: Tensor, positions: int) -> AbstractContextManager[Any]:
    """The plain product wherever something is learned on CPU and attends over up to 1024 ``positions``, where memory
    does not matter: there the backward pass of the fused kernel takes a quarter of a small UNet's step, and half of a
    pair network's. ``like`` is any tensor of the computation."""
    small = like.device.type == "cpu" and positions <= 1024 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if small else nullcontext()
