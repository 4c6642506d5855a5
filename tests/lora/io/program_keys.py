"""Which keys of a LoRA file other programs read: their names, computed from a model's structure.

* kohya-ss/sd-scripts, ``networks/lora.py``: ``lora_unet_`` and the module's path with ``_``, over
  diffusers' UNet for SD 1 and 2 (whose ``proj_in`` and ``proj_out`` are 1x1 convolutions in SD 2,
  too) and Stability's for SDXL, to whose names ``convert_diffusers_to_sai_if_needed`` converts;
* AUTOMATIC1111, ``extensions-builtin/Lora/networks.py``: ``convert_diffusers_name_to_compvis``;
* ComfyUI, ``comfy/lora.py`` (``model_lora_keys_unet``, ``model_lora_keys_clip``) and
  ``comfy/utils.py`` (``unet_to_diffusers``, ``mmdit_to_diffusers``, ``flux_to_diffusers``,
  ``z_image_to_diffusers``, ``krea2_to_diffusers``);
* Forge, ``packages_3rdparty/comfyui_lora_collection/lora.py``: ComfyUI's rules of UNets and FLUX.1.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

UP_BLOCKS_WITH_ATTENTION = {"SD 1.x": (1, 2, 3), "SD 2.x": (1, 2, 3), "SDXL": (0, 1)}
TEXT_PREFIXES = {
    "kohya": {
        "SD 1.x": {"text_encoder": ("lora_te_",)},
        "SD 2.x": {"text_encoder": ("lora_te_",)},
        "SDXL": {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)},
    },
    "A1111": {
        "SD 1.x": {"text_encoder": ("lora_te_", "lora_te1_")},
        "SD 2.x": {"text_encoder": ("lora_te_",)},
        "SDXL": {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)},
    },
}
COMFYUI_TEXT_PREFIXES = {
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
}
COMFYUI_KOHYA_PREFIXES = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP_LEVEL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class Rows(NamedTuple):
    """Where a key's ΔW goes: rows of a layer of the original model."""

    layer: str
    start: int
    count: int


def list_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths of all layers that a LoRA can adapt, with or without an adapter."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer"):
            yield name, layer.base_layer  # type: ignore[misc]
        elif isinstance(layer, nn.Linear | nn.Conv2d) and not re.search(r"lora_|base_layer", name):
            yield name, layer


def make_ldm_path(path: str, family: str) -> str:
    """Stability's path of a layer of diffusers' UNet with 2 layers per block."""
    if path in TOP_LEVEL:
        return TOP_LEVEL[path]
    part, *rest = path.split(".")
    if part == "mid_block":
        kind, index, *suffix = rest
        number, child = ("1" if kind == "attentions" else str(2 * int(index))), suffix
        return ".".join(["middle_block", number, convert_suffix(kind, ".".join(child))])
    block, kind, index, *suffix = rest
    end = ".".join(suffix)
    if part == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * int(block) + 3}.0.op"
        column = int(kind == "attentions")
        number = 1 + 3 * int(block) + int(index)
        return f"input_blocks.{number}.{column}.{convert_suffix(kind, end)}"
    if kind == "upsamplers":
        column = 2 if int(block) in UP_BLOCKS_WITH_ATTENTION[family] else 1
        return f"output_blocks.{3 * int(block) + 2}.{column}.conv"
    column = int(kind == "attentions")
    return f"output_blocks.{3 * int(block) + int(index)}.{column}.{convert_suffix(kind, end)}"


def convert_suffix(kind: str, suffix: str) -> str:
    return RESNET.get(suffix, suffix) if kind == "resnets" else suffix


def list_clip_stems(module: nn.Module) -> list[str]:
    """Names of the layers of a CLIP text encoder in files."""
    paths = [path.removeprefix("text_model.") for path, _ in list_layers(module)]
    return [f"text_model.{path}" for path in paths if path.startswith("encoder.layers.")]


def find_unread_kohya(
    family: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Stems that kohya's trainer ignores, or whose shapes it refuses."""
    shapes: dict[str, int] = {}
    owners = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    for name, owner in modules["unet"].named_modules():
        if type(owner).__name__ not in owners:
            continue
        for child, layer in list_layers(owner):
            path = f"{name}.{child}"
            names = [path, make_ldm_path(path, family)] if family == "SDXL" else [path]
            is_conv = isinstance(layer, nn.Conv2d) or (
                family == "SD 2.x" and path.endswith((".proj_in", ".proj_out"))
            )
            shapes |= {f"lora_unet_{n.replace('.', '_')}": 4 if is_conv else 2 for n in names}
    shapes |= dict.fromkeys(list_kohya_text_stems("kohya", family, modules), 2)
    downs = find_downs(tensors)
    return {stem for stem, down in downs.items() if shapes.get(stem) != down.ndim}


def find_unread_a1111(
    family: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Stems for which A1111 finds no module; it reshapes what does not fit."""
    names = {
        f"diffusion_model_{make_ldm_path(path, family).replace('.', '_')}"
        for path, _ in list_layers(modules["unet"])
    }
    text_stems = set(list_kohya_text_stems("A1111", family, modules))
    return {
        stem
        for stem in find_downs(tensors)
        if stem not in text_stems and convert_to_compvis(stem) not in names
    }


def convert_to_compvis(stem: str) -> str:
    """A1111's name of a module of a UNet."""
    name = stem.removeprefix("lora_unet_")
    tops = {k.replace(".", "_"): v for k, v in TOP_LEVEL.items() if not k.startswith("add_")}
    if name in tops:
        name = tops[name].replace(".", "_")
    elif match := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        side, block, kind, index, suffix = match.groups()
        blocks, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
        column, number = int(kind == "attentions"), first + 3 * int(block) + int(index)
        name = f"{blocks}_{number}_{column}_{convert_suffix(kind, suffix).replace('.', '_')}"
    elif match := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, index, suffix = match.groups()
        number = 1 if kind == "attentions" else 2 * int(index)
        name = f"middle_block_{number}_{convert_suffix(kind, suffix).replace('.', '_')}"
    elif match := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        name = f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    elif match := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        name = f"output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) else 1}_conv"
    return f"diffusion_model_{name}"


def list_kohya_text_stems(program: str, family: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        prefix + stem.replace(".", "_")
        for component, prefixes in TEXT_PREFIXES[program][family].items()
        if component in modules
        for prefix in prefixes
        for stem in list_clip_stems(modules[component])
    ]


def list_comfyui_unet_stems(family: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Stems that ComfyUI and Forge read of a UNet and its text encoders."""
    stems = set()
    for path, _ in list_layers(modules["unet"]):
        ldm_path = make_ldm_path(path, family)
        old_path = path.replace(".to_", ".processor.to_").removesuffix(".0")
        stems |= {f"lora_unet_{p.replace('.', '_')}" for p in (path, ldm_path)}
        stems |= {f"diffusion_model.{ldm_path}", f"unet.{old_path}"}
    return stems | set(map_comfyui_text(modules))


def map_comfyui_text(modules: Mapping[str, nn.Module]) -> dict[str, Rows]:
    """ComfyUI's keys of CLIP text encoders."""
    keys = {}
    for component in modules.keys() & COMFYUI_TEXT_PREFIXES.keys():
        for stem in list_clip_stems(modules[component]):
            rows = Rows(f"{component}.{stem}", 0, -1)
            keys |= {prefix + stem: rows for prefix in COMFYUI_TEXT_PREFIXES[component]}
            keys |= {
                prefix + stem.replace(".", "_"): rows
                for prefix in COMFYUI_KOHYA_PREFIXES[component]
            }
    return keys


def find_downs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The down factors of a file by their stems."""
    pattern = r"(.+)\.lora_(?:A|down)\.weight"
    return {m[1]: tensor for key, tensor in tensors.items() if (m := re.fullmatch(pattern, key))}


def compute_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW [out, in] by stem, with alpha / rank."""
    deltas = {}
    for stem, down in find_downs(tensors).items():
        up = next(tensors[k] for e in ("B", "up") if (k := f"{stem}.lora_{e}.weight") in tensors)
        alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(len(down))))
        deltas[stem] = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
    return deltas


def add_rows(
    keys: Mapping[str, Rows], deltas: Mapping[str, Tensor], heights: Mapping[str, int]
) -> dict[str, Tensor]:
    """ΔW of the original model's layers, to whose rows ComfyUI adds the ΔW of a file."""
    layers: dict[str, Tensor] = {}
    for stem, delta in deltas.items():
        layer, start, count = keys[stem]
        height = heights.get(layer, len(delta))
        assert len(delta) == (height if count < 0 else count), stem
        total = layers.setdefault(layer, torch.zeros(height, delta.shape[1]))
        total[start : start + len(delta)] += delta
    return layers


def list_unread(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """Stems of a file that are not among the keys of a program."""
    return find_downs(tensors).keys() - set(keys)
