"""``Engine``: what the routes need done. ``LocalEngine`` does it in this process, one thread owning the models."""

import asyncio
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from hyperlora.data.images import read_image
from hyperlora.diffusion.autolora_guidance import autolora
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.lora_prompt_syntax import called_for, mentions, strengths
from hyperlora.diffusion.multi_lora import composed
from hyperlora.diffusion.text_to_image import render
from hyperlora.encoders.identity_similarity import Likeness
from hyperlora.errors import BadRequest
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.save import lora_bytes
from hyperlora.lora.merge import align, merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.auto import method_name
from hyperlora.pipelines.generate import Photos, Settings, check, features_of, finished, header_of, predicted
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling
from hyperlora.pipelines.input_checks import unknown
from hyperlora.service.engine.base import Progress
from hyperlora.service.engine.batcher import Batcher, Expired, Work
from hyperlora.service.engine.edits import Changes
from hyperlora.service.engine.requests import (
    ChangeOrder,
    EditOrder,
    LikenessOrder,
    LoraOrder,
    ModelFacts,
    Noticed,
    PictureOrder,
    facts_of,
)
from hyperlora.service.engine.similarity import compared

READERS: Final = 2
"""Photos and LoRA files that are unfolded at a time."""
GATHER: Final = 0.03
"""Seconds between pictures that are still drawn together: little beside drawing one."""
_KINDS: Final = {"hyperdreambooth": "image-to-lora"}
"""What the API calls models from photos, where not by their method."""
MAX_NUMBERS: Final = 1 << 26
"""Of all LoRAs sent with one request: 256 MiB once unfolded."""


class LocalEngine:
    """A model from photos and its base in this process, and what makes ``changes`` and compares portraits
    (``likeness``) if it is there. ``others`` are models from photos of other methods. ``loras`` is the folder that
    prompts may name files of."""

    def __init__(
        self,
        model: PhotoModel,
        base: Base,
        loras: Path | None = None,
        *,
        queue: int = 256,
        batch: int = 32,
        pictures: int = 8,
        observe: Callable[[str, int], None] | None = None,
        changes: Changes | None = None,
        likeness: Likeness | None = None,
        others: Sequence[PhotoModel] = (),
    ) -> None:
        self.networks: dict[str, PhotoModel] = {}
        for network in (model, *others):
            network.layout.require_base(base.id)
            if self.networks.setdefault(method_name(network), network) is not network:
                raise BadRequest(f"a server holds one model of a method, two of {method_name(network)} were given")
        self.model, self.base, self.folder = model, base, loras
        self.batch, self.largest, self.changes, self.comparing = batch, pictures, changes, likeness

        def seen(key: Hashable, size: int) -> None:
            if observe is not None and isinstance(key, tuple):
                observe(str(key[0]), size)

        self._batcher = Batcher(queue, seen)
        self._readers = threading.Semaphore(READERS)

    @property
    def ready(self) -> bool:
        return self._batcher.alive

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def close(self, seconds: float) -> None:
        self._batcher.close(seconds)

    def models(self) -> list[ModelFacts]:
        compares = self.comparing is not None
        facts = [facts_of(_KINDS.get(k, k), m, self.base, compares) for k, m in self.networks.items()]
        return [*facts, facts_of("pair-to-lora", self.changes.model, self.changes.base)] if self.changes else facts

    async def lora(self, order: LoraOrder, seconds: float, progress: Progress | None = None) -> Noticed:
        settings, network = order.settings, self._network(order.method)
        check(network, settings)
        photos = await asyncio.to_thread(self._decoded, order, network)
        predict = partial(self._predict, network, settings.sampling)
        work = Work(("lora", len(order.photos), order.method, settings.sampling), predict, self.batch)
        weights, notices = await self._done(work, photos, seconds)
        if settings.refine:
            weights = await self._refined(network, settings, weights, photos, seconds, progress)
        return Noticed(await asyncio.to_thread(self._written, weights, order, network), notices)

    async def likeness(self, order: LikenessOrder, seconds: float) -> list[float]:
        if self.comparing is None:
            raise BadRequest("this server has no evaluator for what its model draws: start it with --evaluator")
        return await compared(self.comparing, order, seconds, self._done, self._readers)

    async def picture(self, order: PictureOrder, seconds: float) -> Image.Image:
        text, named = mentions(order.prompt)
        if named and self.folder is None:
            raise BadRequest("this server has no folder of LoRAs to name: send the file, or the id of a kept LoRA")
        files = await asyncio.to_thread(self._opened, order, named)
        weights = [weight for _, weight in order.loras] + [1.0] * len(named)
        always = all(mention.always for mention in named)
        if order.gamma is not None and (order.strategy != "merge" or not always):
            raise BadRequest("gamma guides the sum of all LoRAs: use it with the strategy merge and without steps")
        how = (order.steps, order.guidance, order.negative_prompt, order.width, order.height)
        if order.strategy == "merge" and order.gamma is None and always:
            lora = await asyncio.to_thread(merge, files, weights) if files else None
            draw = partial(self._draw, replace(order, loras=()))
            work = Work(("picture", *how), draw, self.largest, gather=GATHER)
            return await self._done(work, (text, order.seed, lora), seconds)
        schedule = None if always else partial(strengths, named, always=len(order.loras))
        work = Work(("composed", object()), partial(self._compose, order, schedule))
        return await self._done(work, (text, files, weights), seconds)

    async def change(self, order: ChangeOrder, seconds: float) -> Noticed:
        return await self._changes().lora(order, seconds, self._done, self._readers)

    async def edited(self, order: EditOrder, seconds: float) -> Noticed:
        return await self._changes().picture(order, seconds, self._done, self._readers, MAX_NUMBERS)

    def _network(self, method: str | None) -> PhotoModel:
        if method is None:
            return self.model
        if method not in self.networks:
            raise BadRequest(f"this server has no model of the method {method}: it has {', '.join(self.networks)}")
        return self.networks[method]

    def _changes(self) -> Changes:
        if self.changes is None:
            raise BadRequest("this server has no model for before/after pairs: send photos of a subject")
        return self.changes

    async def _done(self, work: Work, payload: Any, seconds: float) -> Any:
        return await asyncio.wrap_future(self._batcher.submit(work, payload, seconds))

    async def _refined(
        self, network: PhotoModel, settings: Settings, weights: LoraWeights, photos: Photos, seconds: float,
        progress: Progress | None,
    ) -> LoraWeights:  # fmt: skip
        stop = threading.Event()

        def watch(step: int) -> None:
            if stop.is_set():
                raise Expired("nobody waits for this LoRA any more")
            if progress is not None:
                progress((step - 1) / settings.refine)

        def run(items: list[tuple[LoraWeights, Photos]]) -> list[LoraWeights]:
            return [self._refine(network, settings, *item, watch) for item in items]

        try:
            work = Work(("refine", object()), run, patient=True)
            refined: LoraWeights = await self._done(work, (weights, photos), seconds)
            return refined
        except asyncio.CancelledError:
            stop.set()
            raise

    def _decoded(self, order: LoraOrder, network: PhotoModel) -> Photos:
        """One photo at a time at full size, and ``READERS`` of all requests together."""
        base = self.base if order.settings.refine else None
        parts = []
        for photo in order.photos:
            with self._readers:
                parts.append(Photos.of([read_image(photo)], network, base))
        return Photos.joined(parts)

    def _predict(
        self, network: PhotoModel, sampling: Sampling, subjects: list[Photos]
    ) -> list[tuple[LoraWeights, tuple[str, ...]]]:
        features = features_of(network, subjects)
        weights: Any = predicted(network, features, sampling)
        return list(zip(weights, unknown(network.domain, network.image_features(features)), strict=True))

    def _refine(
        self, network: PhotoModel, settings: Settings, weights: LoraWeights, photos: Photos,
        watch: Callable[[int], None],
    ) -> LoraWeights:  # fmt: skip
        return finished(network, LoraWeights.stack([weights]), [photos], settings, self.base, watch)[0]

    def _written(self, weights: LoraWeights, order: LoraOrder, network: PhotoModel) -> bytes:
        if not order.settings.refine:
            weights = finished(network, weights, (), order.settings)
        header: LoraHeader = header_of(network, order.title, order.photos)
        if order.consent:
            header = replace(header, extra={**header.extra, "hyperlora.consent": "given"})
        return lora_bytes(weights.map(torch.Tensor.contiguous), format=order.settings.format, header=header)

    def _opened(self, order: PictureOrder, named: Any) -> list[LoraWeights]:
        left, found = MAX_NUMBERS, []
        for file, _ in order.loras:
            with self._readers:
                found.append(load_lora(file, modules=self.base.modules, max_numbers=left).weights)
            left -= found[-1].layout.numel
        if self.folder and named:
            try:
                found += called_for(named, self.folder, self.base.modules)
            except BadRequest as error:
                raise BadRequest(str(error).replace(str(self.folder), "the server's folder")) from error
        # they fit this base, whatever name for it their files claim
        return [replace(lora, layout=replace(lora.layout, base=self.base.id)) for lora in found]

    def _draw(self, order: PictureOrder, items: list[tuple[str, int, LoraWeights | None]]) -> list[Image.Image]:
        """Several people's pictures in one denoising batch."""
        present = next((lora for _, _, lora in items if lora is not None), None)
        loras = None
        if present is not None:
            loras = align([lora if lora is not None else present * 0.0 for _, _, lora in items])
        return render(
            self.base, [text for text, _, _ in items], loras, seeds=[seed for _, seed, _ in items], **_how(order)
        )  # fmt: skip

    def _compose(self, order: PictureOrder, schedule: Any, items: list[Any]) -> list[Image.Image]:
        ((text, files, weights),) = items
        if not files:
            raise BadRequest(f"the strategy {order.strategy!r} needs at least one LoRA, none was given")
        if order.gamma is not None:
            context = autolora(self.base.pipeline, merge(files, weights), order.gamma)
        else:
            context = composed(
                self.base.pipeline, files, order.strategy, weights,
                schedule=schedule, regions=order.regions, window=order.window,
            )  # fmt: skip
        with context:
            return render(self.base, [text], None, seeds=[order.seed], **_how(order))


def _how(order: PictureOrder) -> dict[str, Any]:
    return {
        "steps": order.steps, "guidance": order.guidance, "negative_prompt": order.negative_prompt,
        "width": order.width, "height": order.height,
    }  # fmt: skip
