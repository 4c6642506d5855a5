"""``Lora``: the weights of one LoRA together with the metadata of its file."""

from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch

from hyperlora.lora.io.formats import FormatChoice
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora, serialize_lora
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class Lora:
    """One LoRA, ready to be saved: what pipelines return and ``load_lora(...).lora`` gives back.

    Example: ``(0.7 * lora).save("me.safetensors")`` saves the LoRA at a strength of 0.7.

    Attributes:
        weights: The factors of ΔW, without batch axis.
        metadata: What the file says about the LoRA.
    """

    weights: LoraWeights
    metadata: LoraMetadata = field(default_factory=LoraMetadata)

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: FormatChoice = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write the LoRA to a ``.safetensors`` file, whole or not at all.

        Args:
            path: The file to write; its suffix is ``.safetensors``.
            format: The key names of the file (see ``save_lora``).
            dtype: float32, float16 or bfloat16.

        Returns:
            The path of the file.

        Raises:
            InvalidArgumentError: The weights or the arguments do not fit a LoRA file.
        """
        return save_lora(self.weights, path, format=format, metadata=self.metadata, dtype=dtype)

    def serialize(
        self, *, format: FormatChoice = "auto", dtype: torch.dtype = torch.float32
    ) -> bytes:
        """Compute the bytes that ``save`` writes.

        Args:
            format: The key names of the file (see ``save_lora``).
            dtype: float32, float16 or bfloat16.

        Returns:
            A whole safetensors file.

        Raises:
            InvalidArgumentError: The weights or the arguments do not fit a LoRA file.
        """
        return serialize_lora(self.weights, format=format, metadata=self.metadata, dtype=dtype)

    def __mul__(self, strength: float) -> "Lora":
        """Scale ΔW by ``strength``; the metadata stays."""
        return replace(self, weights=self.weights * strength)

    __rmul__ = __mul__

    def __neg__(self) -> "Lora":
        """Negate ΔW; the metadata stays."""
        return replace(self, weights=-self.weights)
