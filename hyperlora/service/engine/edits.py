"""LoRAs from before/after pairs, and pictures edited with them, by the thread that owns the models."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import read_pair
from hyperlora.data.images import read_image, to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.image_editing import apply_edit, require_editing
from hyperlora.errors import BadRequest
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import lora_bytes
from hyperlora.lora.merge import align
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import doubts
from hyperlora.pipelines.instruction_search import lora_of_pairs
from hyperlora.pipelines.pair_to_lora import PairToLora, change_header
from hyperlora.service.engine.base import Do
from hyperlora.service.engine.batcher import Work
from hyperlora.service.engine.requests import ChangeOrder, EditOrder, Noticed


class Changes:
    """A ``PairToLora`` and its base of edits; ``readers`` limits how many pictures are unfolded at a time."""

    def __init__(self, model: PairToLora, base: Base, *, batch: int = 32, pictures: int = 8) -> None:
        model.layout.require_base(base.id)
        require_editing(base)
        self.model, self.base, self.largest, self.tries = model, base, pictures, bool(model.further)
        self.batch = 1 if self.tries else batch  # words are tried for one edit at a time

    @property
    def _size(self) -> int | None:
        """Of pictures of pairs; where words are tried the base sees them too."""
        return max(self.base.resolution, self.model.encoder.image_size) if self.tries else None

    async def lora(self, order: ChangeOrder, seconds: float, do: Do, readers: threading.Semaphore) -> Noticed:
        """A ``.safetensors`` file."""
        if not order.pairs:
            raise BadRequest("no pair given: at least one picture before and one after are needed")
        seen, notices = await asyncio.to_thread(self._seen, order.pairs, readers)
        weights = await self._predicted(seen, order.strength, seconds, do)
        return Noticed(await asyncio.to_thread(self._written, weights, order), notices)

    async def picture(
        self, order: EditOrder, seconds: float, do: Do, readers: threading.Semaphore, most: int
    ) -> Noticed:
        """The edited picture; ``most`` numbers are read from a LoRA file."""
        notices: tuple[str, ...] = ()
        target = await asyncio.to_thread(self._target, order.picture, readers)
        lora: LoraWeights | None = None
        if order.pairs:
            seen, notices = await asyncio.to_thread(self._seen, order.pairs, readers)
            lora = await self._predicted(seen, order.strength, seconds, do)
        elif order.lora is not None:
            file = await asyncio.to_thread(partial(load_lora, order.lora, modules=self.base.modules, max_numbers=most))
            lora = replace(file.weights, layout=replace(file.weights.layout, base=self.base.id)) * order.strength
        elif not order.instruction:
            raise BadRequest("nothing says what to change: send before and after, a LoRA, or an instruction")
        steps = order.steps or self.model.steps
        work = Work(("edit", steps, order.repaint), partial(self._edit, steps, order.repaint), self.largest)
        made = await do(work, (target, lora, order.instruction, order.seed), seconds)
        return Noticed(made, notices)

    async def _predicted(self, seen: Tensor, strength: float, seconds: float, do: Do) -> LoraWeights:
        """Below 0 of the pairs turned round, as ``PairToLora`` does."""
        shown = seen if strength >= 0 else seen.flip(1)
        weights: LoraWeights = await do(Work(("change", len(seen)), self._predict, self.batch), shown, seconds)
        return weights * abs(strength)

    def _seen(
        self, pairs: Sequence[tuple[bytes, bytes]], readers: threading.Semaphore
    ) -> tuple[Tensor, tuple[str, ...]]:
        parts, notices = [], []
        for pair in pairs:
            with readers:
                opened = read_pair(*pair)
                parts.append(self.model.seen([opened], self._size))
                notices += doubts(*opened)
        return torch.cat(parts), tuple(notices)

    def _target(self, picture: bytes, readers: threading.Semaphore) -> Tensor:
        with readers:
            return to_tensor(read_image(picture), self.base.resolution)

    @torch.no_grad()
    def _predict(self, pairs: list[Tensor]) -> list[LoraWeights]:
        if self.tries:
            return [lora_of_pairs(self.model, self.base, shown) for shown in pairs]
        return list(self.model.forward(torch.stack(pairs)))  # type: ignore[call-overload]

    def _edit(
        self, steps: int, repaint: bool, items: list[tuple[Tensor, LoraWeights | None, str, int]]
    ) -> list[Image.Image]:
        """Several people's edits in one denoising batch."""
        pictures, found, words, seeds = zip(*items, strict=True)
        present = next((lora for lora in found if lora is not None), None)
        loras = None
        if present is not None:
            loras = align([lora if lora is not None else present * 0.0 for lora in found])
        return apply_edit(
            self.base, torch.stack(pictures), loras, seeds=seeds, instructions=list(words), steps=steps,
            keep_rest=not repaint,
        )  # fmt: skip

    def _written(self, weights: LoraWeights, order: ChangeOrder) -> bytes:
        extra = {"hyperlora.consent": "given"} if order.consent else {}
        header = change_header(self.model, order.title, order.pairs, **extra)
        return lora_bytes(weights.map(torch.Tensor.contiguous), format=order.format, header=header)
