"""``save_lora``: write a LoRA file that the tools of its format load; alpha is the rank."""

import json
from os import PathLike
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.keys import (
    COMPONENTS,
    KOHYA_PREFIXES,
    LORA_FORMATS,
    LoraFormat,
    convert_path_to_sgm,
    format_file_key,
)
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import find_non_finite, serialize_tensors, write_bytes
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def save_lora(
    weights: LoraWeights,
    path: str | PathLike[str],
    *,
    format: LoraFormat = "diffusers",
    metadata: LoraMetadata | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one LoRA to a ``.safetensors`` file, whole or not at all; ``load_lora`` is the inverse.

    Args:
        weights: One LoRA, without batch axis, on any device.
        path: The file; missing folders are made.
        format: The key names. ``diffusers`` (``unet.….lora_A.weight``) is for diffusers and, for
            transformers, ComfyUI. ``kohya`` is for A1111, Forge and ComfyUI with Stable Diffusion
            1, 2 and XL. ``sgm`` is ``kohya`` with Stability's block names, as kohya's trainer
            writes SDXL LoRAs.
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
    write_bytes(serialize_lora(weights, format=format, metadata=metadata, dtype=dtype), path)
    return path


def serialize_lora(
    weights: LoraWeights,
    *,
    format: LoraFormat = "diffusers",
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
    _validate_weights(weights, format, dtype)
    weights = weights.detach().to("cpu")
    tensors = _convert_to_peft(weights, dtype, use_sgm_names=format == "sgm")
    if non_finite_key := find_non_finite(tensors):
        raise InvalidArgumentError(
            f"{non_finite_key} holds NaN or infinity as {dtype}: "
            f"the LoRA is broken or needs float32"
        )
    metadata = metadata.with_defaults(weights.layout)
    file_metadata = metadata.to_safetensors_metadata(weights.layout)
    if format == "diffusers":
        file_metadata["lora_adapter_metadata"] = json.dumps(
            _build_adapter_config(weights.layout), indent=2, sort_keys=True
        )
    else:
        is_sdxl = (
            format == "sgm"
            or "text_encoder_2" in weights.layout.components
            or metadata.architecture.startswith("stable-diffusion-xl")
        )
        tensors = _convert_to_kohya(tensors, is_sdxl)
    return serialize_tensors(tensors, file_metadata)


def _validate_weights(weights: LoraWeights, format: str, dtype: torch.dtype) -> None:
    """Raise ``InvalidArgumentError`` for what the tools of a format cannot load."""
    if format not in LORA_FORMATS:
        raise InvalidArgumentError(
            f"unknown LoRA format {format!r}; known: {', '.join(LORA_FORMATS)}"
        )
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"LoRA files hold float32, float16 or bfloat16, not {dtype}")
    if weights.batch_shape:
        raise InvalidArgumentError(
            f"one LoRA per file, this is a batch of {list(weights.batch_shape)}: index it first"
        )
    components = COMPONENTS if format == "diffusers" else tuple(KOHYA_PREFIXES)
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
    weights: LoraWeights, dtype: torch.dtype, use_sgm_names: bool
) -> dict[str, Tensor]:
    """Tensors by keys of diffusers; the paths of the UNet may be Stability's."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    tensors: dict[str, Tensor] = {}
    for component in weights.layout.components:
        component_tensors: dict[str, Tensor] = {}
        for target, down, up in zip(weights.layout.targets, weights.down, weights.up, strict=True):
            if target.component == component:
                path = format_file_key(target.name).split(".", 1)[1]
                path = convert_path_to_sgm(path) if use_sgm_names and component == "unet" else path
                if target.kernel_size:
                    down = down.reshape(len(down), -1, *target.kernel_size)  # [rank, in, kh, kw]
                    up = up[..., None, None]  # [out, rank, 1, 1]
                component_tensors[f"{path}.lora_A.weight"] = down.to(dtype)
                component_tensors[f"{path}.lora_B.weight"] = up.to(dtype)
        tensors |= LoraBaseMixin.pack_weights(component_tensors, component)
    return tensors


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
