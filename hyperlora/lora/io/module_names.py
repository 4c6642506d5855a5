"""``ModuleNames``: the modules of a base, found by paths with dots or without.

Where no base is given, the classes of diffusers themselves say which paths exist.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from hyperlora.lora.layout import list_layers

DENOISER_SIZES: Final[Mapping[str, Mapping[str, Any]]] = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "QwenImageTransformer2DModel": {"num_layers": 1},
    "QwenImage21Transformer2DModel": {"num_layers": 1},
    "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1},
    "SD3Transformer2DModel": {"num_layers": 2, "dual_attention_layers": (0,)},
    "Lumina2Transformer2DModel": {"num_layers": 1, "num_refiner_layers": 1},
    "HiDreamImageTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
        "llama_layers": [0, 0],
        "axes_dims_rope": (4, 2, 2),
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_routed_experts": 1,
        "num_activated_experts": 1,
        "patch_size": 2,
        "max_resolution": (8, 8),
    },
    "Krea2Transformer2DModel": {"num_layers": 1},
}
"""Transformers of diffusers, and the sizes with one block of each kind."""
_NUMBER_PATTERN: Final = re.compile(r"(?<![^\W_])\d+(?![^\W_])")
"""A number that is a whole part between dots or underscores."""


@dataclass(frozen=True)
class ModuleNames:
    """Paths of modules by component.

    Attributes:
        paths: Component to a table from a path without dots to paths with dots.
        has_templates: Whether numbers in paths stand for any number.
    """

    paths: Mapping[str, Mapping[str, tuple[str, ...]]]
    has_templates: bool = False

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "ModuleNames":
        """Build the table of exact target names, ``component.path``."""
        tables: dict[str, dict[str, tuple[str, ...]]] = {}
        for name in names:
            component, path = name.split(".", 1)
            table = tables.setdefault(component, {})
            flat_path = path.replace(".", "_")
            table[flat_path] = (*table.get(flat_path, ()), path)
        for component, table in tables.items():
            if component.startswith("text_encoder"):  # transformers 5.6 dropped text_model.
                for flat_path, paths in list(table.items()):
                    bare_path = flat_path.removeprefix("text_model_")
                    table.setdefault(bare_path, paths)
                    table.setdefault(f"text_model_{bare_path}", paths)
        return cls(tables)

    @classmethod
    @cache
    def from_denoiser_classes(cls, class_names: tuple[str, ...]) -> "ModuleNames":
        """Build the table of the paths that transformers of diffusers have, at any depth."""
        paths = dict.fromkeys(path for name in class_names for path in _list_class_paths(name))
        table = {_mask_numbers(path.replace(".", "_")): (path,) for path in reversed(paths)}
        return cls({"transformer": table}, has_templates=True)

    def find(self, components: Iterable[str], path: str) -> list[str]:
        """Find the targets that a path can mean.

        Args:
            components: Components to look into; none for all.
            path: Path of a module, whose dots may be ``_``.

        Returns:
            Target names, one for each component that has such a module.
        """
        flat_path = path.replace(".", "_")
        key = _mask_numbers(flat_path) if self.has_templates else flat_path
        names: list[str] = []
        for component in components or self.paths:
            paths = self.paths.get(component, {}).get(key, ())
            if self.has_templates and paths:
                names.append(f"{component}.{_fill_numbers(paths[0], flat_path)}")
            elif paths:
                names.append(f"{component}.{path if path in paths else paths[0]}")
        return names


@cache
def _list_class_paths(class_name: str) -> tuple[str, ...]:
    """Paths of the layers of a class of diffusers; none if this version lacks the class."""
    import diffusers

    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        return ()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = model_class(**DENOISER_SIZES[class_name])
    return tuple(path for path, _ in list_layers(model))


def _mask_numbers(flat_path: str) -> str:
    return _NUMBER_PATTERN.sub("#", flat_path)


def _fill_numbers(template: str, flat_path: str) -> str:
    """A template with the numbers of a path, in their order."""
    numbers = iter(_NUMBER_PATTERN.findall(flat_path))
    return _NUMBER_PATTERN.sub(lambda _: next(numbers), template)
