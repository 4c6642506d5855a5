"""Released models from photos by the name of their method, whatever their class."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import hf_hub_download

from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.hub_connection import require_cache_if_offline
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.pretrained_model import CLASS_NAME_KEY
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions

METHODS: Final[Mapping[str, type[ImageToLoraBase]]] = {
    "hypernetwork": ImageToLora,
    "lora-diffusion": LoraDiffusion,
}
"""The class of each method, by the name that ``--method`` takes."""
DEFAULT_METHOD: Final = "hypernetwork"


def load_image_to_lora(
    name_or_path: str | Path | None = None,
    method: str | None = None,
    base: DiffusionBase | None = None,
    compute: ComputeConfig | None = None,
) -> ImageToLoraBase:
    """Load a model from photos; its ``config.json`` names the class.

    Args:
        name_or_path: The folder or the hub id; None for the bundled model of ``method``.
        method: The expected method, ``hypernetwork`` or ``lora-diffusion``; None accepts any.
        base: The base, which spares a second load by a model that encodes photos with it.
        compute: The device of the model; None for the CPU.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: The method is unknown.
        ModelLoadError: The model is of another method, or cannot be loaded.
        LayoutMismatchError: The model is for another base than ``base``.
    """
    if method is not None and method not in METHODS:
        raise InvalidArgumentError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if name_or_path is None:
        name_or_path = pretrained.MODEL_DIR_BY_METHOD[method or DEFAULT_METHOD]
    model_method = read_method_name(name_or_path)
    if method is not None and model_method not in (None, method):
        raise ModelLoadError(
            f"{name_or_path} is a model of the method {model_method}, not {method}: "
            "leave out --method, or give --model"
        )
    model_class = METHODS[model_method or method or DEFAULT_METHOD]
    model: ImageToLoraBase = model_class.from_pretrained(name_or_path, base=base, compute=compute)
    return model


def load_photo_model(
    name_or_path: str | Path | None = None,
    method: str | None = None,
    base: DiffusionBase | None = None,
    compute: ComputeConfig | None = None,
    options: ReleasedOptions | None = None,
) -> AnyPhotoModel:
    """Load a model from photos: one of hyperlora's own, or a network that others released.

    Args:
        name_or_path: The folder or the hub id, also with ``:VARIANT``; None for the bundled model
            of ``method``.
        method: The expected method; None accepts any.
        base: The base, which spares a second load by a model that encodes photos with it.
        compute: The device of the model; None for the CPU.
        options: Where the parts of a released network come from.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: The method is unknown, or an extra is not installed.
        ModelLoadError: The model is of another method, cannot be loaded or is not known.
        LayoutMismatchError: The model is for another base than ``base``.
    """
    if name_or_path is None or is_own_model(name_or_path):
        return load_image_to_lora(name_or_path, method, base, compute)
    if method is not None:
        raise InvalidArgumentError(
            f"--method is for models of hyperlora, and {str(name_or_path)!r} is none: leave it out"
        )
    return open_released_model(str(name_or_path), options, compute)


def is_own_model(name_or_path: str | Path) -> bool:
    """Return whether a folder or hub id is a model of hyperlora, whole or in part.

    Args:
        name_or_path: The folder or the hub id, perhaps with ``:VARIANT``.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return read_method_name(name_or_path) is not None
    if (folder / "layout.json").is_file() or not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True  # a damaged one
    return isinstance(config, dict) and CLASS_NAME_KEY in config and "card" in config


def read_method_name(name_or_path: str | Path) -> str | None:
    """Read the method of a model from the class name in its ``config.json``.

    Args:
        name_or_path: The folder or the hub id.

    Returns:
        The name of the method; None if the file cannot be read or names no model from photos.
    """
    if not Path(name_or_path).exists():
        require_cache_if_offline()
    try:
        config_path = (
            Path(name_or_path) / "config.json"
            if Path(name_or_path).is_dir()
            else hf_hub_download(str(name_or_path), "config.json")
        )
        config: Any = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    class_name = config.get(CLASS_NAME_KEY) if isinstance(config, dict) else None
    return next(
        (name for name, model_class in METHODS.items() if model_class.__name__ == class_name), None
    )
