"""``save_lora``: one file that the tools of its format take, alpha folded so that alpha = rank."""

import json
from os import PathLike
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from hyperlora.errors import BadRequest
from hyperlora.lora.io.keys import COMPONENTS, KOHYA_PREFIXES, file_name, sgm_path
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.safetensors_file import encoded, first_not_finite, write_bytes
from hyperlora.lora.io.state_dict import LoraFormat
from hyperlora.lora.layout import LoraLayout, Site
from hyperlora.lora.weights import LoraWeights

FORMATS: Final = ("diffusers", "kohya", "sgm")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_lora(
    weights: LoraWeights,
    path: str | PathLike[str],
    *,
    format: LoraFormat | Literal["sgm"] = "diffusers",
    header: LoraHeader | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one LoRA (no batch axis) to a ``.safetensors`` file, whole or not at all; undone by ``load_lora``.

    ``diffusers`` keys (``unet.….lora_A.weight``) serve diffusers and, for ``transformer``, ComfyUI; ``kohya`` keys
    serve A1111, Forge and ComfyUI for Stable Diffusion 1, 2 and XL; ``sgm`` are kohya's with Stability's block names,
    as kohya's own trainer writes them for SDXL.

    Raises ``BadRequest`` for a batch, NaN or infinity (also after rounding to ``dtype``), an unknown component or
    dtype, a text encoder LoRA that loaders refuse, or another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadRequest(f"LoRA files are written as .safetensors, got {path.name}")
    write_bytes(lora_bytes(weights, format=format, header=header, dtype=dtype), path)
    return path


def lora_bytes(
    weights: LoraWeights,
    *,
    format: LoraFormat | Literal["sgm"] = "diffusers",
    header: LoraHeader | None = None,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """The file that ``save_lora`` writes, in memory; undone by ``load_lora``."""
    header = header or LoraHeader()
    _check(weights, format, dtype)
    tensors = _peft_tensors(weights, dtype, sgm=format == "sgm")
    if bad := first_not_finite(tensors):
        raise BadRequest(f"{bad} holds NaN or infinity as {dtype}: the LoRA is broken or needs float32")
    header = header.filled(weights.layout)
    metadata = header.to_metadata(weights.layout)
    if format == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps(_adapter_config(weights.layout), indent=2, sort_keys=True)
    else:
        sdxl = (
            format == "sgm"
            or "text_encoder_2" in weights.layout.components
            or header.architecture.startswith("stable-diffusion-xl")
        )
        tensors = _kohya_tensors(tensors, sdxl)
    return encoded(tensors, metadata)


def _check(weights: LoraWeights, format: str, dtype: torch.dtype) -> None:
    if format not in FORMATS:
        raise BadRequest(f"unknown LoRA format {format!r}; known: {', '.join(FORMATS)}")
    if dtype not in _DTYPES:
        raise BadRequest(f"LoRA files hold float32, float16 or bfloat16, not {dtype}")
    if weights.batch:
        raise BadRequest(f"one LoRA per file, this is a batch of {list(weights.batch)}: index it first")
    components = COMPONENTS if format == "diffusers" else tuple(KOHYA_PREFIXES)
    if unknown := [name for name in weights.layout.components if name not in components]:
        raise BadRequest(f"{format} files hold {', '.join(components)}, not {unknown[0]}: use another format")
    needed = ("q_proj", "k_proj", "v_proj", "out_proj") if format == "diffusers" else ("out_proj",)
    for component in ("text_encoder", "text_encoder_2"):
        sites = [site.name for site in weights.layout.sites if site.component == component]
        if sites and not any(name.endswith(needed) for name in sites):
            raise BadRequest(f"diffusers cannot load a {component} LoRA without {needed[-1]} sites: adapt these too")


def _peft_tensors(weights: LoraWeights, dtype: torch.dtype, sgm: bool) -> dict[str, Tensor]:
    from diffusers.loaders.lora_base import LoraBaseMixin

    tensors: dict[str, Tensor] = {}
    for component in weights.layout.components:
        layers: dict[str, Tensor] = {}
        for site, down, up in zip(weights.layout.sites, weights.down, weights.up, strict=True):
            if site.component == component:
                path = file_name(site.name).split(".", 1)[1]
                path = sgm_path(path) if sgm and component == "unet" else path
                layers[f"{path}.lora_A.weight"] = _down_kernel(site, down).to(dtype)
                layers[f"{path}.lora_B.weight"] = (up[..., None, None] if site.kernel else up).to(dtype)
        tensors |= LoraBaseMixin.pack_weights(layers, component)
    return tensors


def _down_kernel(site: Site, down: Tensor) -> Tensor:
    return down.reshape(len(down), -1, *site.kernel) if site.kernel else down


def _kohya_tensors(tensors: dict[str, Tensor], sdxl: bool) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(tensors)
    if len(converted) != len(tensors) // 2 * 3:
        raise BadRequest("two sites of this LoRA have one name in kohya's format: save it as diffusers")
    if not sdxl:  # Stable Diffusion 1 and 2 have one text encoder, which kohya's tools do not number
        converted = {key.replace("lora_te1_", "lora_te_", 1): tensor for key, tensor in converted.items()}
    return {key: tensor.float() if key.endswith(".alpha") else tensor for key, tensor in converted.items()}


def _adapter_config(layout: LoraLayout) -> dict[str, object]:
    """What diffusers needs to rebuild the PEFT config. Text encoder paths go without ``text_model.``: PEFT matches
    suffixes, so they fit flattened and nested CLIP models alike."""
    config: dict[str, object] = {}
    for component in layout.components:
        paths = [site.path.removeprefix("text_model.") for site in layout.sites if site.component == component]
        config |= {f"{component}.r": layout.rank, f"{component}.lora_alpha": layout.rank}
        config[f"{component}.target_modules"] = sorted(paths)
    return config
