import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import encoded, write_bytes
from hyperlora.pipelines.pretrained_model import _layout, _part


def borrow(folder: Path, part: str, lender: str) -> int:
    """Leave ``part`` (``encoder``) out of the released model in ``folder``, since the model ``lender`` in the folder
    beside holds the same; returns the bytes saved. Raises ``BadRequest`` if it holds another."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    lent = _part(folder.parent / lender, part)
    own = {k: v for k, v in state.items() if k.startswith(f"{part}.")}
    if own.keys() != lent.keys() or not all(torch.equal(own[k], lent[k]) for k in own):
        raise BadRequest(f"the {part} of {folder} is not that of {lender}: it must stay where it is")
    rest = {k: v for k, v in state.items() if k not in own}
    config["borrowed"] = config.get("borrowed", {}) | {part: lender}
    weights = encoded(rest, {"layout": _layout(folder).fingerprint})
    write_bytes(json.dumps(config, indent=1).encode(), folder / "config.json")  # first: a part held twice does no harm
    write_bytes(weights, folder / "model.safetensors")
    return sum(v.numel() * v.element_size() for v in own.values())
