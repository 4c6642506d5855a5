"""What tests of families record of a running pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def record_batch_sizes(denoiser: nn.Module) -> Iterator[list[int]]:
    """Record the batch size of each call of a transformer, within a ``with`` block."""
    batch_sizes: list[int] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        batch_sizes.append(len(kwargs["hidden_states"]))

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield batch_sizes
    finally:
        hook.remove()
