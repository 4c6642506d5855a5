"""``PipelineFamily``: what depends on the class of a diffusers pipeline, behind one interface.

Three conventions hold for every family, whatever its denoiser takes:

latents      [n, c, h, w], scaled as the pipeline's own; noise is added to them
timesteps    [n], as ``scheduler.timesteps`` holds them: 0 is clean, ``num_train_timesteps`` noise
prediction   [n, c, h, w], what ``scheduler.step`` takes: ε, v, or the velocity ε - x_0

An adapter translates them into the arguments of its denoiser: packed tokens, lists, other times.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hyperlora.cpu import select_sdpa_kernel
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.vae_precision import run_in_safe_precision
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

DenoiserInputs = dict[str, Any]
"""Keyword arguments of one denoiser call, by the names of its ``forward``."""
Window = tuple[int, int, int, int]
"""First row, first column, rows and columns of a rectangle."""


class PipelineFamily(ABC):
    """Adapter of one family of diffusers pipelines.

    A new family is a subclass in a file of its own and a line in ``registry.FAMILIES``.

    Args:
        pipeline: The diffusers pipeline.
    """

    modelspec_name: ClassVar[str]
    """Architecture name of the family in modelspec metadata."""
    denoiser_name: ClassVar[Literal["unet", "transformer"]] = "transformer"
    """Component that denoises."""
    denoiser_class_name: ClassVar[str]
    """Its class in diffusers."""
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Components that encode prompts, whether or not they can take a LoRA."""
    adaptable_text_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that can take a LoRA: those of CLIP."""
    edits_images: ClassVar[bool] = False
    """Whether the pipeline edits an input image by an instruction."""
    requires_input_image: ClassVar[bool] = False
    """Whether the pipeline generates nothing without an input image."""
    encodes_images_in_prompts: ClassVar[bool] = False
    """Whether the text encoder sees the input image of an edit, too."""
    size_multiple: ClassVar[int]
    """Widths and heights in latent positions must be multiples of this: the denoiser's patch."""
    attention_pattern: ClassVar[str]
    """Regular expression of the projections of attention, among the denoiser's module paths."""
    feed_forward_pattern: ClassVar[str]
    """Regular expression of the feed-forward layers, and of time projections small bases need."""
    convolution_pattern: ClassVar[str | None] = None
    """Regular expression of the convolutions; None where the denoiser has none."""
    schedulers: ClassVar[tuple[str, ...]] = (
        "FlowMatchEulerDiscrete",
        "FlowMatchLCM",
        "UniPCMultistep",
    )
    """Schedulers that the pipeline samples with, by diffusers' class names without ``Scheduler``
    (and ``schedulers._VARIANTS``)."""
    default_guidance_scale: ClassVar[float] = 3.5
    """Guidance scale of samples where none is given."""
    default_edit_guidance_scale: ClassVar[float | None] = None
    """The same of edits; None for that of samples."""
    default_num_inference_steps: ClassVar[int] = 28
    """Denoising steps of samples where none are given."""
    takes_negative_prompts: ClassVar[bool] = True
    """Whether a prompt can be given of what to avoid."""
    edits_in_batches: ClassVar[bool] = True
    """Whether one call edits several images, each by its own instruction."""
    batches_branches: ClassVar[bool] = False
    """Whether the guidance branches are one batch; otherwise each is a call of its own."""
    negative_branches: ClassVar[tuple[bool, ...]] = (False, True)
    """Which guidance branches are negative: in order in a batch, or as calls of one step."""
    grid_multiple: ClassVar[int] = 1
    """Windows in units of ``get_grid`` must be multiples of this: 1 where a unit is a token."""
    latents_input: ClassVar[str] = "hidden_states"
    """Argument of the denoiser with the noisy latents."""
    timestep_input: ClassVar[str] = "timestep"
    """Argument of the denoiser with the time."""
    time_runs_upward: ClassVar[bool] = False
    """Whether the denoiser's time grows while a pipeline samples, as 1 - σ does."""
    unbatched_inputs: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the denoiser that describe positions, not samples."""
    listed_inputs: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the denoiser that are lists with one entry for each sample."""
    batch_axis_1_inputs: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the denoiser whose second axis, not the first, is that of samples."""

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        self.pipeline = pipeline

    @property
    def architecture(self) -> str:
        """Architecture name in modelspec metadata, of this pipeline's size."""
        return self.modelspec_name

    # ---- components ----

    @property
    def denoiser(self) -> "ModelMixin":
        """The UNet or the transformer."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The text encoders that the pipeline has, by component name."""
        modules = {name: getattr(self.pipeline, name) for name in self.text_encoder_names}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def device(self) -> torch.device:
        """Device on which the pipeline computes, also where it is offloaded."""
        return self.pipeline._execution_device

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the pipeline samples by default."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def pixel_multiple(self) -> int:
        """Widths and heights in pixels must be multiples of this."""
        return int(self.pipeline.vae_scale_factor * self.size_multiple)

    # ---- prompts ----

    @abstractmethod
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts, without the unconditional branch of guidance.

        Args:
            prompts: n prompts.
            images: Input images of an edit [n, 3, h, w] in [0, 1], for text encoders that see them.

        Returns:
            The embeddings.
        """

    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Make the arguments with which ``pipeline(...)`` takes encoded prompts.

        Args:
            conditions: Of n prompts, as ``encode_text`` returns them.

        Returns:
            Arguments by name, e.g. ``prompt_embeds``.
        """
        return {**conditions}

    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make the arguments of ``pipeline(...)`` for guidance.

        Args:
            guidance_scale: w of ε(∅) + w (ε(c) - ε(∅)) (2207.12598), where 1 is no guidance; or
                the scale that a guidance-distilled denoiser is told.
            negative_prompts: n prompts of the unconditional branch.

        Returns:
            Arguments by name.
        """
        return {"guidance_scale": guidance_scale, "negative_prompt": negative_prompts}

    def make_size_arguments(self, width: int, height: int) -> dict[str, Any]:
        """Make the arguments of ``pipeline(...)`` for the size of images.

        Args:
            width: In pixels, a multiple of ``pixel_multiple``.
            height: Likewise.
        """
        return {"width": width, "height": height}

    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make the arguments of ``pipeline(...)`` that edit n images.

        Args:
            images: Input images [n, 3, h, w] in [0, 1]; n is 1 unless ``edits_in_batches``.
            guidance_scale: By the instruction; 1 is no guidance.
            image_guidance_scale: By the input image, of InstructPix2Pix alone.

        Returns:
            Arguments by name, without the instructions.

        Raises:
            InvalidArgumentError: The family does not edit images.
        """
        raise InvalidArgumentError(
            f"{type(self.pipeline).__name__} does not edit images: an InstructPix2Pix, "
            "FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit pipeline was expected; give --base"
        )

    # ---- latents ----

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to scaled latents, the means of the posterior."""
        vae = self.pipeline.vae
        with run_in_safe_precision(vae):
            pixels = (images * 2 - 1).to(self.device, vae.dtype)  # [n, 3, h, w] in [-1, 1]
            mean = vae.encode(pixels).latent_dist.mean  # [n, c, h/f, w/f]
        return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [n, 3, h, w] in [0, 1], differentiably."""
        vae = self.pipeline.vae
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    # ---- denoiser ----

    @abstractmethod
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments with which the pipeline calls its denoiser.

        Args:
            latents: Noisy latents [n, c, h, w].
            timesteps: As ``scheduler.timesteps`` holds them [n].
            conditions: Of n prompts, with ``image_latents`` where the family edits images.
            guidance_scale: Scale that guidance-distilled denoisers take; None for the one they
                are trained with. Other denoisers take none.

        Returns:
            Arguments by name.
        """

    def read_output(self, output: Any, latents: Tensor) -> Tensor:  # noqa: ANN401 - tensor or list
        """Return the prediction that a denoiser's raw output holds.

        Args:
            output: What the denoiser returned, e.g. tokens or a list.
            latents: Its noisy latents [n, c, h, w].

        Returns:
            [n, c, h, w].
        """
        return output

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        *,
        denoiser: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Run the denoiser as the pipeline does, differentiably.

        Args:
            latents: Noisy latents [n, c, h, w].
            timesteps: As ``scheduler.timesteps`` holds them [n].
            conditions: Of n prompts.
            denoiser: Another denoiser of the same class, e.g. one in training; None for the
                pipeline's own.
            guidance_scale: Scale that guidance-distilled denoisers take.

        Returns:
            The prediction [n, c, h, w].
        """
        module: Any = denoiser or self.denoiser
        inputs = self.make_inputs(latents.to(module.dtype), timesteps, conditions, guidance_scale)
        # checkpointed blocks rerun outside of this context, and must choose the same kernel there
        kernel_context = (
            nullcontext()
            if module.is_gradient_checkpointing
            else select_sdpa_kernel(latents, latents[0, 0].numel())
        )
        with kernel_context:
            return self.read_output(module(**inputs, return_dict=False)[0], latents)

    # ---- calls that a running pipeline makes ----

    def get_grid(self, inputs: DenoiserInputs) -> tuple[int, int]:
        """Return rows and columns of the noisy latents of one call, in units of the prediction.

        Args:
            inputs: Of the call. Here the latents are [n, c, h, w].

        Raises:
            InvalidArgumentError: The family does not tell where its tokens lie.
        """
        latents = inputs[self.latents_input]
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            raise InvalidArgumentError(
                f"regions are not supported on a {type(self.pipeline).__name__}: "
                "use merge, switch or composite"
            )
        return latents.shape[-2], latents.shape[-1]

    def crop_inputs(self, inputs: DenoiserInputs, window: Window) -> DenoiserInputs:
        """Restrict a call to a rectangle of its noisy latents.

        Args:
            inputs: Of the call.
            window: First row, first column, rows and columns, in units of ``get_grid``.

        Returns:
            Arguments of a call whose prediction has the size of the rectangle.
        """
        top, left, height, width = window
        latents = inputs[self.latents_input]
        cropped_latents = latents[..., top : top + height, left : left + width]
        return {**inputs, self.latents_input: cropped_latents}

    # ---- guidance ----

    def count_branches(self, num_samples: int) -> int:
        """Count the guidance branches along the batch axis of one denoiser call.

        Args:
            num_samples: Batch size of the call.

        Returns:
            1 without classifier-free guidance in this call, else the number of its branches.
        """
        num_branches = len(self.negative_branches)
        is_guided = self.batches_branches and self.pipeline.do_classifier_free_guidance
        return num_branches if is_guided and num_samples >= num_branches else 1

    def combine_branches(self, model_output: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Apply classifier-free guidance (2207.12598): ε(∅) + w (ε(c) - ε(∅)).

        Args:
            model_output: Predictions of the unconditional and the conditional branch [2 n, ...].
            guidance_scale: w, by default that of the running pipeline.

        Returns:
            The guided prediction [n, ...].
        """
        scale = self._get_guidance_scale(guidance_scale)
        uncond_output, text_output = model_output.chunk(2)  # [n, ...] each
        return uncond_output + scale * (text_output - uncond_output)

    def _get_guidance_scale(self, guidance_scale: float | None) -> float:
        return float(self.pipeline.guidance_scale) if guidance_scale is None else guidance_scale

    # ---- LoRA targets ----

    @classmethod
    def get_target_pattern(cls, preset: str) -> str:
        """Return the regular expression of the denoiser's modules that a preset adapts.

        Args:
            preset: ``attention``, ``attention+mlp`` or ``attention+conv``.

        Raises:
            InvalidArgumentError: The denoiser has no convolution.
        """
        extra_patterns = {
            "attention": None,
            "attention+mlp": cls.feed_forward_pattern,
            "attention+conv": cls.convolution_pattern,
        }
        extra_pattern = extra_patterns[preset]
        if preset == "attention+conv" and extra_pattern is None:
            raise InvalidArgumentError(
                f"preset {preset!r}: the {cls.denoiser_name} of {cls.modelspec_name} has no "
                "convolutions that take a LoRA; use attention+mlp"
            )
        return "|".join(filter(None, (cls.attention_pattern, extra_pattern)))


def broadcast_timesteps(timesteps: Tensor, latents: Tensor) -> Tensor:
    """Move timesteps to the device of the latents, and to their dtype if they are floats.

    Args:
        timesteps: One [] or one for each sample [n].
        latents: [n, ...].

    Returns:
        [n].
    """
    dtype = latents.dtype if timesteps.is_floating_point() else timesteps.dtype
    return timesteps.to(latents.device, dtype).expand(len(latents))
