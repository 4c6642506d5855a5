"""ComfyUI's own names of transformers: ``diffusion_model.`` and the layers of the original models.

The original models fuse projections which diffusers holds apart. The LoRA of a fused layer stacks
the down factors of its parts, and the up factors lie on a diagonal of blocks:

    down [3 r, in]   = (down_q, down_k, down_v)
    up   [3 out, 3 r] = diag(up_q, up_k, up_v)          up @ down = (ΔW_q, ΔW_k, ΔW_v)

Names: ``comfy/lora.py`` and ``comfy/utils.py`` of ComfyUI, and diffusers' own converters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError

COMFYUI_PREFIX: Final = "diffusion_model."
"""Beginning of the keys of a denoiser."""
Factors = tuple[Tensor, Tensor]
"""down [rank, in] and up [out, rank]."""

_TEXT_ENCODER_PREFIXES: Final = {
    "text_encoder.": "text_encoders.clip_l.transformer.",
    "text_encoder_2.": "text_encoders.clip_g.transformer.",
}
_FLUX_ATTENTION: Final = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(
        f"transformer_blocks.{{}}.attn.add_{p}_proj" for p in "qkv"
    ),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
}
_FLUX_1: Final = _FLUX_ATTENTION | {
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{p}" for p in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
}
_LUMINA_BLOCKS: Final = ("layers", "noise_refiner", "context_refiner")
_SD3_STREAMS: Final = {
    "x_block": ("to_{}", "to_out.0", "ff", "norm1"),
    "context_block": ("add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
}
COMFYUI_LAYERS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "FLUX.1": _FLUX_1,
    "Chroma": _FLUX_1,
    "FLUX.2": _FLUX_ATTENTION
    | {
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
        "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
    },
    "SD3": {
        layer: parts
        for block, (qkv, out, ff, norm) in _SD3_STREAMS.items()
        for layer, parts in {
            f"joint_blocks.{{}}.{block}.attn.qkv": tuple(
                f"transformer_blocks.{{}}.attn.{qkv.format(p)}" for p in "qkv"
            ),
            f"joint_blocks.{{}}.{block}.attn.proj": (f"transformer_blocks.{{}}.attn.{out}",),
            f"joint_blocks.{{}}.{block}.mlp.fc1": (f"transformer_blocks.{{}}.{ff}.net.0.proj",),
            f"joint_blocks.{{}}.{block}.mlp.fc2": (f"transformer_blocks.{{}}.{ff}.net.2",),
            f"joint_blocks.{{}}.{block}.adaLN_modulation.1": (
                f"transformer_blocks.{{}}.{norm}.linear",
            ),
        }.items()
    }
    | {
        "joint_blocks.{}.x_block.attn2.qkv": tuple(
            f"transformer_blocks.{{}}.attn2.to_{p}" for p in "qkv"
        ),
        "joint_blocks.{}.x_block.attn2.proj": ("transformer_blocks.{}.attn2.to_out.0",),
    },
    "Lumina 2": {
        layer: parts
        for blocks in _LUMINA_BLOCKS
        for layer, parts in {
            f"{blocks}.{{}}.attention.qkv": tuple(f"{blocks}.{{}}.attn.to_{p}" for p in "qkv"),
            f"{blocks}.{{}}.attention.out": (f"{blocks}.{{}}.attn.to_out.0",),
            f"{blocks}.{{}}.adaLN_modulation.1": (f"{blocks}.{{}}.norm1.linear",),
            **{
                f"{blocks}.{{}}.feed_forward.w{i}": (f"{blocks}.{{}}.feed_forward.linear_{i}",)
                for i in (1, 2, 3)
            },
        }.items()
    },
    "Qwen-Image 2.1": {
        "transformer_blocks.{}.img_mlp.gate_up": (
            "transformer_blocks.{}.img_mlp.gate_layer",
            "transformer_blocks.{}.img_mlp.proj",
        ),
    },
    "Krea 2": {
        f"{block}.{layer}": (f"{diffusers_block}.{path}",)
        for block, diffusers_block in {
            "blocks.{}": "transformer_blocks.{}",
            "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
            "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
        }.items()
        for layer, path in {
            **{f"attn.w{p}": f"attn.to_{p}" for p in "qkv"},
            "attn.wo": "attn.to_out.0",
            "attn.gate": "attn.to_gate",
            **{f"mlp.{part}": f"ff.{part}" for part in ("gate", "up", "down")},
        }.items()
    },
    "Qwen-Image": {},
    "Z-Image": {},
    "HiDream": {},
}
"""ComfyUI's layers -> their parts in diffusers, in the order of rows; ``{}`` is a block's number.

ComfyUI knows the other layers of Qwen-Image, Z-Image and HiDream by diffusers' names.
"""
_OWN_NAME_FAMILIES: Final = ("Qwen-Image", "Qwen-Image 2.1", "Z-Image", "HiDream")
KOHYA_SUFFIX_FAMILIES: Final = ("FLUX.1", "Chroma")
"""Families whose ``diffusion_model.`` keys diffusers reads with kohya's suffixes alone."""
_MLP_RATIO: Final = 4
"""Rows of FLUX.1's ``proj_mlp`` per row of its query."""


def fuse_factors(factors_by_name: Mapping[str, Factors], family: str) -> dict[str, Factors]:
    """Convert the factors of diffusers' layers to those of ComfyUI's.

    Args:
        factors_by_name: Factors by name of the target, ``<component>.<path>``, in files' spelling.
        family: A key of ``COMFYUI_LAYERS``.

    Returns:
        Factors by ComfyUI's name, without suffix.

    Raises:
        InvalidArgumentError: ComfyUI has no layer for a target, or the width of a missing part of
            a fused layer is unknown.
    """
    layer_by_part = {
        part: (layer, parts) for layer, parts in COMFYUI_LAYERS[family].items() for part in parts
    }
    fused: dict[str, Factors] = {}
    for name, factors in factors_by_name.items():
        component, path = name.split(".", 1)
        if prefix := _TEXT_ENCODER_PREFIXES.get(f"{component}."):
            fused[prefix + path] = factors
            continue
        template, number = _make_template(path)
        if component != "transformer" or (
            template not in layer_by_part and family not in _OWN_NAME_FAMILIES
        ):
            raise InvalidArgumentError(
                f"ComfyUI has no name for {name} of {family}: save this LoRA as diffusers"
            )
        if template not in layer_by_part:
            fused[COMFYUI_PREFIX + path] = factors
            continue
        layer, parts = layer_by_part[template]
        key = COMFYUI_PREFIX + layer.format(number)
        if key not in fused:
            names = [f"transformer.{part.format(number)}" for part in parts]
            fused[key] = _join_parts(names, factors_by_name)
    return fused


def _make_template(path: str) -> tuple[str, str]:
    """Replace the number of the block by ``{}``: ``layers.3.w1`` is ``layers.{}.w1`` and ``3``."""
    match = re.search(r"(?<=\.)\d+(?=\.)", path)
    if match is None:
        return path, ""
    return f"{path[: match.start()]}{{}}{path[match.end() :]}", match[0]


def _join_parts(names: Sequence[str], factors_by_name: Mapping[str, Factors]) -> Factors:
    """Stack the factors of a fused layer's parts; a missing part changes nothing."""
    present = {name: factors_by_name[name] for name in names if name in factors_by_name}
    if len(names) == 1:
        return present[names[0]]
    _, any_up = next(iter(present.values()))
    widths = [
        present[name][1].shape[0] if name in present else _guess_width(name, present)
        for name in names
    ]
    rank = sum(len(down) for down, _ in present.values())
    fused_up = any_up.new_zeros(sum(widths), rank)  # [Σ out, Σ r]
    row, column = 0, 0
    for name, width in zip(names, widths, strict=True):
        if name in present:
            up = present[name][1]  # [out, r]
            fused_up[row : row + width, column : column + up.shape[1]] = up
            column += up.shape[1]
        row += width
    return torch.cat([down for down, _ in present.values()]), fused_up


def _guess_width(name: str, present: Mapping[str, Factors]) -> int:
    """Rows of a part that the LoRA leaves alone."""
    down, up = next(iter(present.values()))
    in_features = down.shape[1]
    if name.endswith(".proj_mlp"):
        return _MLP_RATIO * in_features
    if ".img_mlp." in name:  # gate and value are equally wide
        return up.shape[0]
    if name.endswith("q") or "transformer_blocks." in name:
        return in_features
    # the key and value of grouped-query attention are narrower than the query
    for other, (_, other_up) in present.items():
        if other.endswith(("to_k", "to_v")):
            return other_up.shape[0]
    raise InvalidArgumentError(
        f"ComfyUI fuses {name} with the query, and its width is unknown: adapt it too, or save "
        "this LoRA as diffusers"
    )
