"""The sizes of common bases: what a training takes can be computed without their weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import diffusers
import torch
import transformers
from torch import nn

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import FAMILIES
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.memory import MemoryRow

if TYPE_CHECKING:
    from diffusers import ModelMixin

_LIBRARIES: Final[Mapping[str, Any]] = {"diffusers": diffusers, "transformers": transformers}
_CLIP_L, _CLIP_BIG_G, _T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
_QWEN_3_4B, _QWEN_3_8B, _QWEN_2_5_VL_7B = 4_022_468_096, 8_190_735_360, 8_292_166_656
_MISTRAL_SMALL_24B = 24_011_361_280
_SD_VAE, _SD3_VAE, _FLUX_2_VAE, _QWEN_VAE = 83_653_863, 83_819_683, 84_046_115, 126_892_531
_CLIP_CONFIGS: Final[Mapping[int, Mapping[str, int | str]]] = {
    _CLIP_L: {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    _CLIP_BIG_G: {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}
"""Of CLIP text encoders, by their number of parameters."""
_SDXL_UNET: Final = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3_5_MEDIUM: Final = {
    "sample_size": 128,
    "in_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_KLEIN_4B: Final = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B: Final = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}


@dataclass(frozen=True)
class KnownBase:
    """The size of a pretrained base.

    Attributes:
        pipeline_name: Class of the pipeline.
        denoiser_config: Where it differs from the defaults of the denoiser's class.
        num_other_params: Parameters of the other components by name.
    """

    pipeline_name: str
    denoiser_config: Mapping[str, Any] = field(default_factory=dict)
    num_other_params: Mapping[str, int] = field(default_factory=dict)


_SD15 = KnownBase(
    "StableDiffusionPipeline",
    {"sample_size": 64, "cross_attention_dim": 768},
    {"text_encoder": _CLIP_L, "vae": _SD_VAE},
)
_KLEIN_4B_BASE = KnownBase(
    "Flux2KleinPipeline", _KLEIN_4B, {"text_encoder": _QWEN_3_4B, "vae": _FLUX_2_VAE}
)
_KLEIN_9B_BASE = KnownBase(
    "Flux2KleinPipeline", _KLEIN_9B, {"text_encoder": _QWEN_3_8B, "vae": _FLUX_2_VAE}
)
_Z_IMAGE = KnownBase("ZImagePipeline", {}, {"text_encoder": _QWEN_3_4B, "vae": _SD3_VAE})
_QWEN_PARTS: Final = {"text_encoder": _QWEN_2_5_VL_7B, "vae": _QWEN_VAE}
KNOWN_BASES: Final[Mapping[str, KnownBase]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "timbrooks/instruct-pix2pix": KnownBase(
        "StableDiffusionInstructPix2PixPipeline",
        {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 8},
        _SD15.num_other_params,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": KnownBase(
        "StableDiffusionXLPipeline",
        _SDXL_UNET,
        {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_BIG_G, "vae": _SD_VAE},
    ),
    "stabilityai/stable-diffusion-3.5-medium": KnownBase(
        "StableDiffusion3Pipeline",
        _SD3_5_MEDIUM,
        {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_BIG_G,
            "text_encoder_3": _T5_XXL,
            "vae": _SD3_VAE,
        },
    ),
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B_BASE,
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B_BASE,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B_BASE,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B_BASE,
    "black-forest-labs/FLUX.2-dev": KnownBase(
        "Flux2Pipeline", {}, {"text_encoder": _MISTRAL_SMALL_24B, "vae": _FLUX_2_VAE}
    ),
    "Tongyi-MAI/Z-Image": _Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE,
    "Qwen/Qwen-Image": KnownBase("QwenImagePipeline", {}, _QWEN_PARTS),
    "Qwen/Qwen-Image-Edit": KnownBase("QwenImageEditPipeline", {}, _QWEN_PARTS),
    "Qwen/Qwen-Image-Edit-2509": KnownBase("QwenImageEditPlusPipeline", {}, _QWEN_PARTS),
    "Qwen/Qwen-Image-Edit-2511": KnownBase(
        "QwenImageEditPlusPipeline", {"zero_cond_t": True}, _QWEN_PARTS
    ),
}
"""By hub id. Counts are those of the classes at the published sizes."""


@dataclass(frozen=True)
class MetaBase:
    """A base without numbers.

    Attributes:
        family: Adapter of a pipeline that holds the denoiser alone.
        denoiser: On the meta device.
        rows: Memory of all components.
        text_encoders: Those that can be adapted, by component, on the meta device.
    """

    family: PipelineFamily
    denoiser: "ModelMixin"
    rows: list[MemoryRow]
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)


def make_meta_base(name_or_path: str, dtype: str = "float32", num_shards: int = 1) -> MetaBase:
    """Make a base without numbers.

    Args:
        name_or_path: Folder of a pipeline, or a hub id of ``KNOWN_BASES``.
        dtype: Precision of all components.
        num_shards: Devices over which denoiser and text encoders are spread.

    Returns:
        The base.

    Raises:
        InvalidArgumentError: There is no such folder, and the id is not known.
    """
    if (Path(name_or_path) / "model_index.json").is_file():
        base = _read_meta_base(Path(name_or_path), dtype)
        return replace(base, rows=_shard_rows(base.rows, num_shards))
    if name_or_path not in KNOWN_BASES:
        raise InvalidArgumentError(
            f"the size of {name_or_path!r} is not known: give the folder of the pipeline, or one "
            f"of {', '.join(KNOWN_BASES)}"
        )
    known = KNOWN_BASES[name_or_path]
    family_class = FAMILIES[known.pipeline_name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, family_class.denoiser_class_name)(**known.denoiser_config)
    num_params = dict(known.num_other_params)
    base = _make_meta_base(family_class, denoiser, num_params, dtype, vae_scale_factor=8)
    text_encoders = {
        name: _make_meta_clip(num_params[name], denoiser.dtype)
        for name in family_class.adaptable_text_encoders
        if num_params.get(name) in _CLIP_CONFIGS
    }
    return replace(base, rows=_shard_rows(base.rows, num_shards), text_encoders=text_encoders)


def _make_meta_clip(num_params: int, dtype: torch.dtype) -> nn.Module:
    """Make a CLIP text encoder without numbers."""
    config = transformers.CLIPTextConfig(**_CLIP_CONFIGS[num_params])
    name = "CLIPTextModelWithProjection" if num_params == _CLIP_BIG_G else "CLIPTextModel"
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(config)
    return model.to(dtype).requires_grad_(False)


def _shard_rows(rows: Sequence[MemoryRow], num_shards: int) -> list[MemoryRow]:
    """Divide the bytes of all but the VAE; blocks are nearly all of a denoiser."""
    return [
        row
        if num_shards == 1 or row.name.startswith("vae ")
        else replace(
            row,
            name=row.name.replace("frozen", f"frozen, {num_shards} shards"),
            num_bytes=(row.num_bytes or 0) // num_shards,
        )
        for row in rows
    ]


def _read_meta_base(folder: Path, dtype: str) -> MetaBase:
    """Make the components of a saved pipeline from their configurations."""
    index = json.loads((folder / "model_index.json").read_text())
    modules: dict[str, nn.Module] = {}
    for name, entry in index.items():
        config_path = folder / name / "config.json"
        if isinstance(entry, list) and entry[0] in _LIBRARIES and config_path.is_file():
            module_class = getattr(_LIBRARIES[entry[0]], entry[1])
            with torch.device("meta"):
                if entry[0] == "diffusers":
                    modules[name] = module_class.from_config(module_class.load_config(config_path))
                else:
                    config = module_class.config_class.from_pretrained(folder / name)
                    modules[name] = module_class(config)
    family_class = FAMILIES[index["_class_name"]]
    denoiser: Any = modules.pop(family_class.denoiser_name)
    vae: Any = modules["vae"]
    vae_config = dict(vae.config)
    num_halvings = (
        len(vae_config["temperal_downsample"])  # of Qwen-Image, as diffusers spells it
        if "temperal_downsample" in vae_config
        else len(vae_config["block_out_channels"]) - 1
    )
    num_params = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    base = _make_meta_base(family_class, denoiser, num_params, dtype, 2**num_halvings)
    text_encoders = {
        name: modules[name].to(denoiser.dtype).requires_grad_(False)
        for name in family_class.adaptable_text_encoders
        if name in modules
    }
    return replace(base, text_encoders=text_encoders)


def _make_meta_base(
    family_class: type[PipelineFamily],
    denoiser: "ModelMixin",
    num_params: Mapping[str, int],
    dtype: str,
    vae_scale_factor: int,
) -> MetaBase:
    torch_dtype = ComputeConfig(device="cpu", dtype=dtype).torch_dtype
    for parameter in denoiser.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch_dtype)
    sizes = {
        family_class.denoiser_name: sum(p.numel() for p in denoiser.parameters()),
        **num_params,
    }
    rows = [
        MemoryRow(f"{name} ({dtype}, frozen)", count, count * torch_dtype.itemsize, "base")
        for name, count in sizes.items()
    ]
    pipeline: Any = SimpleNamespace(
        **{family_class.denoiser_name: denoiser},
        vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0)),
        vae_scale_factor=vae_scale_factor,
        default_sample_size=128,
        _execution_device=torch.device("meta"),
    )
    return MetaBase(family_class(pipeline), denoiser, rows)
