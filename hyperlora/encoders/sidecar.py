"""What lies beside a released model and belongs to its photo encoder: named tensors and facts in one file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperlora.errors import ModelLoadError


def read_sidecar(
    path: Path, tensor_names: Sequence[str], encoder: nn.Module, rebuild_hint: str
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors ``tensor_names`` and the facts of the file, or None where there is none. Raises ``ModelLoadError`` if it is
    damaged or of another ``encoder``; ``rebuild_hint`` says how to make it anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).float() for name in tensor_names}
        is_mismatch = metadata["encoder"] != compute_encoder_fingerprint(encoder)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path} is damaged: {rebuild_hint}") from error
    if is_mismatch:
        raise ModelLoadError(
            f"{path} belongs to another photo encoder than the model beside it: {rebuild_hint}"
        )
    return tensors, metadata


def compute_encoder_fingerprint(encoder: nn.Module) -> str:
    """16 hexadecimal digits of an encoder's weights, as they are released (fp16)."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
