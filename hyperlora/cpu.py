"""Faster training of small networks on a CPU: memory allocation and attention kernel."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MAX_MATH_SEQ_LEN = 1024


def disable_malloc_trim() -> None:
    """Keep freed memory in the process instead of returning it to the system (glibc only).

    Page faults otherwise take half the time of a training step on a CPU.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**28)


def select_sdpa_kernel(tensor: Tensor, seq_len: int) -> AbstractContextManager[None]:
    """Select the unfused attention kernel for training with short sequences on a CPU.

    There the backward pass of the fused kernel takes a quarter of a small UNet's training step,
    and memory does not matter.

    Args:
        tensor: Any tensor of the computation, for its device.
        seq_len: The largest number of tokens that attention spans.

    Returns:
        A context in which the kernel is selected; one without effect elsewhere.
    """
    is_short = seq_len <= _MAX_MATH_SEQ_LEN
    use_math = tensor.device.type == "cpu" and is_short and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if use_math else nullcontext()
