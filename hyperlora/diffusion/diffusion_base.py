"""Base models: any diffusers pipeline with a UNet or a transformer, from a folder or the hub."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hyperlora.compute import ComputeConfig, Offload, disable_autocast, is_out_of_memory
from hyperlora.diffusion.conditions import (
    Conditions,
    blend_conditions,
    cat_conditions,
    map_tensors,
)
from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.placement import place_pipeline
from hyperlora.diffusion.shared_components import load_shared_components
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError, ModelLoadError
from hyperlora.hub_connection import format_offline_error, is_repo_id, require_cache_if_offline
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pretrained import check_bundle
from hyperlora.prompt_blending import compute_blend_matrix

# diffusers takes seconds to import, and a LoRA of a photo needs no pipeline
if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

PromptCache = dict[str, Conditions]
"""The conditions of single prompts [1, ...]."""
_DAMAGED_FILE_ERRORS: Final = (
    *(OSError, EOFError, ValueError, RuntimeError),
    *(UnpicklingError, SafetensorError),
)
"""Of diffusers, transformers and torch, for files that are missing, damaged or refused."""
_DAMAGED_ZIP_TEXT: Final = "PytorchStreamReader"
"""In the message of torch's RuntimeError for a damaged ``*.bin``; others are bugs."""
CACHE_SIZE: Final = 1024
"""Prompts in a cache; a cache with more is emptied."""


@dataclass(frozen=True)
class DiffusionBase:
    """A frozen diffusion pipeline with its id.

    Attributes:
        id: The hub id, or the last two parts of a folder's path.
        pipeline: The diffusers pipeline.
        offload: Where its components wait while they do not compute, as ``ComputeConfig`` has it.
    """

    id: str
    pipeline: "DiffusionPipeline"
    offload: Offload = "none"

    @cached_property
    def family(self) -> PipelineFamily:
        """The adapter of the pipeline class."""
        return get_pipeline_family(self.pipeline)

    @property
    def architecture(self) -> str:
        """Architecture name in modelspec metadata."""
        return self.family.architecture

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Components that can take a LoRA: ``unet`` or ``transformer``, and the text encoders."""
        return {self.family.denoiser_name: self.denoiser, **self.family.text_encoders}

    @property
    def denoiser(self) -> "ModelMixin":
        """The UNet or the transformer."""
        return self.family.denoiser

    @property
    def device(self) -> torch.device:
        """Device on which the base computes, also where it is offloaded."""
        denoiser = self.denoiser
        is_offloaded = hasattr(denoiser, "_hf_hook") or hasattr(denoiser, "_diffusers_hook")
        if denoiser is None or is_offloaded:  # None: loaded to encode images and prompts alone
            return self.family.device
        return next(denoiser.parameters()).device  # diffusers takes milliseconds to say it

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the denoiser computes."""
        return self.denoiser.dtype

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the denoiser was trained on."""
        return self.family.resolution

    @cached_property
    def noise_scheduler(self) -> "SchedulerMixin":
        """The training scheduler of the pipeline's sampler: DDPM or flow matching."""
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        config = self.pipeline.scheduler.config
        scheduler_class = (
            DDPMScheduler if "beta_schedule" in config else FlowMatchEulerDiscreteScheduler
        )
        return scheduler_class.from_config(config)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to scaled latents; no gradients."""
        return self.family.encode_images(images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [n, 3, h, w] in [0, 1]; gradients flow to the latents."""
        return self.family.decode_latents(latents.to(self.device))

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Run the denoiser as the pipeline does; see ``PipelineFamily.predict``.

        Args:
            latents: Noisy latents [n, c, h, w], on any device.
            timesteps: As ``scheduler.timesteps`` holds them [n].
            conditions: Of n prompts.

        Returns:
            The prediction [n, c, h, w], on the device of the base.
        """
        device = self.device
        moved_conditions = map_tensors(lambda value: value.to(device), conditions)
        return self.family.predict(latents.to(device), timesteps.to(device), moved_conditions)

    def check_gradients(self, allowed_offloads: Sequence[Offload] = ("none",)) -> None:
        """Check that gradients flow through the base.

        Args:
            allowed_offloads: Modes of offload in which no weight leaves the device between the
                forward and the backward pass.

        Raises:
            InvalidArgumentError: The base is offloaded in another way.
        """
        if self.offload not in allowed_offloads:
            raise InvalidArgumentError(
                f"fine-tuning and refinement compute gradients through the base, and offload "
                f"{self.offload!r} moves its weights away before: use offload "
                f"{' or '.join(allowed_offloads)}"
            )

    def make_layout(self, preset: str, rank: int, *, text_encoders: bool = False) -> LoraLayout:
        """Make the layout of LoRAs for this base.

        Args:
            preset: ``attention``, ``attention+mlp`` or ``attention+conv``.
            rank: At least 1.
            text_encoders: Whether the CLIP text encoders are adapted besides the denoiser.

        Returns:
            The layout.

        Raises:
            InvalidArgumentError: The preset is unknown or not for this base, the rank is below 1,
                or the base has no CLIP text encoder.
            LayoutMismatchError: A component has no target module.
        """
        names = self.family.adaptable_text_encoders if text_encoders else ()
        text_modules = {name: self.modules[name] for name in names if name in self.modules}
        if text_encoders and not text_modules:
            raise InvalidArgumentError(
                f"the text encoders of {type(self.pipeline).__name__} take no LoRA: "
                "only those of CLIP do; adapt the denoiser alone"
            )
        components = {self.family.denoiser_name: self.denoiser, **text_modules}
        return make_layout(components, preset, rank, self.id)

    def check_generates_images(self) -> None:
        """Check that the base generates images from prompts alone.

        Raises:
            InvalidArgumentError: It needs an input image.
        """
        if self.family.requires_input_image:
            raise InvalidArgumentError(
                f"base {self.id!r} is a {type(self.pipeline).__name__}, which edits images and "
                "generates none from a prompt alone: give another base, or edit with it"
            )

    def inject_lora(self, lora: LoraWeights) -> AbstractContextManager[None]:
        """Inject a LoRA into the components that it changes, within a ``with`` block.

        Args:
            lora: One LoRA for all samples, or a batch of one for each; see ``inject_lora``.

        Returns:
            A context manager.

        Raises:
            LayoutMismatchError: The LoRA changes a component or a module that the base lacks.
        """
        modules = self.modules
        for component in lora.layout.components:
            if component not in modules:
                raise LayoutMismatchError(
                    f"the LoRA changes {component}, which base {self.id!r} lacks: "
                    "use the base it is for"
                )
        lora_modules = {name: modules[name] for name in lora.layout.components}
        return inject_lora(lora_modules, lora.to(self.device))  # once, not at every call

    def encode_prompts(
        self,
        prompts: list[str],
        cache: PromptCache | None = None,
        images: Tensor | None = None,
        *,
        requires_grad: bool = False,
    ) -> Conditions:
        """Encode prompts to the conditions that ``predict`` takes.

        Args:
            prompts: n prompts, or blends of prompts (``hyperlora.prompt_blending``).
            cache: Filled with the embeddings of the plain prompts, for the next call. Valid only
                while the text encoders, with any LoRAs on them, stay the same.
            images: Input images of an edit [n, 3, h, w] in [0, 1], for families whose text encoder
                sees them; these have neither blends nor a cache.
            requires_grad: Whether gradients flow to LoRAs of the text encoders.

        Returns:
            ``prompt_embeds`` [n, tokens, width] and the further embeddings of the family.

        Raises:
            InvalidArgumentError: A blend cannot be parsed.
        """
        with (
            torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()),
            # half precision would make embeddings depend on the other prompts of a batch, and a
            # resumed run, whose cache is empty, differ from one that was not interrupted
            disable_autocast(self.device),
        ):
            return self._encode_prompts(prompts, cache, images)

    def _encode_prompts(
        self, prompts: list[str], cache: PromptCache | None, images: Tensor | None
    ) -> Conditions:
        """Encode prompts one by one, or their blends by way of plain prompts."""
        if images is not None and self.family.encodes_images_in_prompts:
            return self.family.encode_text(prompts, images)
        unique_prompts, blend_weights = compute_blend_matrix(prompts)
        if cache is None and set(unique_prompts) == set(prompts):
            # no blend: each prompt by itself, since sample i must meet LoRA i of the text encoder
            return self.family.encode_text(prompts)
        conditions = (
            self.family.encode_text(unique_prompts)
            if cache is None
            else self._encode_with_cache(unique_prompts, cache)
        )  # of p prompts
        weights = torch.tensor(blend_weights, device=conditions["prompt_embeds"].device)  # [n, p]
        return blend_conditions(conditions, weights)

    def _encode_with_cache(self, prompts: list[str], cache: PromptCache) -> Conditions:
        """Encode those of n plain prompts that the cache lacks; concatenate all."""
        if len(cache) > CACHE_SIZE:
            cache.clear()
        for prompt in prompts:
            if prompt not in cache:
                # alone: in half precision the others of a batch would change its rounding, so that
                # the embedding would depend on what the cache held before
                cache[prompt] = self.family.encode_text([prompt])
        return cat_conditions([cache[prompt] for prompt in prompts])


def load_diffusion_base(
    name_or_path: str | Path,
    compute: ComputeConfig | None = None,
    **pretrained_kwargs: Any,
) -> DiffusionBase:
    """Load a diffusers pipeline in evaluation mode, with all parameters frozen.

    Args:
        name_or_path: Folder of a pipeline, or a hub id.
        compute: Device, precision and memory; None for what ``ComputeConfig`` finds by itself.
        pretrained_kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Returns:
        The base.

    Raises:
        ModelLoadError: The folder holds no diffusers pipeline, or it cannot be loaded.
        InvalidArgumentError: The pipeline belongs to no family.
    """
    compute = compute or ComputeConfig()
    check_bundle(name_or_path)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    folder = Path(name_or_path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelLoadError(
            f"{folder} is no diffusers pipeline: model_index.json expected, none found; give --base"
        )
    is_hub_id = not folder.exists() and is_repo_id(str(name_or_path))
    is_offline = is_hub_id and require_cache_if_offline()
    logging.disable_progress_bar()  # "Loading pipeline components" is no news to a user
    transformers_logging.disable_progress_bar()
    try:
        if folder.is_dir():
            shared_components = load_shared_components(folder, compute.torch_dtype)
            pretrained_kwargs = shared_components | pretrained_kwargs
        pipeline = DiffusionPipeline.from_pretrained(
            name_or_path, dtype=compute.torch_dtype, **pretrained_kwargs
        )
    except _DAMAGED_FILE_ERRORS as error:
        is_bug = isinstance(error, RuntimeError) and _DAMAGED_ZIP_TEXT not in str(error)
        if is_bug or is_out_of_memory(error):
            raise
        if is_offline:
            raise ModelLoadError(format_offline_error(f"base {str(name_or_path)!r}")) from error
        raise ModelLoadError(
            f"base {str(name_or_path)!r} cannot be loaded as a diffusers pipeline: "
            f"{_format_error(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    base = DiffusionBase(get_base_id(name_or_path), pipeline, compute.offload)
    place_pipeline(base.family, compute)
    return base


def get_base_id(name_or_path: str | Path) -> str:
    """Return the id of a base: the hub id itself, or the last two parts of a folder's path."""
    folder = Path(name_or_path)
    return "/".join(folder.resolve().parts[-2:]) if folder.exists() else str(name_or_path)


def make_unet_encoder(base: DiffusionBase, **options: Any) -> UNetFeatureEncoder:
    """Make an image encoder from the UNet of a base, under the empty prompt.

    Args:
        base: The base; its VAE and UNet are shared, not copied.
        options: Further arguments of ``UNetFeatureEncoder``.

    Returns:
        The encoder, whose own tensors are on the CPU.
    """
    empty_prompt_embeds = base.encode_prompts([""])["prompt_embeds"].cpu()  # [1, tokens, width]
    return UNetFeatureEncoder(base.pipeline, base.noise_scheduler, empty_prompt_embeds, **options)


def _format_error(error: Exception) -> str:
    """Return what is wrong with a base in one line: the first of an error's message."""
    if isinstance(error, UnpicklingError):  # whose message advises to run the code
        return "its weights are a damaged pickle or one that can run code, use .safetensors files"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
