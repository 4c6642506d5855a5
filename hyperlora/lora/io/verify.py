"""``verify_file``: whether the bytes of a LoRA file are read back as the LoRA that they hold."""

from typing import Final

import torch

from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.lora.io.read import read_lora
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights

_MAX_ERROR: Final = 1e-5
"""Relative error of float32 where a format stores other factors of the same ΔW."""


def verify_file(data: bytes, weights: LoraWeights, dtype: torch.dtype) -> None:
    """Check that a file holds a LoRA, before anything of it is written.

    Args:
        data: The bytes of the file.
        weights: The LoRA that it is made from, without batch axis.
        dtype: The precision of the file.

    Raises:
        InvalidArgumentError: The file cannot be read, or has other targets, shapes or numbers.
    """
    try:
        # a fused layer that is zero keeps the ranks of its parts, four at most
        max_parameters = 4 * weights.layout.numel
        content = read_lora(data, layout=weights.layout, max_parameters=max_parameters)
    except HyperloraError as error:
        raise InvalidArgumentError(
            f"the LoRA is not written, since its file could not be read back: {error}"
        ) from error
    read_weights = content.weights
    factors = zip((*read_weights.down, *read_weights.up), (*weights.down, *weights.up), strict=True)
    if all(torch.equal(read, factor.to(dtype).float()) for read, factor in factors):
        return
    rounded_weights = weights.apply(lambda factor: factor.to(dtype).float())
    relative_error = compute_relative_error(read_weights, rounded_weights)
    if not relative_error <= _MAX_ERROR:
        raise InvalidArgumentError(
            f"the LoRA is not written, since its file would be read back with a relative error "
            f"of {relative_error:.2g}: use another format"
        )
