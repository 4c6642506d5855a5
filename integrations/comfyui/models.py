"""Models that the nodes run: their list, and the one of each kind that stays loaded."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hyperlora.pipelines.pair_to_lora import PairToLora
    from hyperlora.pipelines.photo_model import AnyPhotoModel

BUNDLED_MODEL = "avatars (bundled)"
"""The bundled model in the list of models."""


def list_models() -> list[str]:
    """List models: the bundle, folders below ComfyUI's ``models/hyperlora``, known networks."""
    from hyperlora.pipelines.released.cards import RELEASED_CARDS

    hub_ids = [
        f"{card.list_parts('network')[0].name}:{card.variant}"
        for card in RELEASED_CARDS
        if card.kind != "lorweb"
    ]
    return [BUNDLED_MODEL, *list_model_folders(), *hub_ids]


def list_model_folders() -> dict[str, Path]:
    """List the folders below ``models/hyperlora`` by their names; none outside of ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return {}
    root = Path(folder_paths.models_dir) / "hyperlora"
    return {path.name: path for path in sorted(root.glob("*")) if path.is_dir()}


def find_listed_model(name: str) -> str:
    """Find the folder or hub id of a name in the list; empty for the bundled model."""
    return "" if name == BUNDLED_MODEL else str(list_model_folders().get(name, name))


@lru_cache(maxsize=1)
def load_photo_model(
    name: str, trusted_code: str = "", encoder: str = "", face_pack: str = ""
) -> "AnyPhotoModel":
    """Load a model from photos onto ComfyUI's device; the last one stays loaded.

    Args:
        name: Folder or hub id; empty for the bundled model.
        trusted_code: SHA-256 of the code of a template that may run.
        encoder: Folder or hub id of the image encoder; empty for the network's own.
        face_pack: Folder or name of the face pack; empty for the network's own.

    Returns:
        The model.

    Raises:
        ModelLoadError: The model cannot be fetched or loaded.
    """
    from hyperlora.compute import ComputeConfig
    from hyperlora.pipelines.auto import is_own_model, load_image_to_lora
    from hyperlora.pipelines.released.registry import open_released_model
    from hyperlora.pipelines.released.released_model import ReleasedOptions

    device = find_device()
    if not name or is_own_model(name):
        return load_image_to_lora(name or None).to(device)
    options = ReleasedOptions(
        trust_remote_code=trusted_code or None,
        encoder=encoder or None,
        face_pack=face_pack or _find_face_pack(),
    )
    return open_released_model(name, options, ComputeConfig(device=str(device)))


@lru_cache(maxsize=1)
def load_pair_to_lora(name: str) -> "PairToLora":
    """Load a model from pairs onto ComfyUI's device; an empty name is the bundled one."""
    from hyperlora import PairToLora, pretrained

    return PairToLora.from_pretrained(name or pretrained.PAIR_TO_LORA_DIR).to(find_device())


def find_device() -> torch.device:
    """Return the device that ComfyUI computes on; outside of ComfyUI the accelerator or the CPU."""
    try:
        from comfy.model_management import get_torch_device
    except ImportError:
        from hyperlora.compute import ComputeConfig

        return ComputeConfig().torch_device
    device: torch.device = get_torch_device()
    return device


def _find_face_pack() -> str | None:
    """The pack of HyperLoRA where ComfyUI's face nodes keep it; None if it is not there."""
    try:
        import folder_paths
    except ImportError:
        return None
    from hyperlora.encoders.face_finder import PACK_NAME

    folder = Path(folder_paths.models_dir) / "insightface" / "models" / PACK_NAME
    return str(folder) if folder.is_dir() else None
