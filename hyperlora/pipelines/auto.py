"""The ways from photos to a LoRA by name, and how a released model of any of them is opened."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import hf_hub_download

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.errors import BadArtifact, BadRequest
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import PhotoModel
from hyperlora.pipelines.lora_diffusion import LoraDiffusion

METHODS: Final[Mapping[str, type[PhotoModel]]] = {"hyperdreambooth": ImageToLora, "difflora": LoraDiffusion}


def open_photo_model(
    name: str | Path | None = None, method: str | None = None, base: Base | None = None
) -> PhotoModel:  # fmt: skip
    """The model ``name`` (folder or hub id) of any method; without a name the bundle's of ``method``.

    Raises ``BadRequest`` for an unknown method, ``BadArtifact`` for a model of another one, and what
    ``from_pretrained`` raises.
    """
    if method is not None and method not in METHODS:
        raise BadRequest(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    where = name if name is not None else pretrained.PHOTO_MODELS[method or "hyperdreambooth"]
    found = method_of(where)
    if method is not None and found not in (None, method):
        raise BadArtifact(
            f"{where} is a model of the method {found}, not {method}: leave out --method, or give --model"
        )
    made: PhotoModel = METHODS[found or method or "hyperdreambooth"].from_pretrained(where, base=base)
    return made


def method_name(model: PhotoModel) -> str:
    """What ``--method`` calls the kind of ``model``."""
    return next(name for name, kind in METHODS.items() if isinstance(model, kind))


def method_of(name: str | Path) -> str | None:
    """What ``config.json`` of a model says, None where there is none to read."""
    try:
        file = Path(name) / "config.json" if Path(name).is_dir() else hf_hub_download(str(name), "config.json")
        config: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    parts = config.keys() if isinstance(config, dict) else ()
    return "difflora" if "denoiser" in parts else "hyperdreambooth" if "hypernetwork" in parts else None
