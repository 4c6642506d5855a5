"""The architectures of base models, by the names that LoRA files give them.

Sources: ModelSpec 1.0.1; ``sai_model_spec.py``, the trainers and ``networks/`` of
kohya-ss/sd-scripts and, for the transformers that it does not train, of kohya-ss/musubi-tuner.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.layout import LoraLayout


@dataclass(frozen=True)
class Architecture:
    """The names of one architecture in files.

    Attributes:
        name: ``modelspec.architecture``, without ``/lora``.
        base_version: kohya's ``ss_base_model_version``.
        network_module: kohya's module of LoRAs for it, ``ss_network_module``; empty if it has none.
        group: Architectures of one group share their weights' names and shapes. A LoRA of one then
            fits the others, or its shapes tell.
        spellings: Beginnings of its names in files of other tools, in small letters and digits.
    """

    name: str
    base_version: str
    network_module: str
    group: str
    spellings: tuple[str, ...]


CUSTOM_UNET: Final = "custom-unet"
"""The architecture of UNets whose text width is of no released Stable Diffusion."""
_ARCHITECTURES: Final = (
    Architecture(
        "stable-diffusion-v1",
        "sd_v1",
        "networks.lora",
        "sd1",
        ("stablediffusionv1", "stablediffusion1", "sdv1", "sd1"),
    ),
    Architecture(
        "stable-diffusion-v2-512",
        "sd_v2",
        "networks.lora",
        "sd2",
        ("stablediffusionv2", "stablediffusion2", "sdv2", "sd2"),
    ),
    Architecture(
        "stable-diffusion-v2-768-v",
        "sd_v2_v",
        "networks.lora",
        "sd2",
        ("stablediffusionv2768v", "sdv2v"),
    ),
    Architecture(
        "stable-diffusion-xl-v1-base",
        "sdxl_base_v1-0",
        "networks.lora",
        "sdxl",
        ("stablediffusionxl", "sdxl"),
    ),
    Architecture(
        "stable-diffusion-3-3-medium",
        "3-medium",
        "networks.lora_sd3",
        "sd3",
        ("stablediffusion3", "stablediffusionv3", "3medium", "sd3"),
    ),
    Architecture(
        "stable-diffusion-3-3-5-medium",
        "3-5-medium",
        "networks.lora_sd3",
        "sd3",
        ("stablediffusion335medium", "stablediffusionv35medium", "35medium", "sd35medium"),
    ),
    Architecture(
        "stable-diffusion-3-3-5-large",
        "3-5-large",
        "networks.lora_sd3",
        "sd3",
        ("stablediffusion335large", "stablediffusionv35large", "35large", "sd35large"),
    ),
    Architecture("flux-1-dev", "flux1", "networks.lora_flux", "flux1", ("flux1", "flux")),
    Architecture("flux-1-schnell", "flux1", "networks.lora_flux", "flux1", ("flux1schnell",)),
    Architecture(
        "flux-1-kontext-dev",
        "flux_kontext",
        "networks.lora_flux",
        "flux1",
        ("flux1kontext", "fluxkontext"),
    ),
    Architecture("chroma", "chroma", "networks.lora_flux", "chroma", ("chroma",)),
    Architecture("Flux.2-dev", "flux_2_dev", "networks.lora_flux_2", "flux2", ("flux2",)),
    Architecture(
        "Flux.2-klein-4b",
        "flux_2_klein_4b",
        "networks.lora_flux_2",
        "flux2",
        ("flux2klein",),
    ),
    Architecture(
        "Flux.2-klein-9b",
        "flux_2_klein_9b",
        "networks.lora_flux_2",
        "flux2",
        ("flux2klein9b",),
    ),
    Architecture("lumina-2", "lumina2", "networks.lora_lumina", "lumina2", ("lumina2",)),
    Architecture(
        "Qwen-Image", "qwen_image", "networks.lora_qwen_image", "qwen-image", ("qwenimage",)
    ),
    Architecture(
        "Qwen-Image-Edit",
        "qwen_image_edit",
        "networks.lora_qwen_image",
        "qwen-image",
        ("qwenimageedit",),
    ),
    Architecture(
        "Qwen-Image-Edit-Plus",
        "qwen_image_edit",
        "networks.lora_qwen_image",
        "qwen-image",
        ("qwenimageeditplus",),
    ),
    Architecture(
        "Qwen-Image-2.1",
        "qwen_image_21",
        "networks.lora_qwen_image_21",
        "qwen-image-2.1",
        ("qwenimage21",),
    ),
    Architecture("Z-Image", "z_image", "networks.lora_zimage", "z-image", ("zimage",)),
    Architecture("Krea-2", "krea2", "networks.lora_krea2", "krea-2", ("krea2",)),
    Architecture("hidream-i1", "hidream-i1", "", "hidream-i1", ("hidreami1", "hidream")),
    Architecture(CUSTOM_UNET, CUSTOM_UNET, "", "", ("customunet",)),
)
ARCHITECTURES: Final[Mapping[str, Architecture]] = {entry.name: entry for entry in _ARCHITECTURES}
"""All architectures by their names in modelspec."""
_GROUP_BY_TEXT_WIDTH: Final[Mapping[int, str]] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text tokens that a UNet attends to."""


def find_architecture(text: str) -> Architecture | None:
    """Find the architecture that a file names.

    Args:
        text: ``modelspec.architecture`` or ``ss_base_model_version`` of any tool.

    Returns:
        The architecture; None if the name is empty or none of a known one.
    """
    letters = re.sub(r"[^a-z0-9]", "", text.lower())
    spellings = [
        (len(spelling), entry)
        for entry in _ARCHITECTURES
        for spelling in entry.spellings
        if letters.startswith(spelling)
    ]
    return max(spellings, key=lambda item: item[0])[1] if spellings else None


def parse_architecture(metadata: Mapping[str, str]) -> str:
    """Read the architecture from the header of a file.

    Args:
        metadata: Strings by key, of any tool.

    Returns:
        A name of ``ARCHITECTURES`` where the file means one, else what it says; empty if unknown.
    """
    spec = metadata.get("modelspec.architecture", "").partition("/")[0].removesuffix("-lora")
    base_version = metadata.get("ss_base_model_version", "")
    names = [name for name in (spec, base_version) if name.lower() not in ("", "unknown")]
    for name in names:
        if architecture := find_architecture(name):
            return architecture.name
    if names:
        return names[0]
    module = metadata.get("ss_network_module", "")
    if module != "networks.lora":  # which trains all versions of Stable Diffusion up to XL
        for entry in _ARCHITECTURES:
            if module and module == entry.network_module:
                return entry.name
    return "stable-diffusion-v2-512" if metadata.get("ss_v2") == "True" else ""


def get_base_version(architecture: str) -> str:
    """Return kohya's ``ss_base_model_version`` of an architecture, unknown ones unchanged."""
    entry = ARCHITECTURES.get(architecture)
    return entry.base_version if entry else architecture or "unknown"


def get_network_module(architecture: str, layout: LoraLayout) -> str:
    """Return kohya's module of LoRAs.

    Args:
        architecture: The name in modelspec; empty if it is unknown.
        layout: The layout of the LoRA.

    Returns:
        The module; empty if kohya's programs have none.
    """
    if entry := ARCHITECTURES.get(architecture):
        return entry.network_module
    is_unet = "transformer" not in layout.components
    return "networks.lora" if is_unet and not architecture else ""


def check_same_architecture(
    name: str,
    architecture: str,
    layout: LoraLayout,
    other: tuple[str, str, LoraLayout],
) -> None:
    """Check that two LoRAs can be combined, as far as architectures tell; shapes tell the rest.

    Args:
        name: The file of the first LoRA.
        architecture: What its header says, empty if nothing.
        layout: Its layout.
        other: The same of the second LoRA.

    Raises:
        LayoutMismatchError: The LoRAs are for different architectures.
    """
    other_name, other_architecture, other_layout = other
    group = _find_group(architecture, layout)
    other_group = _find_group(other_architecture, other_layout)
    if group and other_group and group != other_group:
        raise LayoutMismatchError(
            f"{name} is for {architecture or group}, {other_name} is for "
            f"{other_architecture or other_group}: combine LoRAs of one architecture"
        )
    denoiser, other_denoiser = _find_denoiser(layout), _find_denoiser(other_layout)
    if denoiser and other_denoiser and denoiser != other_denoiser:
        raise LayoutMismatchError(
            f"{name} changes a {denoiser}, {other_name} a {other_denoiser}: "
            f"combine LoRAs of one architecture"
        )


def _find_group(architecture: str, layout: LoraLayout) -> str:
    """The group of an architecture, or where it is not known, what the shapes of a UNet tell."""
    if entry := find_architecture(architecture):
        return entry.group
    for target in layout.targets:
        if target.component == "unet" and target.is_text_projection:
            return _GROUP_BY_TEXT_WIDTH.get(target.in_features, "")
    return ""


def _find_denoiser(layout: LoraLayout) -> str:
    """``unet`` or ``transformer``; empty for a LoRA of text encoders alone."""
    return next((name for name in layout.components if name in ("unet", "transformer")), "")
