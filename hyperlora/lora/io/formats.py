"""Formats of LoRA files: which one a LoRA is written in, and which programs read it whole.

The one table is ``READERS``; the command line, the HTTP service and the guide *LoRA files* show it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.architectures import CUSTOM_UNET, find_architecture
from hyperlora.lora.io.keys import KOHYA_PREFIXES, LoraFormat
from hyperlora.lora.layout import LoraLayout, TargetModule

FormatChoice = Literal["auto", "diffusers", "kohya", "sgm", "comfyui"]
"""A format to write, or ``auto`` for the one that most programs read."""
FORMAT_CHOICES: Final[tuple[FormatChoice, ...]] = get_args(FormatChoice)
UNET_FAMILIES: Final = ("SD 1.x", "SD 2.x", "SDXL")
"""Families whose denoiser is a UNet."""

_EVERY_PROGRAM: Final = ("diffusers", "ComfyUI", "A1111", "Forge", "kohya")
_DIFFUSERS_AND_COMFYUI: Final = ("diffusers", "ComfyUI")
_WITH_FORGE: Final = ("diffusers", "ComfyUI", "Forge")
READERS: Final[Mapping[str, Mapping[LoraFormat, tuple[str, ...]]]] = {
    "SD 1.x": {"kohya": _EVERY_PROGRAM, "diffusers": ("diffusers",)},
    "SD 2.x": {"kohya": _EVERY_PROGRAM, "diffusers": ("diffusers",)},
    "SDXL": {"sgm": _EVERY_PROGRAM, "kohya": _EVERY_PROGRAM, "diffusers": ("diffusers",)},
    "SD3": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": ("ComfyUI",)},
    "FLUX.1": {"diffusers": _WITH_FORGE, "comfyui": _WITH_FORGE},
    "Chroma": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "FLUX.2": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "Qwen-Image": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "Qwen-Image 2.1": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "Z-Image": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "Lumina 2": {"diffusers": ("diffusers",), "comfyui": ("ComfyUI",)},
    "HiDream": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
    "Krea 2": {"diffusers": _DIFFUSERS_AND_COMFYUI, "comfyui": _DIFFUSERS_AND_COMFYUI},
}
"""Programs that read every target of a file, by family of bases and by format."""

_FAMILY_BY_GROUP: Final = {
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "sd3": "SD3",
    "flux1": "FLUX.1",
    "chroma": "Chroma",
    "flux2": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "qwen-image-2.1": "Qwen-Image 2.1",
    "z-image": "Z-Image",
    "lumina2": "Lumina 2",
    "hidream-i1": "HiDream",
    "krea-2": "Krea 2",
}
"""``Architecture.group`` -> family."""
_FAMILY_BY_TRANSFORMER_PATH: Final = {
    r"^single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)$": "FLUX.2",
    r"\.ff(_context)?\.linear_(in|out)$": "FLUX.2",
    r"^single_transformer_blocks\.": "FLUX.1",
    r"\.img_mlp\.(proj|gate_layer|out)$": "Qwen-Image 2.1",
    r"\.(img|txt)_mlp\.net\.": "Qwen-Image",
    r"\.attention\.to_|\.feed_forward\.w[123]$": "Z-Image",
    r"^(layers|(noise|context)_refiner)\.\d+\.(attn\.|feed_forward\.linear_)": "Lumina 2",
    r"^(double|single)_stream_blocks\.": "HiDream",
    r"^text_fusion\.|\.ff\.(gate|up|down)$|\.attn\.to_gate$": "Krea 2",
    r"^transformer_blocks\.\d+\.attn2\.": "SD3",
}
"""Layers that one family alone has, by their path in diffusers."""
_SDXL_PATH: Final = re.compile(
    r"^up_blocks\.0\.attentions\.|\.transformer_blocks\.[1-9]|^add_embedding\."
)
_SD_PATH: Final = re.compile(r"^down_blocks\.0\.attentions\.|^(down|up)_blocks\.3\.")
_CROSS_ATTENTION_FAMILIES: Final = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Width of the text embeddings -> family of UNets."""
_WIDE_FAMILY_WIDTH: Final = 3072
"""Width of FLUX.1 and Qwen-Image, which no SD3 has."""
_NO_UNET_READER: Final = (
    "A1111 and kohya read nothing of a UNet's LoRA in diffusers' key names, Forge drops it and "
    "ComfyUI reads none of its attention: format auto is read by all of them"
)


def is_linear_projection(target: TargetModule) -> bool:
    """Return whether a target is a Linear ``proj_in`` or ``proj_out`` of a UNet's attention."""
    is_projection = target.path.endswith((".proj_in", ".proj_out"))
    return target.component == "unet" and target.kernel_size is None and is_projection


def detect_family(layout: LoraLayout, architecture: str = "") -> str:
    """Detect the family of a LoRA's base.

    Args:
        layout: The targets, whose paths and widths decide where the architecture does not.
        architecture: modelspec's name of the base; empty for unknown.

    Returns:
        A key of ``READERS``; empty where nothing tells, e.g. for a text encoder alone, and for a
        UNet of no family.
    """
    if architecture == CUSTOM_UNET:
        return ""
    entry = find_architecture(architecture)
    named_family = _FAMILY_BY_GROUP.get(entry.group, "") if entry else ""
    components = layout.components
    if "transformer" in components:
        if named_family and named_family not in UNET_FAMILIES:
            return named_family
        return _detect_transformer_family(layout)
    if "unet" not in components:
        return named_family or ("SDXL" if "text_encoder_2" in components else "")
    if named_family == "SDXL" or "text_encoder_2" in components:
        return "SDXL"
    unet_targets = [target for target in layout.targets if target.component == "unet"]
    return _detect_unet_family(unet_targets, named_family)


def resolve_format(format: FormatChoice, layout: LoraLayout, architecture: str = "") -> LoraFormat:
    """Resolve ``auto`` to the format that most programs read, and check any other.

    Stable Diffusion 1 and 2 get ``kohya``, SDXL ``sgm``, transformers ``diffusers``.

    Args:
        format: The choice of the user.
        layout: The targets of the LoRA.
        architecture: modelspec's name of the base; empty for unknown.

    Returns:
        The format to write.

    Raises:
        InvalidArgumentError: The format is unknown, or has no names for this base.
    """
    if format not in FORMAT_CHOICES:
        raise InvalidArgumentError(
            f"unknown LoRA format {format!r}; known: {', '.join(FORMAT_CHOICES)}"
        )
    family = detect_family(layout, architecture)
    if format == "auto":
        return _choose_format(family, layout)
    is_other_base = bool(family) and family != "SDXL"
    if format == "sgm" and (is_other_base or architecture == CUSTOM_UNET):
        raise InvalidArgumentError(
            f"sgm names are those of SDXL, and this LoRA is for {family or architecture}: use "
            f"format {_choose_format(family, layout)}"
        )
    if format == "comfyui" and ("transformer" not in layout.components or not family):
        base = family or "an unknown base"
        raise InvalidArgumentError(
            f"comfyui names are for transformers, and this LoRA is for {base}: use format "
            f"{_choose_format(family, layout)}"
        )
    return format


def list_readers(layout: LoraLayout, format: LoraFormat, architecture: str = "") -> tuple[str, ...]:
    """List the programs that read every target of a file.

    Args:
        layout: The targets of the LoRA.
        format: The key names of the file.
        architecture: modelspec's name of the base; empty for unknown.

    Returns:
        Names of programs; diffusers alone where the base is unknown.
    """
    family = detect_family(layout, architecture)
    readers = READERS.get(family, {}).get(format, ("diffusers",))
    excluded = set()
    paths = {target.path for target in layout.targets}
    if (family, format) == ("Qwen-Image 2.1", "comfyui") and any(".img_mlp." in p for p in paths):
        excluded.add("diffusers")  # does not split the fused gate
    if format == "kohya":
        if family == "SD 2.x" and any(map(is_linear_projection, layout.targets)):
            excluded.add("diffusers")  # has Linear layers where kohya has 1x1 convolutions
        if family == "SDXL" and "up_blocks.0.upsamplers.0.conv" in paths:
            excluded.add("A1111")  # counts the layers of this block as in SD 1.x
    return tuple(reader for reader in readers if reader not in excluded)


def describe_lost_readers(layout: LoraLayout, format: LoraFormat, architecture: str = "") -> str:
    """Describe in one sentence who cannot read a file that another format would serve.

    Args:
        layout: The targets of the LoRA.
        format: The key names of the file.
        architecture: modelspec's name of the base; empty for unknown.

    Returns:
        The sentence; empty if nobody is lost.
    """
    if format == "diffusers" and "unet" in layout.components:
        return _NO_UNET_READER
    family = detect_family(layout, architecture)
    readers = set(list_readers(layout, format, architecture))
    for other_format in READERS.get(family, {}):
        other_readers = list_readers(layout, other_format, architecture)
        if lost := [reader for reader in other_readers if reader not in readers]:
            return (
                f"{' and '.join(lost)} cannot read every key of a {family} LoRA in format "
                f"{format}: use format {other_format} for {'it' if len(lost) == 1 else 'them'}"
            )
    return ""


def _choose_format(family: str, layout: LoraLayout) -> LoraFormat:
    """The format of ``auto``."""
    is_transformer = family and family not in UNET_FAMILIES
    if is_transformer or not set(layout.components) <= KOHYA_PREFIXES.keys():
        return "diffusers"
    return "sgm" if family == "SDXL" and _has_sdxl_blocks(layout) else "kohya"


def _has_sdxl_blocks(layout: LoraLayout) -> bool:
    """Whether no target contradicts SDXL's blocks, which ``sgm`` names count: 2 and 3 layers."""
    paths = [target.path for target in layout.targets if target.component == "unet"]
    up_layers = {
        match[1]
        for path in paths
        if (match := re.match(r"up_blocks\.\d\.(?:attentions|resnets)\.(\d+)\.", path))
    }
    has_other_blocks = any(re.match(r"(down|up)_blocks\.[3-9]", path) for path in paths)
    return not has_other_blocks and (not up_layers or "2" in up_layers)


def _detect_unet_family(targets: Iterable[TargetModule], named_family: str) -> str:
    """Detect the family of a UNet without second text encoder."""
    targets = list(targets)
    families = {
        _CROSS_ATTENTION_FAMILIES.get(target.in_features, "")
        for target in targets
        if target.is_text_projection
    }
    if not named_family and any(_SDXL_PATH.search(target.path) for target in targets):
        return "SDXL"
    if "SD 2.x" in families or any(map(is_linear_projection, targets)):
        return "SD 2.x"
    if named_family in UNET_FAMILIES:
        return named_family
    if any(_SD_PATH.search(target.path) for target in targets):
        return "SD 1.x"
    return next(filter(None, sorted(families)), "")


def _detect_transformer_family(layout: LoraLayout) -> str:
    """Detect the family of a transformer by layers that it alone has."""
    targets = {target.path: target for target in layout.targets}
    for pattern, family in _FAMILY_BY_TRANSFORMER_PATH.items():
        if any(re.search(pattern, path) for path in targets):
            return family
    joint_layers = {
        int(match[1]): target
        for path, target in targets.items()
        if (match := re.match(r"transformer_blocks\.(\d+)\.attn\.", path))
    }
    if any(".ff.net." in path or ".ff_context.net." in path for path in targets):
        return "FLUX.1" if _has_width(targets.values(), _WIDE_FAMILY_WIDTH) else "SD3"
    if not joint_layers:
        return ""
    if _has_width(joint_layers.values(), _WIDE_FAMILY_WIDTH):
        return "Qwen-Image"
    # the last block of SD3 has no output for the prompt
    has_output = f"transformer_blocks.{max(joint_layers)}.attn.to_add_out" in targets
    return "Qwen-Image" if has_output else "SD3"


def _has_width(targets: Iterable[TargetModule], width: int) -> bool:
    return any(target.in_features == width for target in targets)
