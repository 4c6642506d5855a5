"""Keys in files <-> names of targets, through diffusers' own converters.

    target                text_encoder.encoder.layers.0.self_attn.q_proj
    diffusers (PEFT)      text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight
    kohya                 lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight

transformers 5.6 flattened ``CLIPTextModel``; files keep the older ``text_model.``, which every
loader understands.
"""

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Final, Literal, get_args

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError

LoraFormat = Literal["diffusers", "kohya", "sgm", "comfyui"]
"""The key names of a LoRA file; see ``save_lora``."""
LORA_FORMATS: Final[tuple[LoraFormat, ...]] = get_args(LoraFormat)
KOHYA_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
COMPONENTS: Final = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
_ROOT_MODULES: Final = frozenset(
    {
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_in",
        "conv_out",
        "time_embedding",
        "add_embedding",
        "text_model",
        "text_projection",
    }
)
_CHILD_MODULES: Final = frozenset(
    {
        "attentions",
        "resnets",
        "downsamplers",
        "upsamplers",
        "transformer_blocks",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "ff",
        "net",
        "proj",
        "proj_in",
        "proj_out",
        "conv",
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "linear_1",
        "linear_2",
        "encoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp",
        "fc1",
        "fc2",
    }
)
"""All names in paths of UNets and CLIP. Others mean that the dots of a kohya key were lost."""


def format_file_key(target_name: str) -> str:
    """Convert a target's name to its name in files, with ``text_model.`` in CLIP text encoders."""
    component, path = target_name.split(".", 1)
    is_flat = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"{component}.text_model.{path}" if is_flat else target_name


def convert_key_to_peft(key: str) -> str:
    """Convert a diffusers key of any version to PEFT's, ``<component>.<path>.lora_A.weight``."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if key.startswith("text_encoder"):
        (key,) = convert_state_dict_to_peft({key: None}, original_type=StateDictType.DIFFUSERS_OLD)
    (key,) = convert_unet_state_dict_to_peft({key: None})
    return str(key)


def parse_kohya_stem(stem: str, layers_per_block: int = 2) -> str:
    """Convert a kohya stem to a target's name, also with Stability's block names of SDXL files.

    Args:
        stem: The key without ``.lora_down.weight``.
        layers_per_block: ``layers_per_block`` of the UNet, 2 in SD and SDXL.

    Returns:
        The name of the target, e.g. ``unet.mid_block.resnets.0.conv1``.

    Raises:
        InvalidLoraFileError: No UNet or CLIP text encoder has such a module.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    state_dict = {f"{stem}.lora_down.weight": None, f"{stem}.lora_up.weight": None}
    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            state_dict, unet_config=config
        )
        name = next(convert_key_to_peft(key) for key in converted if key.endswith(".down.weight"))
    except (ValueError, KeyError, IndexError, StopIteration) as error:
        raise InvalidLoraFileError(
            f"kohya key {stem!r} names no target of a Stable Diffusion model"
        ) from error
    name = name.removesuffix(".lora_A.weight")
    _, root, *children = name.split(".")
    if root not in _ROOT_MODULES or any(
        part not in _CHILD_MODULES and not re.fullmatch(r"\d+", part) for part in children
    ):
        raise InvalidLoraFileError(
            f"kohya key {stem!r} names no module of a UNet or a CLIP text encoder"
        )
    return name


_SGM_RESNET_PATHS: Final = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_TOP_LEVEL_PATHS: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def convert_path_to_sgm(path: str) -> str:
    """Convert a path in diffusers' SDXL UNet to Stability's, as in most SDXL LoRA files.

    This inverts diffusers' ``convert_ldm_unet_checkpoint``: two layers per down block, three per
    up block.

    Raises:
        InvalidArgumentError: SDXL has no such module.
    """
    if path in _SGM_TOP_LEVEL_PATHS:
        return _SGM_TOP_LEVEL_PATHS[path]
    match path.split("."):
        case ["down_blocks", block, "resnets", layer, part]:
            return f"input_blocks.{1 + 3 * int(block) + int(layer)}.0.{_SGM_RESNET_PATHS[part]}"
        case ["down_blocks", block, "attentions", layer, *suffix]:
            return ".".join([f"input_blocks.{1 + 3 * int(block) + int(layer)}.1", *suffix])
        case ["down_blocks", block, "downsamplers", "0", "conv"]:
            return f"input_blocks.{3 + 3 * int(block)}.0.op"
        case ["mid_block", "resnets", layer, part]:
            return f"middle_block.{2 * int(layer)}.{_SGM_RESNET_PATHS[part]}"
        case ["mid_block", "attentions", "0", *suffix]:
            return ".".join(["middle_block.1", *suffix])
        case ["up_blocks", block, "resnets", layer, part]:
            return f"output_blocks.{3 * int(block) + int(layer)}.0.{_SGM_RESNET_PATHS[part]}"
        case ["up_blocks", block, "attentions", layer, *suffix]:
            return ".".join([f"output_blocks.{3 * int(block) + int(layer)}.1", *suffix])
        case ["up_blocks", ("0" | "1") as block, "upsamplers", "0", "conv"]:
            # after a resnet and an attention
            return f"output_blocks.{2 + 3 * int(block)}.2.conv"
    raise InvalidArgumentError(f"SDXL has no module {path}: sgm names are for SDXL LoRAs only")
