"""What lies beside a released model and belongs to its photo encoder: named tensors and facts in one file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperlora.errors import BadArtifact


def read_beside(
    path: Path, names: Sequence[str], encoder: nn.Module, again: str
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors ``names`` and the facts of the file, or None where there is none. Raises ``BadArtifact`` if it is
    damaged or of another ``encoder``; ``again`` says how to make it anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name).float() for name in names}
        other = facts["encoder"] != digest(encoder)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadArtifact(f"{path} is damaged: {again}") from error
    if other:
        raise BadArtifact(f"{path} belongs to another photo encoder than the model beside it: {again}")
    return tensors, facts


def digest(encoder: nn.Module) -> str:
    """16 hexadecimal digits of an encoder's weights, as they are released (fp16)."""
    found = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
