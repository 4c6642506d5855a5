"""``LoraKeeper``: keeps an identity by the LoRA that a model makes of the reference."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from PIL import Image

from data_builder.people.identity_keeper import MAX_BATCH_SIZE, SamplingConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.negative_lora import get_negative_rule
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.photo_model import AnyPhotoModel, SubjectPhotos


class LoraKeeper:
    """Draws with the LoRA of the reference and the trigger phrase of its model.

    Args:
        base: The base that draws.
        model: Any model from photos to LoRAs of this base.
        sampling: Steps and guidance.

    Raises:
        InvalidArgumentError: The base generates nothing from a prompt alone.
        LayoutMismatchError: The model is for another base.
    """

    def __init__(self, base: DiffusionBase, model: AnyPhotoModel, sampling: SamplingConfig) -> None:
        base.check_generates_images()
        model.check_base(base)
        self.base, self.model, self.sampling = base, model, sampling
        self._metadata = model.make_metadata("", [])

    @property
    def scenes(self) -> Sequence[str]:
        """The scenes of the model's card."""
        return self.model.card.scenes

    def make_prompt(self, noun: str, scene: str) -> str:
        """Make a prompt with the trigger phrase, where the model's authors put it.

        Args:
            noun: Used if the model has no trigger phrase, or one that only begins prompts.
            scene: What else the image shows.

        Returns:
            The prompt.
        """
        prefix = self._metadata.extra.get(PROMPT_PREFIX_KEY, "")
        subject = noun if prefix else self.model.trigger_phrase or noun
        return f"{prefix}a portrait of {subject}, {scene}"

    def draw_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        reference: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Draw one image per prompt.

        Args:
            prompts: n prompts.
            seeds: n seeds.
            reference: The image of which the LoRA is; None for the base alone.

        Returns:
            n RGB images.

        Raises:
            InvalidImageError: The model finds nothing that it knows, e.g. no face.
        """
        lora, negative_lora = (None, None) if reference is None else self._make_loras(reference)
        rule = get_negative_rule(self._metadata)
        has_branches = rule == "off" or negative_lora is not None
        context = (
            inject_lora_by_branch(self.base.pipeline, lora, negative_lora)
            if lora is not None and has_branches
            else nullcontext()
        )
        images: list[Image.Image] = []
        with context:
            for start in range(0, len(prompts), MAX_BATCH_SIZE):
                batch = slice(start, start + MAX_BATCH_SIZE)
                images += generate_images(
                    self.base,
                    prompts[batch],
                    None if has_branches else lora,
                    seeds=seeds[batch],
                    num_inference_steps=self.sampling.num_inference_steps,
                    guidance_scale=self.sampling.guidance_scale,
                )
        return images

    @torch.no_grad()
    def _make_loras(self, reference: Image.Image) -> tuple[LoraWeights, LoraWeights | None]:
        """The LoRA of a reference at its recommended strength, and that of the negative branch."""
        photos = [SubjectPhotos.from_images([reference], self.model)]
        features = self.model.encode_subjects(photos)
        strength = self._metadata.recommended_strength
        lora = self.model.generate_from_features(features)[0].to(self.base.device) * strength
        negative = self.model.generate_negative(features)
        if negative is None:
            return lora, None
        return lora, negative[0].to(self.base.device) * strength
