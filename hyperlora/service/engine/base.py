from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from PIL import Image

from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.requests import (
    EditImageRequest,
    EditLoraRequest,
    EngineResult,
    ImageRequest,
    LoraRequest,
    ModelInfo,
    SimilarityRequest,
)


class SubmitFn(Protocol):
    """Hands work to the thread that owns the models."""

    def __call__(self, spec: BatchSpec, payload: Any, timeout_s: float) -> Awaitable[Any]: ...


ProgressFn = Callable[[float], None]


class Engine(Protocol):
    """Does the work; refuses with ``HyperloraError``, ``QueueFullError`` or ``DeadlineExceededError``. Cancelling an awaited call takes
    it out of the queue, and ends refining at its next step."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def queue_length(self) -> int: ...

    def list_models(self) -> list[ModelInfo]: ...

    async def create_lora(
        self, request: LoraRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult:
        """A ``.safetensors`` file; ``on_progress`` is told, in another thread, which fraction of refining is done."""
        ...

    async def generate_image(self, request: ImageRequest, timeout_s: float) -> Image.Image: ...

    async def compute_similarity(self, request: SimilarityRequest, timeout_s: float) -> list[float]:
        """Of each picture to the photos: 0 is anyone, 1 another photo of the same person."""
        ...

    async def create_edit_lora(self, request: EditLoraRequest, timeout_s: float) -> EngineResult:
        """A ``.safetensors`` file of a before/after pair's change."""
        ...

    async def edit_image(self, request: EditImageRequest, timeout_s: float) -> EngineResult:
        """A picture with a change made on it."""
        ...

    def close(self, timeout_s: float) -> None:
        """Finish what waits; after ``timeout_s``, leave it."""
        ...
