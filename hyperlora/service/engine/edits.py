"""LoRAs from before/after pairs, and pictures edited with them, by the thread that owns the models."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import read_image_pair
from hyperlora.data.images import read_image, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import check_edit_base, edit_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import serialize_lora
from hyperlora.lora.merge import pad_and_stack
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import check_pair
from hyperlora.pipelines.instruction_search import search_pair_lora
from hyperlora.pipelines.pair_to_lora import PairToLora, make_edit_metadata
from hyperlora.service.engine.base import SubmitFn
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.requests import EditImageRequest, EditLoraRequest, EngineResult


class EditEngine:
    """A ``PairToLora`` and its base of edits; ``decoder_slots`` limits how many pictures are unfolded at a time."""

    def __init__(
        self,
        model: PairToLora,
        base: DiffusionBase,
        *,
        max_lora_batch: int = 32,
        max_image_batch: int = 8,
    ) -> None:
        model.layout.check_base(base.id)
        check_edit_base(base)
        self.model, self.base, self.max_image_batch, self.uses_search = (
            model,
            base,
            max_image_batch,
            bool(model.zero_shot_prompts),
        )
        self.max_lora_batch = (
            1 if self.uses_search else max_lora_batch
        )  # words are tried for one edit at a time

    @property
    def _pair_size(self) -> int | None:
        """Of pictures of pairs; where words are tried the base sees them too."""
        return (
            max(self.base.resolution, self.model.encoder.image_size) if self.uses_search else None
        )

    async def create_lora(
        self,
        request: EditLoraRequest,
        timeout_s: float,
        submit: SubmitFn,
        decoder_slots: threading.Semaphore,
    ) -> EngineResult:
        """A ``.safetensors`` file."""
        if not request.pairs:
            raise InvalidArgumentError(
                "no pair given: at least one picture before and one after are needed"
            )
        pair_pixels, warnings = await asyncio.to_thread(
            self._decode_pairs, request.pairs, decoder_slots
        )
        weights = await self._predict_lora(pair_pixels, request.strength, timeout_s, submit)
        return EngineResult(
            await asyncio.to_thread(self._serialize_lora, weights, request), warnings
        )

    async def edit_image(
        self,
        request: EditImageRequest,
        timeout_s: float,
        submit: SubmitFn,
        decoder_slots: threading.Semaphore,
        max_parameters: int,
    ) -> EngineResult:
        """The edited picture; ``max_parameters`` numbers are read from a LoRA file."""
        warnings: tuple[str, ...] = ()
        image = await asyncio.to_thread(self._decode_image, request.image, decoder_slots)
        lora: LoraWeights | None = None
        if request.pairs:
            pair_pixels, warnings = await asyncio.to_thread(
                self._decode_pairs, request.pairs, decoder_slots
            )
            lora = await self._predict_lora(pair_pixels, request.strength, timeout_s, submit)
        elif request.lora is not None:
            lora_file = await asyncio.to_thread(
                partial(
                    load_lora,
                    request.lora,
                    modules=self.base.modules,
                    max_parameters=max_parameters,
                )
            )
            lora = (
                replace(
                    lora_file.weights, layout=replace(lora_file.weights.layout, base=self.base.id)
                )
                * request.strength
            )
        elif not request.instruction:
            raise InvalidArgumentError(
                "nothing says what to change: send before and after, a LoRA, or an instruction"
            )
        num_inference_steps = request.num_inference_steps or self.model.num_inference_steps
        spec = BatchSpec(
            ("edit", num_inference_steps, request.repaint),
            partial(self._edit_batch, num_inference_steps, request.repaint),
            self.max_image_batch,
        )
        edited_image = await submit(
            spec, (image, lora, request.instruction, request.seed), timeout_s
        )
        return EngineResult(edited_image, warnings)

    async def _predict_lora(
        self, pair_pixels: Tensor, strength: float, timeout_s: float, submit: SubmitFn
    ) -> LoraWeights:
        """Below 0 of the pairs turned round, as ``PairToLora`` does."""
        ordered_pixels = pair_pixels if strength >= 0 else pair_pixels.flip(1)
        weights: LoraWeights = await submit(
            BatchSpec(("change", len(pair_pixels)), self._predict_batch, self.max_lora_batch),
            ordered_pixels,
            timeout_s,
        )
        return weights * abs(strength)

    def _decode_pairs(
        self, pairs: Sequence[tuple[bytes, bytes]], decoder_slots: threading.Semaphore
    ) -> tuple[Tensor, tuple[str, ...]]:
        pixels, warnings = [], []
        for pair in pairs:
            with decoder_slots:
                images = read_image_pair(*pair)
                pixels.append(self.model.stack_pairs([images], self._pair_size))
                warnings += check_pair(*images)
        return torch.cat(pixels), tuple(warnings)

    def _decode_image(self, data: bytes, decoder_slots: threading.Semaphore) -> Tensor:
        with decoder_slots:
            return to_tensor(read_image(data), self.base.resolution)

    @torch.no_grad()
    def _predict_batch(self, pairs: list[Tensor]) -> list[LoraWeights]:
        if self.uses_search:
            return [search_pair_lora(self.model, self.base, pair) for pair in pairs]
        return list(self.model.forward(torch.stack(pairs)))  # type: ignore[call-overload]

    def _edit_batch(
        self,
        num_inference_steps: int,
        repaint: bool,
        items: list[tuple[Tensor, LoraWeights | None, str, int]],
    ) -> list[Image.Image]:
        """Several people's edits in one denoising batch."""
        images, item_loras, instructions, seeds = zip(*items, strict=True)
        first_lora = next((lora for lora in item_loras if lora is not None), None)
        loras = None
        if first_lora is not None:
            loras = pad_and_stack(
                [lora if lora is not None else first_lora * 0.0 for lora in item_loras]
            )
        return edit_images(
            self.base,
            torch.stack(images),
            loras,
            seeds=seeds,
            instructions=list(instructions),
            num_inference_steps=num_inference_steps,
            preserve_unedited=not repaint,
        )

    def _serialize_lora(self, weights: LoraWeights, request: EditLoraRequest) -> bytes:
        extra = {"hyperlora.consent": "given"} if request.consent else {}
        metadata = make_edit_metadata(self.model, request.title, request.pairs, **extra)
        return serialize_lora(
            weights.apply(torch.Tensor.contiguous), format=request.format, metadata=metadata
        )
