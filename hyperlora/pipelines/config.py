"""Settings of the pipelines, validated when they are made."""

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Final, Literal, Self

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.formats import FORMAT_CHOICES, FormatChoice
from hyperlora.seeds import validate_seed

RefineMethod = Literal["identity", "photos"]
"""The objective of refinement: the identity in generated images, or the photos' diffusion loss."""
MAX_STRENGTH: Final = 10.0
"""The largest absolute value of a strength."""


@dataclass(frozen=True)
class LoraSampling:
    """How a generative model samples a LoRA from noise.

    Attributes:
        seed: The seed of the noise; the LoRAs of one subject take ``seed``, ``seed + 1``, ...
        num_inference_steps: Denoising steps over LoRA latents; None for the model card's value.
        guidance_scale: Classifier-free guidance by the photos; None for the model card's value.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        validate_seed(self.seed)
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise InvalidArgumentError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if self.guidance_scale is not None and not isfinite(self.guidance_scale):
            raise InvalidArgumentError(
                f"guidance_scale must be a finite number, got {self.guidance_scale}"
            )


@dataclass(frozen=True)
class GenerationConfig:
    """How LoRAs are generated from photos and written.

    Attributes:
        format: The key names of the file.
        rank: The rank of the LoRA; None keeps the model's.
        strength: A factor of the LoRA, from -10 to 10.
        refine_steps: Fine-tuning steps after the forward pass; 0 for none. They need a base.
        sampling: How a generative model samples; others accept the default only.
        num_candidates: LoRAs that are sampled per subject. If they are more than ``num_loras``, an
            ``IdentityReranker`` keeps those most similar to the photos.
        refine_method: The objective of refinement; None for identity where the model can embed it.
        num_loras: LoRAs per subject, each another sample.

    Raises:
        InvalidArgumentError: A value is out of range, or two values exclude each other.
    """

    format: FormatChoice = "auto"
    rank: int | None = None
    strength: float = 1.0
    refine_steps: int = 0
    sampling: LoraSampling = field(default_factory=LoraSampling)
    num_candidates: int = 1
    refine_method: RefineMethod | None = None
    num_loras: int = 1

    def __post_init__(self) -> None:
        _check_format(self.format)
        _check_strength(self.strength)
        rank = 1 if self.rank is None else self.rank
        if min(rank, self.num_loras, self.num_candidates) < 1 or self.refine_steps < 0:
            raise InvalidArgumentError(
                "rank, num_loras and num_candidates must be at least 1, refine_steps at least 0, "
                f"got {self.rank}, {self.num_loras}, {self.num_candidates}, {self.refine_steps}"
            )
        if self.refine_method and not self.refine_steps:
            raise InvalidArgumentError(
                "refine_method says how to refine: give refine_steps (--refine-steps STEPS) too"
            )

    @property
    def needs_reranking(self) -> bool:
        """Whether more LoRAs are sampled than kept."""
        return self.num_candidates > self.num_loras

    @property
    def needs_base(self) -> bool:
        """Whether generation runs the base model, to refine or to rerank."""
        return bool(self.refine_steps) or self.needs_reranking

    def drop_refinement(self) -> Self:
        """Return the same settings without refinement."""
        return replace(self, refine_steps=0, refine_method=None)

    def check_folder(self, use_ray: bool = False) -> None:
        """Check that the settings suit a folder of subjects.

        Args:
            use_ray: Whether a Ray cluster generates the LoRAs.

        Raises:
            InvalidArgumentError: Several LoRAs per subject, or reranking on a cluster.
        """
        if self.num_loras > 1:
            raise InvalidArgumentError(
                "--num-loras makes several LoRAs of one subject: leave out --input-dir, "
                "or choose with --num-candidates"
            )
        if use_ray and self.num_candidates > 1:
            raise InvalidArgumentError(
                "--num-candidates generates images in this process: leave out --ray"
            )


@dataclass(frozen=True)
class EditConfig:
    """How a LoRA is generated from before/after pairs and written.

    Attributes:
        format: The key names of the file.
        strength: A factor of the LoRA, from -10 to 10; below 0 undoes the edit.
        reverse: Whether the pairs are swapped, so that the LoRA undoes the edit.
        search: Whether the base tries further instructions (``InstructionSearch``).
        candidate_prompts: Instructions to try besides those of the model's vocabulary.

    Raises:
        InvalidArgumentError: A value is out of range, or two values exclude each other.
    """

    format: FormatChoice = "auto"
    strength: float = 1.0
    reverse: bool = False
    search: bool = True
    candidate_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_format(self.format)
        if self.candidate_prompts and not self.search:
            raise InvalidArgumentError(
                "--candidate-prompt and --no-search given: trying prompts is the search, "
                "so leave one out"
            )
        _check_strength(self.strength)


def _check_format(format: str) -> None:
    if format not in FORMAT_CHOICES:
        raise InvalidArgumentError(f"unknown format {format!r}; known: {', '.join(FORMAT_CHOICES)}")


def _check_strength(strength: float) -> None:
    if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # also refuses NaN
        raise InvalidArgumentError(f"strength between -10 and 10 expected, got {strength}")
