"""``LoraEngine``: LoRAs from photos, by the thread that owns the models."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.io.formats import list_readers, resolve_format
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import GenerationConfig, LoraSampling
from hyperlora.pipelines.generate import (
    postprocess_loras,
    predict_loras,
    validate_config,
)
from hyperlora.pipelines.lora_files import LoraFiles, serialize_lora_files
from hyperlora.pipelines.photo_model import AnyPhotoModel, SubjectPhotos
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.lora_files import (
    list_format_warnings,
    make_consent_metadata,
)
from hyperlora.service.engine.model_info import matches_base
from hyperlora.service.engine.photo_models import PhotoModels, PhotoModelSource
from hyperlora.service.engine.requests import EngineResult, LoraFacts, LoraRequest
from hyperlora.service.engine.stepped_call import SteppedCall
from hyperlora.service.engine.worker import ModelWorker


@dataclass(frozen=True)
class PredictedLora:
    """The LoRA of one forward pass, and what may be wrong with its photos.

    Attributes:
        weights: The LoRA, on the CPU.
        warnings: One sentence per doubt.
        negative: The LoRA of the negative branch of guidance; None for none.
    """

    weights: LoraWeights
    warnings: tuple[str, ...]
    negative: LoraWeights | None = None


@dataclass(frozen=True)
class RefinementTask:
    """One LoRA to refine on the model thread, step by step.

    Attributes:
        model: The model that predicted the LoRA.
        base: The base that refinement runs.
        config: How the LoRA is refined.
        weights: The predicted LoRA (no batch axis).
        photos: The decoded photos of the subject.
        check_running: Raises if nobody waits for the LoRA any more.
        on_progress: Receives the fraction of the steps that is done.
    """

    model: AnyPhotoModel
    base: DiffusionBase
    config: GenerationConfig
    weights: LoraWeights
    photos: SubjectPhotos
    check_running: Callable[[], None]
    on_progress: ProgressFn | None

    def advance(self) -> LoraWeights | object:
        """Refine up to the next step.

        Returns:
            ``UNFINISHED``, or at the end the refined, resized and scaled LoRA.
        """
        return self._call.advance()

    @cached_property
    def _call(self) -> SteppedCall[LoraWeights]:
        return SteppedCall(self._refine, self.base.device)

    def _refine(self) -> LoraWeights:
        batch = LoraWeights.stack([self.weights])
        refined = postprocess_loras(
            self.model, batch, [self.photos], self.config, self.base, self._pause
        )
        return refined[0].to("cpu")

    def _pause(self, step: int) -> None:
        """Let others use the thread before a step; no LoRA is injected into the base then."""
        if self.on_progress is not None:
            self.on_progress(max(0, step - 1) / self.config.refine_steps)
        self._call.pause()
        self.check_running()


class LoraEngine:
    """Models from photos, and the base that refinement runs.

    Args:
        models: The models; the first serves requests that name none.
        base: The base of the first model, if it is one of hyperlora; LoRAs of others may be for
            another base, with which this server does not draw.
        max_batch_size: LoRAs that are predicted in one forward pass.

    Raises:
        LayoutMismatchError: If the first model is one of hyperlora for another base.
    """

    def __init__(self, models: PhotoModels, base: DiffusionBase, max_batch_size: int) -> None:
        self.models, self.base, self.max_batch_size = models, base, max_batch_size
        self._loader = ThreadPoolExecutor(1, "hyperlora-loader")
        # one: several of them would only wait for each other's interpreter lock
        self._serializer = ThreadPoolExecutor(1, "hyperlora-serializer")
        if (first := models.find()).facts is None:
            first.load().check_base(base)

    async def create_lora(
        self,
        request: LoraRequest,
        worker: ModelWorker,
        timeout_s: float,
        on_progress: ProgressFn | None,
    ) -> EngineResult[bytes]:
        """Create a LoRA from photos.

        Args:
            request: Photos and settings.
            worker: Runs the model and the decoders.
            timeout_s: Seconds that each stage may wait in the queue.
            on_progress: Receives the fraction of the refinement that is done.

        Returns:
            The bytes of a ``.safetensors`` file.

        Raises:
            LayoutMismatchError: If the LoRA has to be refined and its base is not here.
        """
        source, config = self.models.find(request.model, request.method), request.config
        model = await self._load(source)
        check_config: Callable[[], None] = partial(self._check_config, source, model, config)
        if model.runs_in_own_process:  # a template may run for its ranks
            check_spec = BatchSpec[Callable[[], None], None](
                "check", _run_checks, in_own_process=True
            )
            await worker.run_in_batch(check_spec, check_config, timeout_s)
        else:
            await asyncio.to_thread(check_config)
        base = self.base if config.refine_steps else None
        decoded = await worker.prepare_each(
            request.photos, lambda image: SubjectPhotos.from_images([image], model, base)
        )
        photos = SubjectPhotos.cat(decoded)
        predict_spec = BatchSpec(
            "lora",
            partial(_predict_batch, model, config.sampling),
            key=(len(request.photos), source.name, config.sampling),
            max_batch_size=self.max_batch_size if source.facts is None else 1,
            in_own_process=model.runs_in_own_process,
        )
        predicted = await worker.run_in_batch(predict_spec, photos, timeout_s)
        weights = predicted.weights
        if config.refine_steps:
            task = RefinementTask(
                model, self.base, config, weights, photos, worker.check_running, on_progress
            )
            refine_spec = BatchSpec[RefinementTask, LoraWeights](
                "refine", _refine_batch, low_priority=True
            )
            weights = await worker.run_in_batch(refine_spec, task, timeout_s)
        files = await asyncio.get_running_loop().run_in_executor(
            self._serializer, _serialize_lora, model, weights, predicted.negative, request
        )
        layout, architecture = weights.layout, model.card.architecture
        format_warnings = list_format_warnings(layout, config.format, architecture)
        file_format = resolve_format(config.format, layout, architecture)
        readers = list_readers(layout, file_format, architecture)
        return EngineResult(
            files.data,
            (*predicted.warnings, *format_warnings),
            source.facts.list_notes() if source.facts else (),
            LoraFacts(file_format, readers, files.negative),
        )

    def close(self) -> None:
        """Load no further network, and serialize no further LoRA."""
        for executor in (self._loader, self._serializer):
            executor.shutdown(wait=False, cancel_futures=True)

    async def _load(self, source: PhotoModelSource) -> AnyPhotoModel:
        """Load a model; a network that is fetched keeps no thread from other requests."""
        if source.facts is None:
            return source.load()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, self.models.load, source)

    def _check_config(
        self, source: PhotoModelSource, model: AnyPhotoModel, config: GenerationConfig
    ) -> None:
        """Check settings before photos are decoded."""
        validate_config(model, config)
        if not config.refine_steps:
            return
        if source.facts is not None and not matches_base(source.facts, self.base):
            raise LayoutMismatchError(
                f"this server does not hold {source.facts.base}, the base of {source.name!r}: "
                "leave refine_steps out"
            )
        model.check_base(self.base)


def _run_checks(checks: Sequence[Callable[[], None]]) -> Sequence[None]:
    """Call the functions of one batch."""
    for check in checks:
        check()
    return [None] * len(checks)


def _predict_batch(
    model: AnyPhotoModel, sampling: LoraSampling, subjects: list[SubjectPhotos]
) -> list[PredictedLora]:
    """Predict the LoRAs of several subjects, on the CPU, in one forward pass."""
    features = model.encode_subjects(subjects)
    weights = predict_loras(model, features, sampling).to("cpu")
    negatives, warnings = model.generate_negative(features), model.list_warnings(features)
    return [
        PredictedLora(weights[i], subject, None if negatives is None else negatives[i].to("cpu"))
        for i, subject in enumerate(warnings)
    ]


def _refine_batch(tasks: list[RefinementTask]) -> list[LoraWeights]:
    """Advance each refinement by a step; the batcher calls again for what is unfinished."""
    return [cast(LoraWeights, task.advance()) for task in tasks]


def _serialize_lora(
    model: AnyPhotoModel,
    weights: LoraWeights,
    negative: LoraWeights | None,
    request: LoraRequest,
) -> LoraFiles:
    config = request.config.drop_refinement()
    if not request.config.refine_steps:
        weights = postprocess_loras(model, weights, (), config)
    if negative is not None:
        negative = postprocess_loras(model, negative, (), config)
    extra = make_consent_metadata(request.consent)
    names = (request.title, request.title)
    return serialize_lora_files(
        model, weights, negative, request.photos, names, config.format, **extra
    )
