"""Kinds of released networks and the classes that run them."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final, cast

from hyperlora.compute import ComputeConfig
from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.released.cards import ReleasedKind
from hyperlora.pipelines.released.hub_files import open_files
from hyperlora.pipelines.released.recognize import recognize
from hyperlora.pipelines.released.released_model import ReleasedModel, ReleasedOptions

MODEL_CLASSES: Final[Mapping[ReleasedKind, tuple[str, str]]] = {
    "hyperlora-sdxl": ("hyperlora_sdxl", "HyperLoraSdxl"),
    "i2l-v1": ("i2l", "ImageToLoraV1"),
    "template": ("template", "TemplateModel"),
}
"""Module in this folder and class of every kind of network from photos."""


def open_released_model(
    name: str, options: ReleasedOptions | None = None, compute: ComputeConfig | None = None
) -> AnyPhotoModel:
    """Open a released network from photos.

    Args:
        name: A folder or ``ORG/NAME``, perhaps with ``:VARIANT``.
        options: Where its parts come from.
        compute: Device and precision of the networks; None for the CPU.

    Returns:
        The model.

    Raises:
        ModelLoadError: The network is unknown, incomplete, or makes LoRAs of pairs.
        InvalidArgumentError: An extra is not installed.
    """
    options = options or ReleasedOptions()
    files = open_files(name, options.revision, options.offline)
    recognition = recognize(files)
    if recognition.kind not in MODEL_CLASSES:
        raise ModelLoadError(
            f"{name!r} makes LoRAs of edits (kind {recognition.kind}), not of photos: "
            "use `hyperlora edit`"
        )
    module_name, class_name = MODEL_CLASSES[recognition.kind]
    module = import_module(f"hyperlora.pipelines.released.{module_name}")
    model_class = cast("type[ReleasedModel[object]]", getattr(module, class_name))
    return model_class.from_files(files, recognition, options, compute)
