"""Components that a pipeline's folder leaves to another pipeline: one autoencoder for two bases.

In a repository they are symbolic links, which diffusers follows. Wheels hold no links, and neither
do many checkouts on Windows. So ``model_index.json`` says the same under a key that diffusers
ignores: ``"_shared_components": {"vae": "../base"}``.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from hyperlora.errors import ModelLoadError

SHARED_COMPONENTS_KEY: Final = "_shared_components"
"""The key of ``model_index.json``: folders of pipelines, relative to its own, by component."""
_LIBRARIES: Final = ("diffusers", "transformers")


def load_shared_components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the components that a pipeline's folder names, but neither holds nor links.

    Args:
        folder: Folder of the pipeline.
        dtype: Precision of components with weights.

    Returns:
        Arguments for ``DiffusionPipeline.from_pretrained``, by component.

    Raises:
        ModelLoadError: The other pipeline is not there, or a component has no known class.
        ValueError: ``model_index.json`` is damaged.
    """
    model_index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pipeline_dirs = _read_object(_read_object(model_index).get(SHARED_COMPONENTS_KEY, {}))
    return {
        name: _load_component(folder, str(pipeline_dir), name, model_index.get(name), dtype)
        for name, pipeline_dir in pipeline_dirs.items()
        if not (folder / name).is_dir()
    }


def _read_object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("model_index.json is damaged: an object was expected")
    return value


def _load_component(
    folder: Path, pipeline_dir: str, name: str, class_path: object, dtype: torch.dtype
) -> Any:  # noqa: ANN401 - a model, a tokenizer or a scheduler
    component_dir = folder / pipeline_dir / name
    if not component_dir.is_dir():
        raise ModelLoadError(
            f"{folder} shares its {name} with {component_dir.parent}, which is not there: "
            "fetch that pipeline too"
        )
    component_class: Any = None
    match class_path:
        case [str(library), str(class_name)] if library in _LIBRARIES:
            component_class = getattr(import_module(library), class_name, None)
    if not hasattr(component_class, "from_pretrained"):
        raise ModelLoadError(
            f"{folder} shares its {name}, whose class is {class_path!r}: "
            f"a class of {' or '.join(_LIBRARIES)} was expected"
        )
    options = {"dtype": dtype} if issubclass(component_class, nn.Module) else {}
    return component_class.from_pretrained(component_dir, **options)
