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
from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_prompt_syntax import (
    compute_tag_scales,
    load_tagged_loras,
    parse_lora_tags,
)
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import serialize_lora
from hyperlora.lora.merge import merge, pad_and_stack
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.auto import get_method_name
from hyperlora.pipelines.generate import (
    GenerationConfig,
    SubjectPhotos,
    encode_subjects,
    make_metadata,
    postprocess_loras,
    predict_loras,
    validate_config,
)
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase, SamplingConfig
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.service.engine.base import ProgressFn
from hyperlora.service.engine.batcher import BatchSpec, DeadlineExceededError, DynamicBatcher
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.requests import (
    EditImageRequest,
    EditLoraRequest,
    EngineResult,
    ImageRequest,
    LoraRequest,
    ModelInfo,
    SimilarityRequest,
    describe_model,
)
from hyperlora.service.engine.similarity import compute_similarity

MAX_DECODERS: Final = 2
"""Photos and LoRA files that are unfolded at a time."""
BATCH_TIMEOUT_S: Final = 0.03
"""Seconds between pictures that are still drawn together: little beside drawing one."""
_MODEL_KINDS: Final = {"hyperdreambooth": "image-to-lora"}
"""What the API calls models from photos, where not by their method."""
MAX_PARAMETERS: Final = 1 << 26
"""Of all LoRAs sent with one request: 256 MiB once unfolded."""


class LocalEngine:
    """A model from photos and its base in this process, and what makes ``edit_engine`` and compares portraits
    (``evaluate_identity``) if it is there. ``extra_models`` are models from photos of other methods. ``lora_dir`` is the folder that
    prompts may name files of."""

    def __init__(
        self,
        model: ImageToLoraBase,
        base: DiffusionBase,
        lora_dir: Path | None = None,
        *,
        max_queue_size: int = 256,
        max_lora_batch: int = 32,
        max_image_batch: int = 8,
        on_batch: Callable[[str, int], None] | None = None,
        edit_engine: EditEngine | None = None,
        identity_similarity: IdentitySimilarity | None = None,
        extra_models: Sequence[ImageToLoraBase] = (),
    ) -> None:
        self.models_by_method: dict[str, ImageToLoraBase] = {}
        for photo_model in (model, *extra_models):
            photo_model.layout.check_base(base.id)
            if (
                self.models_by_method.setdefault(get_method_name(photo_model), photo_model)
                is not photo_model
            ):
                raise InvalidArgumentError(
                    f"a server holds one model of a method, two of {get_method_name(photo_model)} were given"
                )
        self.model, self.base, self.lora_dir = model, base, lora_dir
        self.max_lora_batch, self.max_image_batch, self.edit_engine, self.identity_similarity = (
            max_lora_batch,
            max_image_batch,
            edit_engine,
            identity_similarity,
        )

        def report_batch(key: Hashable, size: int) -> None:
            if on_batch is not None and isinstance(key, tuple):
                on_batch(str(key[0]), size)

        self._batcher = DynamicBatcher(max_queue_size, report_batch)
        self._decoder_slots = threading.Semaphore(MAX_DECODERS)

    @property
    def is_ready(self) -> bool:
        return self._batcher.is_alive

    @property
    def queue_length(self) -> int:
        return self._batcher.queue_length

    def close(self, timeout_s: float) -> None:
        self._batcher.close(timeout_s)

    def list_models(self) -> list[ModelInfo]:
        supports_similarity = self.identity_similarity is not None
        model_infos = [
            describe_model(_MODEL_KINDS.get(k, k), m, self.base, supports_similarity)
            for k, m in self.models_by_method.items()
        ]
        return (
            [
                *model_infos,
                describe_model("pair-to-lora", self.edit_engine.model, self.edit_engine.base),
            ]
            if self.edit_engine
            else model_infos
        )

    async def create_lora(
        self, request: LoraRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult:
        config, model = request.config, self._get_model(request.method)
        validate_config(model, config)
        photos = await asyncio.to_thread(self._decode_photos, request, model)
        predict_batch = partial(self._predict_batch, model, config.sampling)
        spec = BatchSpec(
            ("lora", len(request.photos), request.method, config.sampling),
            predict_batch,
            self.max_lora_batch,
        )
        weights, warnings = await self._submit(spec, photos, timeout_s)
        if config.refine_steps:
            weights = await self._refine_lora(
                model, config, weights, photos, timeout_s, on_progress
            )
        return EngineResult(
            await asyncio.to_thread(self._serialize_lora, weights, request, model), warnings
        )

    async def compute_similarity(self, request: SimilarityRequest, timeout_s: float) -> list[float]:
        if self.identity_similarity is None:
            raise InvalidArgumentError(
                "this server has no evaluator for what its model draws: start it with --evaluator"
            )
        return await compute_similarity(
            self.identity_similarity, request, timeout_s, self._submit, self._decoder_slots
        )

    async def generate_image(self, request: ImageRequest, timeout_s: float) -> Image.Image:
        prompt, lora_tags = parse_lora_tags(request.prompt)
        if lora_tags and self.lora_dir is None:
            raise InvalidArgumentError(
                "this server has no folder of LoRAs to name: send the file, or the id of a kept LoRA"
            )
        loras = await asyncio.to_thread(self._load_loras, request, lora_tags)
        lora_weights = [weight for _, weight in request.loras] + [1.0] * len(lora_tags)
        is_constant = all(lora_tag.is_constant for lora_tag in lora_tags)
        if request.gamma is not None and (request.strategy != "merge" or not is_constant):
            raise InvalidArgumentError(
                "gamma guides the sum of all LoRAs: use it with the strategy merge and without steps"
            )
        sampling_key = (
            request.num_inference_steps,
            request.guidance_scale,
            request.negative_prompt,
            request.width,
            request.height,
        )
        if request.strategy == "merge" and request.gamma is None and is_constant:
            lora = await asyncio.to_thread(merge, loras, lora_weights) if loras else None
            generate_batch = partial(self._generate_batch, replace(request, loras=()))
            spec = BatchSpec(
                ("picture", *sampling_key),
                generate_batch,
                self.max_image_batch,
                batch_timeout_s=BATCH_TIMEOUT_S,
            )
            return await self._submit(spec, (prompt, request.seed, lora), timeout_s)
        schedule = (
            None
            if is_constant
            else partial(compute_tag_scales, lora_tags, num_constant=len(request.loras))
        )
        spec = BatchSpec(("composed", object()), partial(self._compose_images, request, schedule))
        return await self._submit(spec, (prompt, loras, lora_weights), timeout_s)

    async def create_edit_lora(self, request: EditLoraRequest, timeout_s: float) -> EngineResult:
        return await self._get_edit_engine().create_lora(
            request, timeout_s, self._submit, self._decoder_slots
        )

    async def edit_image(self, request: EditImageRequest, timeout_s: float) -> EngineResult:
        return await self._get_edit_engine().edit_image(
            request, timeout_s, self._submit, self._decoder_slots, MAX_PARAMETERS
        )

    def _get_model(self, method: str | None) -> ImageToLoraBase:
        if method is None:
            return self.model
        if method not in self.models_by_method:
            raise InvalidArgumentError(
                f"this server has no model of the method {method}: it has {', '.join(self.models_by_method)}"
            )
        return self.models_by_method[method]

    def _get_edit_engine(self) -> EditEngine:
        if self.edit_engine is None:
            raise InvalidArgumentError(
                "this server has no model for before/after pairs: send photos of a subject"
            )
        return self.edit_engine

    async def _submit(self, spec: BatchSpec, payload: Any, timeout_s: float) -> Any:
        return await asyncio.wrap_future(self._batcher.submit(spec, payload, timeout_s))

    async def _refine_lora(
        self,
        model: ImageToLoraBase,
        config: GenerationConfig,
        weights: LoraWeights,
        photos: SubjectPhotos,
        timeout_s: float,
        on_progress: ProgressFn | None,
    ) -> LoraWeights:
        stop = threading.Event()

        def report_step(step: int) -> None:
            if stop.is_set():
                raise DeadlineExceededError("nobody waits for this LoRA any more")
            if on_progress is not None:
                on_progress((step - 1) / config.refine_steps)

        def refine_batch(items: list[tuple[LoraWeights, SubjectPhotos]]) -> list[LoraWeights]:
            return [self._refine_one(model, config, *item, report_step) for item in items]

        try:
            spec = BatchSpec(("refine", object()), refine_batch, low_priority=True)
            refined: LoraWeights = await self._submit(spec, (weights, photos), timeout_s)
            return refined
        except asyncio.CancelledError:
            stop.set()
            raise

    def _decode_photos(self, request: LoraRequest, model: ImageToLoraBase) -> SubjectPhotos:
        """One photo at a time at full size, and ``MAX_DECODERS`` of all requests together."""
        base = self.base if request.config.refine_steps else None
        subject_photos = []
        for photo in request.photos:
            with self._decoder_slots:
                subject_photos.append(SubjectPhotos.from_images([read_image(photo)], model, base))
        return SubjectPhotos.cat(subject_photos)

    def _predict_batch(
        self, model: ImageToLoraBase, sampling: SamplingConfig, subjects: list[SubjectPhotos]
    ) -> list[tuple[LoraWeights, tuple[str, ...]]]:
        features = encode_subjects(model, subjects)
        weights: Any = predict_loras(model, features, sampling)
        return list(
            zip(
                weights,
                check_photos(model.ood_detector, model.get_image_features(features)),
                strict=True,
            )
        )

    def _refine_one(
        self,
        model: ImageToLoraBase,
        config: GenerationConfig,
        weights: LoraWeights,
        photos: SubjectPhotos,
        on_step: Callable[[int], None],
    ) -> LoraWeights:
        return postprocess_loras(
            model, LoraWeights.stack([weights]), [photos], config, self.base, on_step
        )[0]

    def _serialize_lora(
        self, weights: LoraWeights, request: LoraRequest, model: ImageToLoraBase
    ) -> bytes:
        if not request.config.refine_steps:
            weights = postprocess_loras(model, weights, (), request.config)
        metadata: LoraMetadata = make_metadata(model, request.title, request.photos)
        if request.consent:
            metadata = replace(metadata, extra={**metadata.extra, "hyperlora.consent": "given"})
        return serialize_lora(
            weights.apply(torch.Tensor.contiguous), format=request.config.format, metadata=metadata
        )

    def _load_loras(self, request: ImageRequest, lora_tags: Any) -> list[LoraWeights]:
        remaining_parameters, loras = MAX_PARAMETERS, []
        for file, _ in request.loras:
            with self._decoder_slots:
                loras.append(
                    load_lora(
                        file, modules=self.base.modules, max_parameters=remaining_parameters
                    ).weights
                )
            remaining_parameters -= loras[-1].layout.numel
        if self.lora_dir and lora_tags:
            try:
                loras += load_tagged_loras(lora_tags, self.lora_dir, self.base.modules)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(
                    str(error).replace(str(self.lora_dir), "the server's folder")
                ) from error
        # they fit this base, whatever name for it their files claim
        return [replace(lora, layout=replace(lora.layout, base=self.base.id)) for lora in loras]

    def _generate_batch(
        self, request: ImageRequest, items: list[tuple[str, int, LoraWeights | None]]
    ) -> list[Image.Image]:
        """Several people's pictures in one denoising batch."""
        first_lora = next((lora for _, _, lora in items if lora is not None), None)
        loras = None
        if first_lora is not None:
            loras = pad_and_stack(
                [lora if lora is not None else first_lora * 0.0 for _, _, lora in items]
            )
        return generate_images(
            self.base,
            [prompt for prompt, _, _ in items],
            loras,
            seeds=[seed for _, seed, _ in items],
            **_get_sampling_kwargs(request),
        )

    def _compose_images(
        self, request: ImageRequest, schedule: Any, items: list[Any]
    ) -> list[Image.Image]:
        ((prompt, loras, lora_weights),) = items
        if not loras:
            raise InvalidArgumentError(
                f"the strategy {request.strategy!r} needs at least one LoRA, none was given"
            )
        if request.gamma is not None:
            context = apply_autolora_guidance(
                self.base.pipeline, merge(loras, lora_weights), request.gamma
            )
        else:
            context = compose_loras(
                self.base.pipeline,
                loras,
                request.strategy,
                lora_weights,
                schedule=schedule,
                regions=request.regions,
                window=request.windowed,
            )
        with context:
            return generate_images(
                self.base, [prompt], None, seeds=[request.seed], **_get_sampling_kwargs(request)
            )


def _get_sampling_kwargs(request: ImageRequest) -> dict[str, Any]:
    return {
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
    }
