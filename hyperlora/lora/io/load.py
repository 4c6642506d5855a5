"""``load_lora``: read a LoRA file of any tool, or raise an error of one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from torch import nn

from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.read import MAX_PARAMETERS, LoraContent, read_lora
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
) -> LoraFile:
    """Read a ``.safetensors`` file with keys of diffusers or kohya.

    Targets of smaller rank are zero-padded to the largest. With neither ``layout`` nor ``modules``,
    targets and shapes are those of the file (CLIP text encoders under ``text_model.``), and the
    base is what the metadata says or ``UNKNOWN_BASE``.

    Args:
        source: The path of the file, or its bytes.
        layout: The file must have exactly these targets, at any rank.
        modules: The modules of the loaded base by component, e.g. ``{"unet": unet}``. The file may
            adapt any part of them and nothing else.
        max_parameters: Numbers that the LoRA may have at its largest rank; checked before padding.

    Returns:
        The content of the file.

    Raises:
        InvalidLoraFileError: The file cannot be trusted or understood.
        LayoutMismatchError: The file is not for this base.
        InvalidArgumentError: Both ``layout`` and ``modules`` are given.
    """
    return LoraFile(**vars(read_lora(source, layout, modules, max_parameters)))
