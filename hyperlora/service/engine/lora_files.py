"""LoRA files of requests: loaded for the engine's base, written with consent, batched."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.formats import FormatChoice, describe_lost_readers, resolve_format
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import MAX_UPLOAD_HEADER_BYTES
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.merge import pad_and_stack
from hyperlora.lora.weights import LoraWeights

MAX_PARAMETERS: Final = 1 << 26
"""Parameters of all LoRAs of one request after padding: 256 MiB as float32."""


def load_request_lora(
    data: bytes, base: DiffusionBase, max_parameters: int = MAX_PARAMETERS
) -> LoraWeights:
    """Load a LoRA file that a caller sent.

    Args:
        data: A ``.safetensors`` file.
        base: The base that the LoRA has to fit.
        max_parameters: Largest number of parameters after padding.

    Returns:
        The LoRA (no batch axis).

    Raises:
        InvalidLoraFileError: If the file is damaged or too large.
        LayoutMismatchError: If the LoRA does not fit the base.
    """
    return load_request_file(data, base, max_parameters)[0]


def load_request_file(
    data: bytes, base: DiffusionBase, max_parameters: int = MAX_PARAMETERS
) -> tuple[LoraWeights, LoraMetadata]:
    """Load a LoRA file that a caller sent, with what it says about itself.

    Args:
        data: A ``.safetensors`` file.
        base: The base that the LoRA has to fit.
        max_parameters: Largest number of parameters after padding.

    Returns:
        The LoRA (no batch axis) and its metadata.

    Raises:
        InvalidLoraFileError: If the file is damaged or too large.
        LayoutMismatchError: If the LoRA does not fit the base.
    """
    lora_file = load_lora(
        data,
        modules=base.modules,
        max_parameters=max_parameters,
        max_header_bytes=MAX_UPLOAD_HEADER_BYTES,
    )
    return assign_base(lora_file.weights, base), lora_file.metadata


def assign_base(weights: LoraWeights, base: DiffusionBase) -> LoraWeights:
    """Name ``base`` as the base of a LoRA that fits it, whatever name its file claims.

    Args:
        weights: A LoRA whose targets are modules of the base.
        base: The base.

    Returns:
        The same factors with the base's id in the layout.
    """
    return replace(weights, layout=replace(weights.layout, base=base.id))


def serialize_result(lora: Lora, format: FormatChoice) -> bytes:
    """Write one LoRA of a batch to the bytes of a file.

    Args:
        lora: The LoRA (no batch axis); its factors may be views of a batch.
        format: Key names of the file.

    Returns:
        A ``.safetensors`` file.
    """
    contiguous = replace(lora, weights=lora.weights.apply(torch.Tensor.contiguous))
    return contiguous.serialize(format=format)


def list_format_warnings(
    layout: LoraLayout, format: FormatChoice, architecture: str
) -> tuple[str, ...]:
    """List what to tell a caller who asks for a format that some programs cannot read.

    Args:
        layout: The layout of the LoRA.
        format: What the caller asks for; nothing is said of ``auto``.
        architecture: modelspec's name of the base.

    Returns:
        One sentence, or none.
    """
    if format == "auto":
        return ()
    file_format = resolve_format(format, layout, architecture)
    return tuple(filter(None, (describe_lost_readers(layout, file_format, architecture),)))


def make_consent_metadata(consent: bool) -> dict[str, str]:
    """Make the metadata that records the subject's consent; empty without it."""
    return {"hyperlora.consent": "given"} if consent else {}


def stack_optional_loras(loras: Sequence[LoraWeights | None]) -> LoraWeights | None:
    """Stack the LoRAs of a batch, with zeros for items that have none.

    Args:
        loras: One LoRA (no batch axis) or None per item; targets and ranks may differ.

    Returns:
        The LoRAs with a batch axis, or None if no item has one.
    """
    first_lora = next((lora for lora in loras if lora is not None), None)
    if first_lora is None:
        return None
    zero_lora = first_lora * 0.0
    return pad_and_stack([lora if lora is not None else zero_lora for lora in loras])
