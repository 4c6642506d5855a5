"""``verify_file``: whether the bytes of a LoRA file are read back as the LoRA that they hold."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.lora.io.read import read_lora
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights

_MAX_ERROR: Final = 1e-5
"""Relative error of float32 where a format stores other factors of the same ΔW."""
_MAX_METADATA_LENGTH: Final = 1 << 16
_MAX_STRUCTURES: Final = 64
_verified_structures: set[object] = set()
"""Structures of files that this process has verified; forgotten when there are too many."""


def verify_structure(
    data: bytes,
    weights: LoraWeights,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Run ``verify_file``, unless this process has verified a file of the same structure.

    How a file is read depends on names, shapes, alphas and architecture, and not on other numbers.

    Args:
        data: The bytes of the file.
        weights: The LoRA that it is made from, without batch axis.
        dtype: The precision of the file.
        tensors: Tensors of the file by their keys, all finite.
        metadata: Metadata of the file; texts of more than 65,536 characters are verified each time.

    Raises:
        InvalidArgumentError: See ``verify_file``.
    """
    shapes = tuple(
        (key, tensor.shape, float(tensor) if tensor.numel() == 1 else None)
        for key, tensor in tensors.items()
    )
    architecture = metadata.get("modelspec.architecture")
    structure = (weights.layout, dtype, shapes, tuple(metadata), architecture)
    is_short = sum(map(len, metadata.values())) <= _MAX_METADATA_LENGTH
    if is_short and structure in _verified_structures:
        return
    verify_file(data, weights, dtype)
    if len(_verified_structures) >= _MAX_STRUCTURES:
        _verified_structures.clear()
    _verified_structures.add(structure)


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
