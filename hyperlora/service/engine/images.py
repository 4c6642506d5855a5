"""``ImageEngine``: images of prompts with LoRAs, by the thread that owns the base."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from PIL import Image

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_prompt_syntax import (
    LoraTag,
    check_no_lora_tags,
    compute_tag_scales,
    load_tagged_loras,
    parse_lora_tags,
)
from hyperlora.diffusion.multi_lora import CompositionConfig, Schedule, compose_loras
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.find import find_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import (
    describe_negative_rule,
    get_negative_rule,
    make_negative_path,
)
from hyperlora.lora.io.prompt_prefix import add_prompt_prefixes, read_lora_metadata
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.lora_files import (
    MAX_PARAMETERS,
    assign_base,
    load_request_file,
    load_request_lora,
    stack_optional_loras,
)
from hyperlora.service.engine.pixel_budget import PixelBudget
from hyperlora.service.engine.requests import EngineResult, ImageRequest, ImageSampling
from hyperlora.service.engine.worker import ModelWorker
from hyperlora.service.settings import EngineLimits

BATCH_TIMEOUT_S: Final = 0.03
"""Seconds between images that still share a batch; short beside the time of one image."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a batch: ``lora`` (no batch axis) is the sum of all LoRAs of its request."""

    prompt: str
    seed: int
    lora: LoraWeights | None


@dataclass(frozen=True)
class Composition:
    """One image that needs a batch of its own.

    Attributes:
        request: The request.
        prompt: Its prompt without LoRA tags.
        loras: The LoRAs, those of tags last.
        lora_weights: One weight per LoRA.
        schedule: Scales of the LoRAs by denoising step; None if they are constant.
        has_negative: Whether the negative branch of guidance has a LoRA of its own, or none.
        negative_lora: That LoRA, scaled.
    """

    request: ImageRequest
    prompt: str
    loras: Sequence[LoraWeights]
    lora_weights: Sequence[float]
    schedule: Schedule | None
    has_negative: bool = False
    negative_lora: LoraWeights | None = None

    def apply(self, base: DiffusionBase) -> AbstractContextManager[None]:
        """Apply the LoRAs to the base's pipeline while the context is open.

        Raises:
            InvalidArgumentError: If there is no LoRA, or the settings exclude each other.
        """
        request = self.request
        if not self.loras:
            raise InvalidArgumentError(
                f"the strategy {request.strategy!r} needs at least one LoRA, none was given"
            )
        if self.has_negative:
            merged_lora = merge(self.loras, self.lora_weights)
            return inject_lora_by_branch(base.pipeline, merged_lora, self.negative_lora)
        if request.gamma is not None:
            merged_lora = merge(self.loras, self.lora_weights)
            return apply_autolora_guidance(base.pipeline, merged_lora, request.gamma)
        return compose_loras(
            base.pipeline,
            self.loras,
            request.strategy,
            self.lora_weights,
            schedule=self.schedule,
            config=CompositionConfig(regions=request.regions, windowed=request.windowed),
        )


class ImageEngine:
    """A base, and the folder of LoRA files that prompts may name.

    Args:
        base: The base that generates images.
        lora_dir: Folder of LoRA files; None for none.
        limits: Sizes of batches, and what one image may cost.
    """

    def __init__(self, base: DiffusionBase, lora_dir: Path | None, limits: EngineLimits) -> None:
        self.base, self.lora_dir = base, lora_dir
        self.budget = PixelBudget(base, limits, base.family.default_num_inference_steps)

    async def generate_image(
        self, request: ImageRequest, worker: ModelWorker, timeout_s: float
    ) -> EngineResult[Image.Image]:
        """Generate an image of a prompt; constant sums of LoRAs share batches.

        Args:
            request: Prompt, LoRAs and settings.
            worker: Runs the base and the decoders.
            timeout_s: Seconds that the request may wait in the queue.

        Returns:
            The image.

        Raises:
            InvalidArgumentError: If the settings exclude each other, or the image costs too much.
        """
        prompt, tags = parse_lora_tags(request.prompt)
        sampling = request.sampling
        width, height = sampling.width, sampling.height
        is_per_lora = request.strategy in ("composite", "spatial")
        num_passes = max(1, len(request.loras) + len(tags)) if is_per_lora else 1
        self.budget.check_request(sampling.num_inference_steps, width, height, num_passes)
        check_no_lora_tags([request.sampling.negative_prompt], "negative prompt")
        if tags and self.lora_dir is None:
            raise InvalidArgumentError(
                "this server has no folder of LoRAs to name: "
                "send the file, or the id of a stored LoRA"
            )
        loras, metadata = await asyncio.to_thread(self._load_loras, request, tags, worker)
        prompt = add_prompt_prefixes(prompt, metadata)
        lora_weights = [
            item.recommended_strength if weight is None else weight
            for (_, weight), item in zip(request.loras, metadata, strict=False)
        ] + [1.0] * len(tags)
        is_constant = all(tag.is_constant for tag in tags)
        if request.gamma is not None and (request.strategy != "merge" or not is_constant):
            raise InvalidArgumentError(
                "gamma guides the sum of all LoRAs: "
                "use it with the strategy merge and without steps"
            )
        is_sum = request.strategy == "merge" and request.gamma is None and is_constant
        if request.negative_branch in ("off", "file") and not (is_sum and loras):
            raise InvalidArgumentError(
                "negative_lora is for the sum of all LoRAs: send at least one, with the strategy "
                "merge, without gamma and without steps in prompts"
            )
        composition = Composition(request, prompt, loras, lora_weights, None)
        notes: tuple[str, ...] = ()
        if is_sum and loras:
            composition, notes = await asyncio.to_thread(
                self._choose_negative_lora, composition, tags, metadata
            )
        if is_sum and not composition.has_negative:
            lora = await asyncio.to_thread(merge, loras, lora_weights) if loras else None
            image_spec = BatchSpec(
                "image",
                partial(self._generate_batch, sampling, worker.check_running),
                key=sampling,
                max_batch_size=self.budget.compute_batch_size(width, height),
                batch_timeout_s=BATCH_TIMEOUT_S,
            )
            item = ImageItem(prompt, request.seed, lora)
            image = await worker.run_in_batch(image_spec, item, timeout_s)
            return EngineResult(image, notes=notes)
        if not is_constant:
            schedule = partial(compute_tag_scales, tags, num_constant=len(request.loras))
            composition = replace(composition, schedule=schedule)
        spec = BatchSpec("composition", partial(self._compose_batch, worker.check_running))
        image = await worker.run_in_batch(spec, composition, timeout_s)
        return EngineResult(image, notes=notes)

    def _choose_negative_lora(
        self, composition: Composition, tags: Sequence[LoraTag], metadata: Sequence[LoraMetadata]
    ) -> tuple[Composition, tuple[str, ...]]:
        """Choose the LoRA of the negative branch, by the request or by the only LoRA's header."""
        request, branch = composition.request, composition.request.negative_branch
        if branch == "same" or (branch == "auto" and len(metadata) > 1):
            return composition, ()
        if branch == "off":
            return replace(composition, has_negative=True), ()
        weight, data = composition.lora_weights[0], request.negative_lora
        if branch == "file":
            weight = 1.0
        rule = get_negative_rule(metadata[0])
        if branch == "auto" and rule == "gray" and tags and self.lora_dir is not None:
            weight *= tags[0].denoiser_weight
            path = make_negative_path(find_lora(self.lora_dir, tags[0].name))
            data = path.read_bytes() if path.is_file() else None
        notes: tuple[str, ...] = ()
        if branch == "auto":
            name = tags[0].name if tags else metadata[0].title or "the LoRA"
            notes = tuple(filter(None, [describe_negative_rule(name, rule, data is not None)]))
            if rule == "same" or (rule == "gray" and data is None):
                return composition, notes
        negative = None
        if data is not None and (branch == "file" or rule == "gray"):
            negative = load_request_lora(data, self.base) * weight
        return replace(composition, has_negative=True, negative_lora=negative), notes

    def _load_loras(
        self, request: ImageRequest, tags: Sequence[LoraTag], worker: ModelWorker
    ) -> tuple[list[LoraWeights], list[LoraMetadata]]:
        """Load the files that were sent, then those that the prompt names."""
        remaining_parameters, loras = MAX_PARAMETERS, list[LoraWeights]()
        metadata: list[LoraMetadata] = []
        for data, _ in request.loras:
            with worker.decoder_slots:
                lora, item = load_request_file(data, self.base, remaining_parameters)
            loras.append(lora)
            metadata.append(item)
            remaining_parameters -= lora.layout.numel
        if self.lora_dir is None or not tags:
            return loras, metadata
        try:
            tagged_loras = load_tagged_loras(tags, self.lora_dir, self.base.modules)
            metadata += [read_lora_metadata(find_lora(self.lora_dir, tag.name)) for tag in tags]
        except InvalidArgumentError as error:  # callers need not know the path
            message = str(error).replace(str(self.lora_dir), "the server's folder")
            raise InvalidArgumentError(message) from error
        return [*loras, *(assign_base(lora, self.base) for lora in tagged_loras)], metadata

    def _generate_batch(
        self, sampling: ImageSampling, check_running: Callable[[], None], items: list[ImageItem]
    ) -> list[Image.Image]:
        """Denoise the images of several requests in one batch, each with its own LoRA."""
        loras = stack_optional_loras([item.lora for item in items])
        prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
        return _sample(self.base, prompts, seeds, loras, sampling, check_running)

    def _compose_batch(
        self, check_running: Callable[[], None], compositions: list[Composition]
    ) -> list[Image.Image]:
        """Generate each image of a batch of one with its own composition."""
        images = []
        for composition in compositions:
            prompt, request = composition.prompt, composition.request
            with composition.apply(self.base):
                images += _sample(
                    self.base, [prompt], [request.seed], None, request.sampling, check_running
                )
        return images


def _sample(
    base: DiffusionBase,
    prompts: list[str],
    seeds: list[int],
    loras: LoraWeights | None,
    sampling: ImageSampling,
    check_running: Callable[[], None],
) -> list[Image.Image]:
    """Generate images; end between two steps when nobody waits for them."""
    return generate_images(
        base,
        prompts,
        loras,
        seeds=seeds,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        scheduler=sampling.scheduler,
        width=sampling.width,
        height=sampling.height,
        on_step=lambda step: check_running(),
    )
