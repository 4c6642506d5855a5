import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import serialize_tensors, write_bytes
from hyperlora.pipelines.pretrained_model import _load_component, _read_layout


def share_weights(folder: Path, component: str, source_name: str) -> int:
    """Leave ``component`` (``encoder``) out of the released model in ``folder``, since the model ``source_name`` in the folder
    beside holds the same; returns the bytes saved. Raises ``InvalidArgumentError`` if it holds another."""
    config = json.loads((folder / "config.json").read_text())
    state_dict = load_file(folder / "model.safetensors")
    source_state = _load_component(folder.parent / source_name, component)
    own_state = {k: v for k, v in state_dict.items() if k.startswith(f"{component}.")}
    if own_state.keys() != source_state.keys() or not all(
        torch.equal(own_state[k], source_state[k]) for k in own_state
    ):
        raise InvalidArgumentError(
            f"the {component} of {folder} is not that of {source_name}: it must stay where it is"
        )
    remaining_state = {k: v for k, v in state_dict.items() if k not in own_state}
    config["borrowed"] = config.get("borrowed", {}) | {component: source_name}
    serialized_weights = serialize_tensors(
        remaining_state, {"layout": _read_layout(folder).fingerprint}
    )
    write_bytes(
        json.dumps(config, indent=1).encode(), folder / "config.json"
    )  # first: a part held twice does no harm
    write_bytes(serialized_weights, folder / "model.safetensors")
    return sum(v.numel() * v.element_size() for v in own_state.values())
