"""Sidecar files of a released model, which belong to its photo encoder: tensors and metadata."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperlora.errors import ModelLoadError

FINGERPRINT_KEY: Final = "encoder_fingerprint"
"""The metadata key of the encoder's fingerprint."""


def read_sidecar(
    path: str | os.PathLike[str], tensor_names: Sequence[str], encoder: nn.Module, rebuild_hint: str
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Read a sidecar file.

    Args:
        path: The ``.safetensors`` file.
        tensor_names: The tensors to read.
        encoder: The photo encoder of the model.
        rebuild_hint: The advice at the end of error messages.

    Returns:
        The tensors in float32 by name and the metadata, or None if there is no file.

    Raises:
        ModelLoadError: The file is damaged or belongs to another encoder.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).float() for name in tensor_names}
        is_mismatch = metadata[FINGERPRINT_KEY] != compute_encoder_fingerprint(encoder)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path} is damaged: {rebuild_hint}") from error
    if is_mismatch:
        raise ModelLoadError(
            f"{path} belongs to another photo encoder than that of the model: {rebuild_hint}"
        )
    return tensors, metadata


def compute_encoder_fingerprint(encoder: nn.Module) -> str:
    """Hash the weights of an encoder, in float16 as they are released.

    Returns:
        16 hexadecimal digits.
    """
    hasher = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
