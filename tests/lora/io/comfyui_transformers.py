"""ComfyUI's layers of transformers: which rows of the original model's weights diffusers' have.

Data of ``comfy/utils.py`` (``flux_to_diffusers``, ``mmdit_to_diffusers``, ``krea2_to_diffusers``,
``z_image_to_diffusers``) and of the models in ``comfy/ldm``, written as diffusers' path, the
original's, and the number of the part in its rows.
"""

import re
from collections.abc import Mapping

from torch import nn

from tests.lora.io.program_keys import Rows, list_layers

QKV = (("q", 0), ("k", 1), ("v", 2))
Table = dict[str, tuple[str, int]]
FLUX_ATTENTION: Table = {
    **{f"transformer_blocks.N.attn.to_{p}": ("double_blocks.N.img_attn.qkv", i) for p, i in QKV},
    **{
        f"transformer_blocks.N.attn.add_{p}_proj": ("double_blocks.N.txt_attn.qkv", i)
        for p, i in QKV
    },
    "transformer_blocks.N.attn.to_out.0": ("double_blocks.N.img_attn.proj", 0),
    "transformer_blocks.N.attn.to_add_out": ("double_blocks.N.txt_attn.proj", 0),
}
FLUX_1: Table = FLUX_ATTENTION | {
    "transformer_blocks.N.ff.net.0.proj": ("double_blocks.N.img_mlp.0", 0),
    "transformer_blocks.N.ff.net.2": ("double_blocks.N.img_mlp.2", 0),
    "transformer_blocks.N.ff_context.net.0.proj": ("double_blocks.N.txt_mlp.0", 0),
    "transformer_blocks.N.ff_context.net.2": ("double_blocks.N.txt_mlp.2", 0),
    **{f"single_transformer_blocks.N.attn.to_{p}": ("single_blocks.N.linear1", i) for p, i in QKV},
    "single_transformer_blocks.N.proj_mlp": ("single_blocks.N.linear1", 3),
    "single_transformer_blocks.N.proj_out": ("single_blocks.N.linear2", 0),
}
FLUX_2: Table = FLUX_ATTENTION | {
    "transformer_blocks.N.ff.linear_in": ("double_blocks.N.img_mlp.0", 0),
    "transformer_blocks.N.ff.linear_out": ("double_blocks.N.img_mlp.2", 0),
    "transformer_blocks.N.ff_context.linear_in": ("double_blocks.N.txt_mlp.0", 0),
    "transformer_blocks.N.ff_context.linear_out": ("double_blocks.N.txt_mlp.2", 0),
    "single_transformer_blocks.N.attn.to_qkv_mlp_proj": ("single_blocks.N.linear1", 0),
    "single_transformer_blocks.N.attn.to_out": ("single_blocks.N.linear2", 0),
}
SD3: Table = {
    **{f"transformer_blocks.N.attn.to_{p}": ("joint_blocks.N.x_block.attn.qkv", i) for p, i in QKV},
    **{
        f"transformer_blocks.N.attn2.to_{p}": ("joint_blocks.N.x_block.attn2.qkv", i)
        for p, i in QKV
    },
    **{
        f"transformer_blocks.N.attn.add_{p}_proj": ("joint_blocks.N.context_block.attn.qkv", i)
        for p, i in QKV
    },
    "transformer_blocks.N.attn.to_out.0": ("joint_blocks.N.x_block.attn.proj", 0),
    "transformer_blocks.N.attn2.to_out.0": ("joint_blocks.N.x_block.attn2.proj", 0),
    "transformer_blocks.N.attn.to_add_out": ("joint_blocks.N.context_block.attn.proj", 0),
    "transformer_blocks.N.ff.net.0.proj": ("joint_blocks.N.x_block.mlp.fc1", 0),
    "transformer_blocks.N.ff.net.2": ("joint_blocks.N.x_block.mlp.fc2", 0),
    "transformer_blocks.N.ff_context.net.0.proj": ("joint_blocks.N.context_block.mlp.fc1", 0),
    "transformer_blocks.N.ff_context.net.2": ("joint_blocks.N.context_block.mlp.fc2", 0),
}
NEXT_DIT = ("layers", "noise_refiner", "context_refiner")
Z_IMAGE: Table = {
    key: value
    for blocks in NEXT_DIT
    for key, value in {
        **{f"{blocks}.N.attention.to_{p}": (f"{blocks}.N.attention.qkv", i) for p, i in QKV},
        f"{blocks}.N.attention.to_out.0": (f"{blocks}.N.attention.out", 0),
        **{
            f"{blocks}.N.feed_forward.w{i}": (f"{blocks}.N.feed_forward.w{i}", 0) for i in (1, 2, 3)
        },
    }.items()
}
LUMINA_2: Table = {
    key: value
    for blocks in NEXT_DIT
    for key, value in {
        **{f"{blocks}.N.attn.to_{p}": (f"{blocks}.N.attention.qkv", i) for p, i in QKV},
        f"{blocks}.N.attn.to_out.0": (f"{blocks}.N.attention.out", 0),
        **{
            f"{blocks}.N.feed_forward.linear_{i}": (f"{blocks}.N.feed_forward.w{i}", 0)
            for i in (1, 2, 3)
        },
    }.items()
}
KREA_2: Table = {
    f"{ours}.{path}": (f"{theirs}.{layer}", 0)
    for ours, theirs in {
        "transformer_blocks.N": "blocks.N",
        "text_fusion.layerwise_blocks.N": "txtfusion.layerwise_blocks.N",
        "text_fusion.refiner_blocks.N": "txtfusion.refiner_blocks.N",
    }.items()
    for path, layer in {
        "attn.to_q": "attn.wq",
        "attn.to_k": "attn.wk",
        "attn.to_v": "attn.wv",
        "attn.to_out.0": "attn.wo",
        "attn.to_gate": "attn.gate",
        "ff.gate": "mlp.gate",
        "ff.up": "mlp.up",
        "ff.down": "mlp.down",
    }.items()
}
QWEN_21: Table = {
    "transformer_blocks.N.img_mlp.gate_layer": ("transformer_blocks.N.img_mlp.gate_up", 0),
    "transformer_blocks.N.img_mlp.proj": ("transformer_blocks.N.img_mlp.gate_up", 1),
}
TABLES: Mapping[str, Table] = {
    "FLUX.1": FLUX_1,
    "Chroma": FLUX_1,
    "FLUX.2": FLUX_2,
    "SD3": SD3,
    "Z-Image": Z_IMAGE,
    "Lumina 2": LUMINA_2,
    "Krea 2": KREA_2,
    "Qwen-Image 2.1": QWEN_21,
    "Qwen-Image": {},
    "HiDream": {},
}
OWN_NAMES = ("Qwen-Image", "Qwen-Image 2.1", "HiDream")
"""Families whose other layers have diffusers' names in ComfyUI."""
UNKNOWN_TO_COMFYUI = ("Lumina 2",)
"""Families of whose diffusers names ComfyUI knows none."""
KNOWN_AS_DIFFUSION_MODEL = ("Z-Image", "Krea 2")
"""Families of whose diffusers paths ComfyUI knows ``diffusion_model.<path>``, too."""


def map_layers(family: str, transformer: nn.Module) -> dict[str, Rows]:
    """Map the paths of a transformer in diffusers to rows of the original's layers."""
    parts: dict[str, dict[int, tuple[str, int]]] = {}
    for path, layer in list_layers(transformer):
        match = re.search(r"(?<=\.)\d+(?=\.)", path)
        template = f"{path[: match.start()]}N{path[match.end() :]}" if match else path
        height = layer.weight.shape[0]  # type: ignore[union-attr, index]
        if template in TABLES[family]:
            original, part = TABLES[family][template]
            original = original.replace("N", match[0] if match else "")
            parts.setdefault(original, {})[part] = (path, int(height))
        elif family in OWN_NAMES:
            parts[path] = {0: (path, int(height))}
    rows: dict[str, Rows] = {}
    for original, paths in parts.items():
        start = 0
        for _, (path, height) in sorted(paths.items()):
            rows[path] = Rows(original, start, height)
            start += height
    return rows


def map_comfyui(family: str, transformer: nn.Module) -> dict[str, Rows]:
    """Map ComfyUI's keys of a transformer to rows of its layers."""
    layers = map_layers(family, transformer)
    keys = {}
    for path, rows in layers.items():
        keys[f"diffusion_model.{rows.layer}"] = Rows(rows.layer, 0, -1)
        if family not in UNKNOWN_TO_COMFYUI:
            keys[f"transformer.{path}"] = rows
        if family in KNOWN_AS_DIFFUSION_MODEL:
            keys[f"diffusion_model.{path}"] = rows
    return keys


def compute_heights(family: str, transformer: nn.Module) -> dict[str, int]:
    """Rows of the original's layers."""
    heights: dict[str, int] = {}
    for layer, start, count in map_layers(family, transformer).values():
        heights[layer] = max(heights.get(layer, 0), start + count)
    return heights
