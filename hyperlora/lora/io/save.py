"""``save_lora``: write a LoRA file that the tools of its format load; alpha is the rank."""

import json
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.comfyui_keys import KOHYA_SUFFIX_FAMILIES, fuse_factors
from hyperlora.lora.io.formats import (
    FormatChoice,
    detect_family,
    is_linear_projection,
    resolve_format,
)
from hyperlora.lora.io.hashes import compute_hashes
from hyperlora.lora.io.keys import (
    COMPONENTS,
    KOHYA_PREFIXES,
    LoraFormat,
    convert_path_to_sgm,
    format_file_key,
)
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import find_non_finite, serialize_tensors, write_bytes
from hyperlora.lora.io.verify import verify_structure
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def save_lora(
    weights: LoraWeights,
    path: str | PathLike[str],
    *,
    format: FormatChoice = "auto",
    metadata: LoraMetadata | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one LoRA to a ``.safetensors`` file, whole or not at all; ``load_lora`` is the inverse.

    The file is read back in memory first, so that no file is written that nobody can read. Further
    files of the same targets, rank, format and precision are not, since only their numbers differ.

    Args:
        weights: One LoRA, without batch axis, on any device.
        path: The file; missing folders are made.
        format: The key names. ``auto`` is what most programs read: ``kohya`` for Stable Diffusion
            1 and 2, ``sgm`` for SDXL (``kohya`` with Stability's block names, as kohya's trainer
            writes them), ``diffusers`` for transformers (``transformer.….lora_A.weight``).
            ``comfyui`` has ComfyUI's own names of transformers (``diffusion_model.…``).
            ``formats.READERS`` tells which programs read which.
        metadata: What the file says about the LoRA, by default only what the weights determine.
        dtype: float32, float16 or bfloat16.

    Returns:
        The path of the file.

    Raises:
        InvalidArgumentError: The weights are a batch or hold NaN or infinity (also after rounding
            to ``dtype``), loaders would refuse them, or an argument is not allowed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidArgumentError(f"LoRA files are written as .safetensors, got {path.name}")
    metadata = replace(metadata or LoraMetadata(), output_name=path.stem)
    write_bytes(serialize_lora(weights, format=format, metadata=metadata, dtype=dtype), path)
    return path


def serialize_lora(
    weights: LoraWeights,
    *,
    format: FormatChoice = "auto",
    metadata: LoraMetadata | None = None,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """Compute the bytes of the file that ``save_lora`` writes.

    Args:
        weights: See ``save_lora``.
        format: See ``save_lora``.
        metadata: See ``save_lora``.
        dtype: See ``save_lora``.

    Returns:
        A whole safetensors file, which ``load_lora`` reads.

    Raises:
        InvalidArgumentError: See ``save_lora``.
    """
    metadata = metadata or LoraMetadata()
    file_format = resolve_format(format, weights.layout, metadata.architecture)
    _validate_weights(weights, file_format, dtype)
    weights = weights.detach().to("cpu")
    family = detect_family(weights.layout, metadata.architecture)
    tensors = _convert_to_peft(weights, dtype, file_format, family)
    if non_finite_key := find_non_finite(tensors):
        raise InvalidArgumentError(
            f"{non_finite_key} holds NaN or infinity as {dtype}: "
            f"the LoRA is broken or needs float32"
        )
    metadata = metadata.with_defaults(weights.layout)
    file_metadata = metadata.to_safetensors_metadata(weights.layout)
    if file_format == "diffusers":
        file_metadata["lora_adapter_metadata"] = json.dumps(
            _build_adapter_config(weights.layout), indent=2, sort_keys=True
        )
    elif file_format == "comfyui":
        tensors = _convert_to_comfyui(tensors, family)
    else:
        tensors = _convert_to_kohya(tensors, family == "SDXL")
    data = serialize_tensors(tensors, file_metadata, compute_hashes)
    verify_structure(data, weights, dtype, tensors, file_metadata)
    return data


def _validate_weights(weights: LoraWeights, format: LoraFormat, dtype: torch.dtype) -> None:
    """Raise ``InvalidArgumentError`` for what the tools of a format cannot load."""
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"LoRA files hold float32, float16 or bfloat16, not {dtype}")
    if weights.batch_shape:
        raise InvalidArgumentError(
            f"one LoRA per file, this is a batch of {list(weights.batch_shape)}: index it first"
        )
    components = tuple(KOHYA_PREFIXES) if format in ("kohya", "sgm") else COMPONENTS
    if unknown := [name for name in weights.layout.components if name not in components]:
        raise InvalidArgumentError(
            f"{format} files hold {', '.join(components)}, not {unknown[0]}: use another format"
        )
    required_suffixes = (
        ("q_proj", "k_proj", "v_proj", "out_proj") if format == "diffusers" else ("out_proj",)
    )
    for component in ("text_encoder", "text_encoder_2"):
        targets = [
            target.name for target in weights.layout.targets if target.component == component
        ]
        if targets and not any(name.endswith(required_suffixes) for name in targets):
            raise InvalidArgumentError(
                f"diffusers cannot load a {component} LoRA without "
                f"{required_suffixes[-1]} targets: adapt these too"
            )


def _convert_to_peft(
    weights: LoraWeights, dtype: torch.dtype, format: LoraFormat, family: str
) -> dict[str, Tensor]:
    """Tensors by keys of diffusers; the paths of the UNet may be those of another format."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    tensors: dict[str, Tensor] = {}
    for component in weights.layout.components:
        component_tensors: dict[str, Tensor] = {}
        for target, down, up in zip(weights.layout.targets, weights.down, weights.up, strict=True):
            if target.component == component:
                path = _make_file_path(target.name, format)
                kernel_size = target.kernel_size
                if format == "kohya" and family == "SD 2.x" and is_linear_projection(target):
                    kernel_size = (1, 1)  # kohya's UNet of SD 2 has convolutions here
                if kernel_size:
                    down = down.reshape(len(down), -1, *kernel_size)  # [rank, in, kh, kw]
                    up = up[..., None, None]  # [out, rank, 1, 1]
                component_tensors[f"{path}.lora_A.weight"] = down.to(dtype)
                component_tensors[f"{path}.lora_B.weight"] = up.to(dtype)
        tensors |= LoraBaseMixin.pack_weights(component_tensors, component)
    return tensors


def _make_file_path(target_name: str, format: LoraFormat) -> str:
    """The path of a target in a file, without its component."""
    component, path = format_file_key(target_name).split(".", 1)
    is_unet = component == "unet"
    if is_unet and (format == "sgm" or (format == "kohya" and path.startswith("add_embedding."))):
        return convert_path_to_sgm(path)  # diffusers loses its own name of this layer
    return path


def _convert_to_comfyui(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Tensors by keys of ComfyUI, with fused layers where the original model has them."""
    factors_by_name = {
        key.removesuffix(".lora_A.weight"): (
            tensor,
            tensors[key.replace(".lora_A.weight", ".lora_B.weight")],
        )
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    converted: dict[str, Tensor] = {}
    for key, (down, up) in fuse_factors(factors_by_name, family).items():
        if family in KOHYA_SUFFIX_FAMILIES:
            converted[f"{key}.lora_down.weight"] = down
            converted[f"{key}.lora_up.weight"] = up
            converted[f"{key}.alpha"] = torch.tensor(float(len(down)))
        else:
            converted[f"{key}.lora_A.weight"] = down
            converted[f"{key}.lora_B.weight"] = up
    return converted


def _convert_to_kohya(tensors: dict[str, Tensor], is_sdxl: bool) -> dict[str, Tensor]:
    """Tensors by keys of kohya, with an alpha for each pair."""
    from diffusers.utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(tensors)
    if len(converted) != len(tensors) // 2 * 3:
        raise InvalidArgumentError(
            "two targets of this LoRA have one name in kohya's format: save it as diffusers"
        )
    if not is_sdxl:  # the only text encoder of Stable Diffusion 1 and 2 has no number
        converted = {
            key.replace("lora_te1_", "lora_te_", 1): tensor for key, tensor in converted.items()
        }
    return {
        key: tensor.float() if key.endswith(".alpha") else tensor
        for key, tensor in converted.items()
    }


def _build_adapter_config(layout: LoraLayout) -> dict[str, int | list[str]]:
    """The fields from which diffusers rebuilds a PEFT ``LoraConfig``.

    Paths of text encoders go without ``text_model.``: PEFT matches suffixes, so they fit flattened
    and nested CLIP models alike.
    """
    config: dict[str, int | list[str]] = {}
    for component in layout.components:
        paths = [
            target.path.removeprefix("text_model.")
            for target in layout.targets
            if target.component == component
        ]
        config[f"{component}.r"] = layout.rank
        config[f"{component}.lora_alpha"] = layout.rank
        config[f"{component}.target_modules"] = sorted(paths)
    return config
