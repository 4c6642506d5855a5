"""The ways from photos to a LoRA by name, and how a released model of any of them is opened."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import hf_hub_download

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_diffusion import LoraDiffusion

METHODS: Final[Mapping[str, type[ImageToLoraBase]]] = {
    "hyperdreambooth": ImageToLora,
    "difflora": LoraDiffusion,
}


def load_image_to_lora(
    name_or_path: str | Path | None = None,
    method: str | None = None,
    base: DiffusionBase | None = None,
) -> ImageToLoraBase:
    """The model ``name_or_path`` (folder or hub id) of any method; without a name the bundle's of ``method``.

    Raises ``InvalidArgumentError`` for an unknown method, ``ModelLoadError`` for a model of another one, and what
    ``from_pretrained`` raises.
    """
    if method is not None and method not in METHODS:
        raise InvalidArgumentError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    model_name_or_path = (
        name_or_path
        if name_or_path is not None
        else pretrained.MODEL_DIR_BY_METHOD[method or "hyperdreambooth"]
    )
    model_method = read_method_name(model_name_or_path)
    if method is not None and model_method not in (None, method):
        raise ModelLoadError(
            f"{model_name_or_path} is a model of the method {model_method}, not {method}: leave out --method, or give --model"
        )
    model: ImageToLoraBase = METHODS[model_method or method or "hyperdreambooth"].from_pretrained(
        model_name_or_path, base=base
    )
    return model


def get_method_name(model: ImageToLoraBase) -> str:
    """What ``--method`` calls the kind of ``model``."""
    return next(name for name, model_class in METHODS.items() if isinstance(model, model_class))


def read_method_name(name_or_path: str | Path) -> str | None:
    """What ``config.json`` of a model says, None where there is none to read."""
    try:
        config_path = (
            Path(name_or_path) / "config.json"
            if Path(name_or_path).is_dir()
            else hf_hub_download(str(name_or_path), "config.json")
        )
        config: Any = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    config_keys = config.keys() if isinstance(config, dict) else ()
    return (
        "difflora"
        if "denoiser" in config_keys
        else "hyperdreambooth"
        if "hypernetwork" in config_keys
        else None
    )
