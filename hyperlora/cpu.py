"""Keep freed memory in the process: on CPU, half the time of a training step otherwise goes into page faults."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def disable_malloc_trim() -> None:
    """Tell glibc's malloc not to hand large freed blocks back to the system; does nothing elsewhere."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**28)


def select_sdpa_kernel(tensor: Tensor, seq_len: int) -> AbstractContextManager[Any]:
    """The plain product wherever something is learned on CPU and attends over up to 1024 ``seq_len``, where memory
    does not matter: there the backward pass of the fused kernel takes a quarter of a small UNet's step, and half of a
    pair network's. ``tensor`` is any tensor of the computation."""
    use_math = tensor.device.type == "cpu" and seq_len <= 1024 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if use_math else nullcontext()
