"""Weights shared between released models: a component is stored in one of them only."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import serialize_tensors, write_bytes
from hyperlora.pipelines.pretrained_model import load_component, read_layout


def share_weights(folder: Path, component: str, source_name: str) -> int:
    """Remove a component from a released model, since another model in the same folder holds it
    too.

    Args:
        folder: Folder of the model.
        component: Name of the component, e.g. ``encoder``.
        source_name: Name of the other model's folder.

    Returns:
        Bytes saved.

    Raises:
        InvalidArgumentError: If the components differ.
    """
    config = json.loads((folder / "config.json").read_text())
    state_dict = load_file(folder / "model.safetensors")
    source_state = load_component(folder.parent / source_name, component)
    own_state = {k: v for k, v in state_dict.items() if k.startswith(f"{component}.")}
    if own_state.keys() != source_state.keys() or not all(
        torch.equal(own_state[k], source_state[k]) for k in own_state
    ):
        raise InvalidArgumentError(
            f"the {component} of {folder} is not that of {source_name}: it must stay where it is"
        )
    remaining_state = {k: v for k, v in state_dict.items() if k not in own_state}
    config["shared_weights"] = config.get("shared_weights", {}) | {component: source_name}
    serialized_weights = serialize_tensors(
        remaining_state, {"layout": read_layout(folder).fingerprint}
    )
    write_bytes(
        json.dumps(config, indent=1).encode(), folder / "config.json"
    )  # first: a part held twice does no harm
    write_bytes(serialized_weights, folder / "model.safetensors")
    return sum(v.numel() * v.element_size() for v in own_state.values())
