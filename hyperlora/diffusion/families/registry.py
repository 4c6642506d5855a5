"""The family of each pipeline class."""

from typing import TYPE_CHECKING, Final

from torch import nn

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.chroma import ChromaFamily
from hyperlora.diffusion.families.flux import FluxFamily, FluxKontextFamily
from hyperlora.diffusion.families.flux2 import Flux2Family, Flux2KleinFamily
from hyperlora.diffusion.families.hidream import HiDreamFamily
from hyperlora.diffusion.families.instruct_pix2pix import (
    InstructPix2PixFamily,
    InstructPix2PixXLFamily,
)
from hyperlora.diffusion.families.krea_2 import Krea2Family
from hyperlora.diffusion.families.lumina_2 import Lumina2Family
from hyperlora.diffusion.families.qwen_image import (
    QwenImageEditFamily,
    QwenImageEditPlusFamily,
    QwenImageFamily,
)
from hyperlora.diffusion.families.qwen_image_21 import QwenImage21Family
from hyperlora.diffusion.families.stable_diffusion import StableDiffusionFamily
from hyperlora.diffusion.families.stable_diffusion_3 import StableDiffusion3Family
from hyperlora.diffusion.families.stable_diffusion_xl import StableDiffusionXLFamily
from hyperlora.diffusion.families.z_image import ZImageFamily
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import unwrap_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

FAMILIES: "Final[Mapping[str, type[PipelineFamily]]]" = {
    "StableDiffusionPipeline": StableDiffusionFamily,
    "StableDiffusionXLPipeline": StableDiffusionXLFamily,
    "StableDiffusionInstructPix2PixPipeline": InstructPix2PixFamily,
    "StableDiffusionXLInstructPix2PixPipeline": InstructPix2PixXLFamily,
    "StableDiffusion3Pipeline": StableDiffusion3Family,
    "FluxPipeline": FluxFamily,
    "FluxKontextPipeline": FluxKontextFamily,
    "ZImagePipeline": ZImageFamily,
    "ChromaPipeline": ChromaFamily,
    "Lumina2Pipeline": Lumina2Family,
    "HiDreamImagePipeline": HiDreamFamily,
    "Krea2Pipeline": Krea2Family,
    "QwenImage21Pipeline": QwenImage21Family,
    "Flux2Pipeline": Flux2Family,
    "Flux2KleinPipeline": Flux2KleinFamily,
    "QwenImagePipeline": QwenImageFamily,
    "QwenImageEditPipeline": QwenImageEditFamily,
    "QwenImageEditPlusPipeline": QwenImageEditPlusFamily,
}
"""Families by the name of diffusers' pipeline class; subclasses of a pipeline share its family."""


def get_pipeline_family(pipeline: "DiffusionPipeline") -> PipelineFamily:
    """Return the adapter of a pipeline, found by its class.

    Args:
        pipeline: The diffusers pipeline.

    Returns:
        The adapter.

    Raises:
        InvalidArgumentError: The class, and every class it derives from, has no family.
    """
    for pipeline_class in type(pipeline).__mro__:
        if family := FAMILIES.get(pipeline_class.__name__):
            return family(pipeline)
    raise InvalidArgumentError(
        f"{type(pipeline).__name__} is not supported as a base: expected one of "
        f"{', '.join(FAMILIES)}; docs/contributing/add-a-base.md says how to add another"
    )


def get_denoiser_family(denoiser: nn.Module) -> type[PipelineFamily]:
    """Return the family of a denoiser by its class, for what needs no pipeline, as LoRA targets.

    Args:
        denoiser: A UNet or transformer of diffusers, compiled or not.

    Returns:
        The first family with this class of denoiser: of a UNet that of Stable Diffusion, whose
        layers have the names of SDXL's.

    Raises:
        InvalidArgumentError: No family has this class of denoiser.
    """
    module = unwrap_module(denoiser)
    for family in FAMILIES.values():
        if family.denoiser_class_name == type(module).__name__:
            return family
    raise InvalidArgumentError(
        f"{type(module).__name__} is no denoiser that is supported: expected one of "
        f"{', '.join(sorted({family.denoiser_class_name for family in FAMILIES.values()}))}"
    )
