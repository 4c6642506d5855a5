"""``LoraFiles``: the LoRA of one subject as a file, with that of the negative branch if any."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from hyperlora.data.images import ImageSource
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.formats import FormatChoice
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import (
    NEGATIVE_LORA_KEY,
    NEGATIVE_SHA256_KEY,
    NEGATIVE_SUFFIX,
    make_negative_path,
)
from hyperlora.lora.io.safetensors_file import write_bytes_together
from hyperlora.lora.io.save import serialize_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.photo_model import AnyPhotoModel


@dataclass(frozen=True)
class LoraFiles:
    """The content of the files of one subject's LoRA.

    Attributes:
        data: The ``.safetensors`` file of the LoRA; empty if it could not be made.
        negative: That of the negative branch of guidance; None for a model without one.
    """

    data: bytes = b""
    negative: bytes | None = None

    def write(self, path: Path) -> None:
        """Write both files or none: ``path``, and ``NAME-negative.safetensors`` beside it.

        Raises:
            InvalidArgumentError: ``path`` does not end in ``.safetensors``.
        """
        if path.suffix != ".safetensors":
            raise InvalidArgumentError(f"LoRA files are written as .safetensors, got {path.name}")
        contents = {} if self.negative is None else {make_negative_path(path): self.negative}
        write_bytes_together({**contents, path: self.data})


def serialize_lora_files(
    model: AnyPhotoModel,
    weights: LoraWeights,
    negative: LoraWeights | None,
    photos: Sequence[ImageSource],
    names: tuple[str, str],
    format: FormatChoice = "auto",
    **extra: str,
) -> LoraFiles:
    """Serialize the LoRA of one subject, the same bytes wherever it is made.

    Args:
        model: The model that generated it.
        weights: The LoRA (no batch axis).
        negative: That of the negative branch of guidance, likewise; None for none.
        photos: The photos, for their SHA-256.
        names: The title, and the name of the file without its suffix.
        format: Key names of the files.
        **extra: Further keys of the files, e.g. ``hyperlora.consent``.

    Returns:
        The files; each has been read back in memory.

    Raises:
        InvalidArgumentError: The weights hold NaN, or the format does not suit them.
        InvalidImageError: A path of ``photos`` cannot be read.
    """
    title, output_name = names
    metadata = replace(model.make_metadata(title, photos, **extra), output_name=output_name)
    if negative is None:
        return LoraFiles(_serialize(model, weights, metadata, format))
    keys = {k: v for k, v in metadata.extra.items() if k != NEGATIVE_LORA_KEY}
    negative_metadata = replace(
        metadata,
        title=f"{title}{NEGATIVE_SUFFIX}",
        output_name=f"{output_name}{NEGATIVE_SUFFIX}",
        extra=keys,
    )
    negative_data = _serialize(model, negative, negative_metadata, format)
    digest = sha256(negative_data).hexdigest()
    metadata = replace(metadata, extra={**metadata.extra, NEGATIVE_SHA256_KEY: digest})
    return LoraFiles(_serialize(model, weights, metadata, format), negative_data)


def _serialize(
    model: AnyPhotoModel, weights: LoraWeights, metadata: LoraMetadata, format: FormatChoice
) -> bytes:
    """The bytes of a file; factors may be views of a batch."""
    contiguous = weights.to("cpu").apply(torch.Tensor.contiguous)
    return serialize_lora(contiguous, format=format, metadata=metadata, dtype=model.file_dtype)
