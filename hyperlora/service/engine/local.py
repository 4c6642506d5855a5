"""``LocalEngine``: an ``Engine`` in this process, whose models one thread owns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.errors import InvalidArgumentError
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.service.engine.callbacks import BatchCallback, ProgressFn
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.images import ImageEngine
from hyperlora.service.engine.loras import LoraEngine
from hyperlora.service.engine.model_info import (
    describe_card,
    describe_model,
    describe_source,
)
from hyperlora.service.engine.photo_models import (
    DEFAULT_MAX_LOADED,
    PhotoModels,
    PhotoModelSource,
    check_names_differ,
)
from hyperlora.service.engine.requests import (
    EditImageRequest,
    EditLoraRequest,
    EngineRequest,
    EngineResult,
    ImageRequest,
    LoraRequest,
    ModelInfo,
    SimilarityRequest,
    ValueT,
)
from hyperlora.service.engine.sheet_models import SheetEngine, SheetModelSource
from hyperlora.service.engine.similarity import compute_similarity
from hyperlora.service.engine.worker import ModelWorker
from hyperlora.service.settings import EngineLimits

PAIR_MODEL_NAME: Final = "pair-to-lora"
"""Name and kind of the model from pairs in the API."""


class LocalEngine:
    """Models from photos and pairs with their bases, in this process.

    Args:
        model: The model from photos that serves requests that name none.
        base: The base of the models from photos; it also generates images. Networks that others
            released may be for another one.
        lora_dir: Folder of LoRA files that prompts may name; None for none.
        limits: Sizes of the queue and of batches.
        on_batch: Called on the model thread with the kind and size of every batch.
        edit_engine: Serves before/after pairs; None refuses them.
        identity_similarity: Serves identity similarity; None refuses it.
        extra_models: Further models from photos.
        max_loaded_models: Networks that others released and that are loaded at a time.
        sheet_models: Networks that make the LoRA of an edit for one image.

    Raises:
        InvalidArgumentError: If two models have one name.
        LayoutMismatchError: If a model is for another base.
    """

    def __init__(
        self,
        model: AnyPhotoModel | PhotoModelSource,
        base: DiffusionBase,
        lora_dir: Path | None = None,
        *,
        limits: EngineLimits | None = None,
        on_batch: BatchCallback | None = None,
        edit_engine: EditEngine | None = None,
        identity_similarity: IdentitySimilarity | None = None,
        extra_models: Sequence[AnyPhotoModel | PhotoModelSource] = (),
        max_loaded_models: int = DEFAULT_MAX_LOADED,
        sheet_models: Sequence[SheetModelSource] = (),
    ) -> None:
        limits = limits or EngineLimits()
        sources = [
            entry if isinstance(entry, PhotoModelSource) else PhotoModelSource.from_model(entry)
            for entry in (model, *extra_models)
        ]
        photo_models = PhotoModels(sources, max_loaded_models)
        check_names_differ([*sources, *sheet_models])
        self.sheet_engine = SheetEngine(sheet_models) if sheet_models else None
        self.lora_engine = LoraEngine(photo_models, base, limits.max_lora_batch)
        self.image_engine = ImageEngine(base, lora_dir, limits)
        self.edit_engine, self.identity_similarity = edit_engine, identity_similarity
        self._worker = ModelWorker(limits, on_batch)

    @property
    def is_ready(self) -> bool:
        """Whether the model thread takes requests."""
        return self._worker.is_alive

    @property
    def queue_length(self) -> int:
        """Number of requests that wait for the model thread."""
        return self._worker.queue_length

    def close(self, timeout_s: float) -> None:
        """Finish what waits and stop; after ``timeout_s`` seconds refuse the rest."""
        self._worker.close(timeout_s)
        self.lora_engine.close()
        if self.sheet_engine is not None:
            self.sheet_engine.close()

    def list_models(self) -> list[ModelInfo]:
        """List the models from photos, the default one first, then the model from pairs."""
        supports_similarity = self.identity_similarity is not None
        base, models = self.lora_engine.base, self.lora_engine.models
        max_pixel_steps = self.image_engine.budget.max_pixel_steps
        model_infos = [
            replace(
                describe_source(source, models, base, supports_similarity),
                max_pixel_steps=max_pixel_steps,
            )
            for source in models.sources.values()
        ]
        if (edits := self.edit_engine) is not None:
            info = describe_model(PAIR_MODEL_NAME, edits.model, edits.base)
            model_infos.append(replace(info, max_pixel_steps=edits.budget.max_pixel_steps))
        if (sheets := self.sheet_engine) is not None:
            for source in sheets.sources.values():
                model = sheets.find_in_memory(source)
                layout = model.layout if model else None
                is_loaded = model is not None
                model_infos.append(
                    describe_card(source.name, source.facts, layout, base, is_loaded=is_loaded)
                )
        return model_infos

    async def run(
        self,
        request: EngineRequest[ValueT],
        timeout_s: float,
        on_progress: ProgressFn | None = None,
        *,
        owner: str = "",
    ) -> EngineResult[ValueT]:
        """Run a request; see ``Engine.run``.

        Args:
            request: A request of any class.
            timeout_s: Seconds that each stage of the work may take, with its time in the queue.
            on_progress: Receives the fraction of a refinement that is done.
            owner: Who takes turns with others.

        Returns:
            The result.

        Raises:
            InvalidArgumentError: If the engine has no model for the request.
        """
        worker = self._worker.for_owner(owner)
        result = await self._dispatch(request, worker, timeout_s, on_progress)
        return cast("EngineResult[ValueT]", result)  # as the class of the request says

    async def _dispatch(
        self,
        request: EngineRequest[ValueT],
        worker: ModelWorker,
        timeout_s: float,
        on_progress: ProgressFn | None,
    ) -> EngineResult[bytes] | EngineResult[Image.Image] | EngineResult[list[float]]:
        """Choose the part of the engine by the class of the request."""
        match request:
            case LoraRequest():
                return await self.lora_engine.create_lora(request, worker, timeout_s, on_progress)
            case EditLoraRequest() if self._is_for_sheet(request):
                assert self.sheet_engine is not None
                return await self.sheet_engine.create_lora(request, worker, timeout_s)
            case EditLoraRequest():
                return await self._get_edit_engine().create_lora(request, worker, timeout_s)
            case ImageRequest():
                return await self.image_engine.generate_image(request, worker, timeout_s)
            case EditImageRequest():
                return await self._get_edit_engine().edit_image(request, worker, timeout_s)
            case SimilarityRequest():
                evaluator = self._get_identity_similarity()
                return await compute_similarity(evaluator, request, worker, timeout_s)
        raise TypeError(f"no engine runs a {type(request).__name__}")

    def _is_for_sheet(self, request: EditLoraRequest) -> bool:
        """Whether a network for one image makes the LoRA of a pair; checks the request's name."""
        if self.sheet_engine is not None and (request.model or self.edit_engine is None):
            return request.model != PAIR_MODEL_NAME or self.edit_engine is None
        if request.model not in (None, PAIR_MODEL_NAME):
            raise InvalidArgumentError(
                f"this server has no model for pairs called {request.model!r}: leave model out, "
                "or start it with --model NAME=hilamanor/lorweb"
            )
        if request.image is not None or request.rank is not None:
            raise InvalidArgumentError(
                "image and rank are for a model that makes the LoRA of a pair for one image: "
                "name it in model, or leave them out"
            )
        return False

    def _get_identity_similarity(self) -> IdentitySimilarity:
        if self.identity_similarity is None:
            raise InvalidArgumentError(
                "this server has no evaluator for images of its model: start it with --evaluator"
            )
        return self.identity_similarity

    def _get_edit_engine(self) -> EditEngine:
        if self.edit_engine is None:
            raise InvalidArgumentError(
                "this server has no model for before/after pairs: send photos of a subject"
            )
        return self.edit_engine
