"""``LoraEngine``: LoRAs from photos, by the thread that owns the models."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from hyperlora.data.image_formats import UPLOAD_FORMATS
from hyperlora.data.images import read_image
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import GenerationConfig, LoraSampling
from hyperlora.pipelines.generate import (
    postprocess_loras,
    predict_loras,
    validate_config,
)
from hyperlora.pipelines.photo_model import AnyPhotoModel, SubjectPhotos
from hyperlora.service.engine.batcher import BatchSpec, DeadlineExceededError
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.lora_files import (
    list_format_warnings,
    make_consent_metadata,
    serialize_result,
)
from hyperlora.service.engine.requests import EngineResult, LoraRequest
from hyperlora.service.engine.worker import ModelWorker


@dataclass(frozen=True)
class PredictedLora:
    """The LoRA of one forward pass, and what may be wrong with its photos."""

    weights: LoraWeights
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RefinementTask:
    """One LoRA to refine on the model thread.

    Attributes:
        model: The model that predicted the LoRA.
        base: The base that refinement runs.
        config: How the LoRA is refined.
        weights: The predicted LoRA (no batch axis).
        photos: The decoded photos of the subject.
        on_progress: Receives the fraction of the steps that is done.
        cancelled: Set when the caller leaves; the next step then ends the task.
    """

    model: AnyPhotoModel
    base: DiffusionBase
    config: GenerationConfig
    weights: LoraWeights
    photos: SubjectPhotos
    on_progress: ProgressFn | None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def run(self) -> LoraWeights:
        """Refine, resize and scale the LoRA.

        Raises:
            DeadlineExceededError: If the task is cancelled.
        """
        batch = LoraWeights.stack([self.weights])
        refined = postprocess_loras(
            self.model, batch, [self.photos], self.config, self.base, self._report_step
        )
        return refined[0].to("cpu")

    def _report_step(self, step: int) -> None:
        if self.cancelled.is_set():
            raise DeadlineExceededError("nobody waits for this LoRA any more")
        if self.on_progress is not None:
            self.on_progress((step - 1) / self.config.refine_steps)


class LoraEngine:
    """Models from photos, one per method, and the base that refinement runs.

    Args:
        models: The loaded models; the first serves requests that name no method.
        base: The base that the LoRAs of all of them are for.
        max_batch_size: LoRAs that are predicted in one forward pass.

    Raises:
        InvalidArgumentError: If two models are of one method.
        LayoutMismatchError: If a model is for another base.
    """

    def __init__(
        self, models: Sequence[AnyPhotoModel], base: DiffusionBase, max_batch_size: int
    ) -> None:
        self.base, self.max_batch_size = base, max_batch_size
        self.models_by_method: dict[str, AnyPhotoModel] = {}
        for model in models:
            model.check_base(base)
            method = model.method
            if self.models_by_method.setdefault(method, model) is not model:
                raise InvalidArgumentError(
                    f"a server holds one model of a method, two of {method} were given"
                )

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
        """
        model, config = self._get_model(request.method), request.config
        validate_config(model, config)
        base = self.base if config.refine_steps else None
        decoded = await worker.decode_all(partial(_decode_photo, model, base), request.photos)
        photos = SubjectPhotos.cat(decoded)
        predict_spec = BatchSpec(
            "lora",
            partial(_predict_batch, model, config.sampling),
            key=(len(request.photos), request.method, config.sampling),
            max_batch_size=self.max_batch_size,
        )
        predicted = await worker.run_in_batch(predict_spec, photos, timeout_s)
        weights = predicted.weights
        if config.refine_steps:
            task = RefinementTask(model, self.base, config, weights, photos, on_progress)
            weights = await _refine(task, worker, timeout_s)
        data = await asyncio.to_thread(_serialize_lora, model, weights, request)
        architecture = self.base.family.architecture
        format_warnings = list_format_warnings(weights.layout, config.format, architecture)
        return EngineResult(data, (*predicted.warnings, *format_warnings))

    def _get_model(self, method: str | None) -> AnyPhotoModel:
        if method is None:
            return next(iter(self.models_by_method.values()))
        if method not in self.models_by_method:
            raise InvalidArgumentError(
                f"this server has no model of the method {method}: "
                f"it has {', '.join(self.models_by_method)}"
            )
        return self.models_by_method[method]


def _decode_photo(model: AnyPhotoModel, base: DiffusionBase | None, photo: bytes) -> SubjectPhotos:
    return SubjectPhotos.from_images([read_image(photo, UPLOAD_FORMATS)], model, base)


def _predict_batch(
    model: AnyPhotoModel, sampling: LoraSampling, subjects: list[SubjectPhotos]
) -> list[PredictedLora]:
    """Predict the LoRAs of several subjects, on the CPU, in one forward pass."""
    features = model.encode_subjects(subjects)
    weights = predict_loras(model, features, sampling).to("cpu")
    warnings = model.list_warnings(features)
    return [PredictedLora(weights[i], subject) for i, subject in enumerate(warnings)]


async def _refine(task: RefinementTask, worker: ModelWorker, timeout_s: float) -> LoraWeights:
    """Refine one LoRA with low priority; stop at the next step if the caller leaves."""
    spec = BatchSpec("refine", _refine_batch, low_priority=True)
    try:
        return await worker.run_in_batch(spec, task, timeout_s)
    except asyncio.CancelledError:
        task.cancelled.set()
        raise


def _refine_batch(tasks: list[RefinementTask]) -> list[LoraWeights]:
    return [task.run() for task in tasks]


def _serialize_lora(model: AnyPhotoModel, weights: LoraWeights, request: LoraRequest) -> bytes:
    if not request.config.refine_steps:
        weights = postprocess_loras(model, weights, (), request.config)
    extra = make_consent_metadata(request.consent)
    metadata = model.make_metadata(request.title, request.photos, **extra)
    return serialize_result(Lora(weights, metadata), request.config.format)
