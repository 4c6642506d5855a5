"""``EditEngine``: LoRAs from before/after pairs, and edited images, by the model thread."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import check_pair_sizes
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import check_edit_base, edit_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import check_pair
from hyperlora.pipelines.instruction_search import InstructionSearch
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.lora_files import (
    list_format_warnings,
    load_request_lora,
    make_consent_metadata,
    serialize_result,
    stack_optional_loras,
)
from hyperlora.service.engine.pixel_budget import PixelBudget
from hyperlora.service.engine.requests import EditImageRequest, EditLoraRequest, EngineResult
from hyperlora.service.engine.worker import ModelWorker
from hyperlora.service.settings import EngineLimits


@dataclass(frozen=True)
class DecodedPairs:
    """Decoded before/after pairs of one edit.

    Attributes:
        pixels: [pairs, 2, 3, size, size] in [0, 1]; before, then after.
        warnings: What may be wrong with the pairs, one sentence each.
    """

    pixels: Tensor
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditSampling:
    """Settings that all edited images of one batch share."""

    num_inference_steps: int
    preserve_unedited: bool


@dataclass(frozen=True)
class EditItem:
    """One image of a batch: ``image`` [3, resolution, resolution] in [0, 1]."""

    image: Tensor
    lora: LoraWeights | None
    instruction: str
    seed: int


class EditEngine:
    """A model from pairs and its InstructPix2Pix base.

    A model with zero-shot prompts searches an instruction for every pair with its base. It then
    predicts one LoRA at a time.

    Args:
        model: The model from pairs.
        base: The base that its LoRAs are for.
        limits: Batch sizes.

    Raises:
        InvalidArgumentError: If the base is no InstructPix2Pix pipeline.
        LayoutMismatchError: If the model is for another base.
    """

    def __init__(
        self, model: PairToLora, base: DiffusionBase, limits: EngineLimits | None = None
    ) -> None:
        model.layout.check_base(base.id)
        check_edit_base(base)
        limits = limits or EngineLimits()
        self.model, self.base = model, base
        self.search = InstructionSearch(base) if model.zero_shot_prompts else None
        self.max_lora_batch = 1 if self.search else limits.max_lora_batch
        self.budget = PixelBudget(base, limits, model.num_inference_steps)

    async def create_lora(
        self, request: EditLoraRequest, worker: ModelWorker, timeout_s: float
    ) -> EngineResult[bytes]:
        """Create the LoRA of an edit.

        Args:
            request: Before/after pairs and settings.
            worker: Runs the model and the decoders.
            timeout_s: Seconds that the request may wait in the queue.

        Returns:
            The bytes of a ``.safetensors`` file.

        Raises:
            InvalidArgumentError: If there is no pair.
        """
        if not request.pairs:
            raise InvalidArgumentError(
                "no pair given: at least one image before and one after are needed"
            )
        pairs = await self._decode_pairs(request.pairs, worker)
        weights = await self._predict_lora(pairs, request.strength, worker, timeout_s)
        data = await asyncio.to_thread(self._serialize_lora, weights, request)
        architecture = self.base.family.architecture
        format_warnings = list_format_warnings(weights.layout, request.format, architecture)
        return EngineResult(data, (*pairs.warnings, *format_warnings))

    async def edit_image(
        self, request: EditImageRequest, worker: ModelWorker, timeout_s: float
    ) -> EngineResult[Image.Image]:
        """Edit an image as pairs show, by a LoRA file, or by an instruction.

        Args:
            request: The image, and what the edit is.
            worker: Runs the model, its base and the decoders.
            timeout_s: Seconds that each stage may wait in the queue.

        Returns:
            The edited image.

        Raises:
            InvalidArgumentError: If nothing says what to edit, or the image costs too much.
        """
        num_passes = 2 if request.preserve_unedited else 1
        self.budget.check_request(request.num_inference_steps, num_passes=num_passes)
        (image,) = await worker.prepare_each([request.image], self._prepare_image)
        lora: LoraWeights | None = None
        warnings: tuple[str, ...] = ()
        if request.pairs:
            pairs = await self._decode_pairs(request.pairs, worker)
            lora = await self._predict_lora(pairs, request.strength, worker, timeout_s)
            warnings = pairs.warnings
        elif request.lora is not None:
            lora = await asyncio.to_thread(load_request_lora, request.lora, self.base)
            lora = lora * request.strength
        elif not request.instruction:
            raise InvalidArgumentError(
                "nothing says what to change: send before and after, a LoRA, or an instruction"
            )
        num_inference_steps = request.num_inference_steps or self.model.num_inference_steps
        sampling = EditSampling(num_inference_steps, request.preserve_unedited)
        spec = BatchSpec(
            "edit",
            partial(self._edit_batch, sampling, worker.check_running),
            key=sampling,
            max_batch_size=self.budget.compute_batch_size(),
        )
        item = EditItem(image, lora, request.instruction, request.seed)
        return EngineResult(await worker.run_in_batch(spec, item, timeout_s), warnings)

    async def _decode_pairs(
        self, pairs: Sequence[tuple[bytes, bytes]], worker: ModelWorker
    ) -> DecodedPairs:
        decoded = [await worker.decode_images(pair, self._prepare_pair) for pair in pairs]
        return DecodedPairs(
            torch.cat([pair.pixels for pair in decoded]),
            tuple(warning for pair in decoded for warning in pair.warnings),
        )

    def _prepare_pair(self, pair: Sequence[Image.Image]) -> DecodedPairs:
        before, after = pair
        check_pair_sizes(before, after)
        pixels = self.model.stack_pairs([(before, after)], self.model.get_pair_size(self.search))
        return DecodedPairs(pixels, tuple(check_pair(before, after)))

    def _prepare_image(self, image: Image.Image) -> Tensor:
        return to_tensor(image, self.base.resolution)  # [3, resolution, resolution]

    async def _predict_lora(
        self, pairs: DecodedPairs, strength: float, worker: ModelWorker, timeout_s: float
    ) -> LoraWeights:
        """Predict one LoRA; a negative strength swaps before and after, as ``PairToLora`` does."""
        pixels = pairs.pixels if strength >= 0 else pairs.pixels.flip(1)
        spec = BatchSpec(
            "edit-lora",
            self._predict_batch,
            key=len(pixels),
            max_batch_size=self.max_lora_batch,
        )
        return await worker.run_in_batch(spec, pixels, timeout_s) * abs(strength)

    @torch.no_grad()
    def _predict_batch(self, pairs: list[Tensor]) -> list[LoraWeights]:
        """Predict one LoRA, on the CPU, for each [pairs, 2, 3, size, size]."""
        loras = self.model.generate(torch.stack(pairs), self.search).to("cpu")
        return [loras[i] for i in range(len(pairs))]

    def _edit_batch(
        self, sampling: EditSampling, check_running: Callable[[], None], items: list[EditItem]
    ) -> list[Image.Image]:
        """Edit the images of several requests in one batch, each with its own LoRA."""
        return edit_images(
            self.base,
            torch.stack([item.image for item in items]),
            stack_optional_loras([item.lora for item in items]),
            seeds=[item.seed for item in items],
            instructions=[item.instruction for item in items],
            num_inference_steps=sampling.num_inference_steps,
            preserve_unedited=sampling.preserve_unedited,
            on_step=lambda step: check_running(),
        )

    def _serialize_lora(self, weights: LoraWeights, request: EditLoraRequest) -> bytes:
        extra = make_consent_metadata(request.consent)
        metadata = self.model.make_metadata(request.title, request.pairs, **extra)
        return serialize_result(Lora(weights, metadata), request.format)
