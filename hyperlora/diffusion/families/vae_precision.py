"""Precision of VAEs that overflow in float16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@contextmanager
def run_in_safe_precision(vae: "AutoencoderKL") -> Iterator[None]:
    """Run a VAE in float32 where its float16 overflows, as SDXL's does, within a ``with`` block."""
    needs_upcasting = vae.dtype == torch.float16 and vae.config.force_upcast
    if needs_upcasting:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if needs_upcasting:
            vae.to(dtype=torch.float16)
