"""``load_lora``: read a LoRA file of any tool, or raise an error of one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from torch import nn

from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.read import MAX_PARAMETERS, LoraContent, read_lora
from hyperlora.lora.io.safetensors_file import MAX_HEADER_BYTES
from hyperlora.lora.layout import LoraLayout


@dataclass(frozen=True)
class LoraFile(LoraContent):
    """Content of a LoRA file, with its weights and metadata as a ``Lora``."""

    @property
    def lora(self) -> Lora:
        """Weights and metadata without the facts of the file."""
        return Lora(self.weights, self.metadata)


def load_lora(
    source: str | PathLike[str] | bytes,
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    max_parameters: int = MAX_PARAMETERS,
    base_id: str = "",
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> LoraFile:
    """Read a LoRA file with the keys of any program.

    LoHa, LoKr and Tucker LoCon become plain LoRAs with the same ΔW. Targets of smaller rank are
    zero-padded to the largest. With neither ``layout`` nor ``modules``, targets and shapes are
    those of the file (CLIP text encoders under ``text_model.``), and the base is what the metadata
    says or ``UNKNOWN_BASE``.

    Args:
        source: The path of a ``.safetensors`` file or of a folder that PEFT's ``save_pretrained``
            wrote, or the bytes of a file.
        layout: The file must have exactly these targets, at any rank.
        modules: The modules of the loaded base by component, e.g. ``{"unet": unet}``. The file may
            adapt any part of them and nothing else.
        max_parameters: Numbers that the LoRA may have at its largest rank; checked before padding.
        base_id: The id of the loaded base. With ``modules`` it is the base of the result, whatever
            base the file names, or ``UNKNOWN_BASE`` if it is empty.
        max_header_bytes: The largest header; ``MAX_UPLOAD_HEADER_BYTES`` for strangers' files.

    Returns:
        The content of the file.

    Raises:
        InvalidLoraFileError: The file cannot be trusted or understood.
        LayoutMismatchError: The file is not for this base.
        InvalidArgumentError: Both ``layout`` and ``modules`` are given.
    """
    content = read_lora(source, layout, modules, max_parameters, base_id, max_header_bytes)
    return LoraFile(**vars(content))
