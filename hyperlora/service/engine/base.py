"""``Engine``: what the routes need, whoever does the work."""

from collections.abc import Callable
from typing import Protocol, assert_never

from PIL import Image

from hyperlora.service.engine.callbacks import BatchCallback, ProgressFn
from hyperlora.service.engine.requests import (
    AnyRequest,
    AnyResult,
    EditImageRequest,
    EditLoraRequest,
    EngineResult,
    ImageRequest,
    LoraRequest,
    ModelInfo,
    SimilarityRequest,
)


class Engine(Protocol):
    """The models of a server behind one method per kind of request.

    Every method raises ``HyperloraError`` for input that is refused, ``QueueFullError`` if too
    many requests wait, and ``DeadlineExceededError`` after ``timeout_s`` seconds in the queue.
    ``on_progress`` receives the fraction that is done, in another thread; only refinement
    reports any. Cancelling an awaited call takes it out of the queue, or ends refinement at its
    next step.
    """

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests."""
        ...

    @property
    def queue_length(self) -> int:
        """Number of requests that wait."""
        ...

    def list_models(self) -> list[ModelInfo]:
        """List the models, the default one first."""
        ...

    async def create_lora(
        self, request: LoraRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult[bytes]:
        """Create a LoRA from photos.

        Args:
            request: Photos and settings.
            timeout_s: Seconds that each stage may wait in the queue.
            on_progress: Receives the fraction of the refinement that is done.

        Returns:
            The bytes of a ``.safetensors`` file.
        """
        ...

    async def create_edit_lora(
        self, request: EditLoraRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult[bytes]:
        """Create the LoRA of an edit.

        Args:
            request: Before/after pairs and settings.
            timeout_s: Seconds that each stage may wait in the queue.
            on_progress: Not called.

        Returns:
            The bytes of a ``.safetensors`` file.
        """
        ...

    async def generate_image(
        self, request: ImageRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult[Image.Image]:
        """Generate an image of a prompt.

        Args:
            request: Prompt, LoRAs and settings.
            timeout_s: Seconds that the request may wait in the queue.
            on_progress: Not called.

        Returns:
            The image.
        """
        ...

    async def edit_image(
        self, request: EditImageRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult[Image.Image]:
        """Edit an image.

        Args:
            request: The image, and what the edit is.
            timeout_s: Seconds that each stage may wait in the queue.
            on_progress: Not called.

        Returns:
            The edited image.
        """
        ...

    async def compute_similarity(
        self, request: SimilarityRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult[list[float]]:
        """Compute the identity similarity of images to photos.

        Args:
            request: Photos and images.
            timeout_s: Seconds that the request may wait in the queue.
            on_progress: Not called.

        Returns:
            One score per image: 0 for anyone, 1 for another photo of the subject.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Finish what waits and stop; after ``timeout_s`` seconds cancel the rest."""
        ...


EngineFactory = Callable[[BatchCallback], Engine]
"""Starts an engine over loaded models; the engine reports its batches to the callback."""


async def run_request(
    engine: Engine,
    request: AnyRequest,
    timeout_s: float,
    on_progress: ProgressFn | None = None,
) -> AnyResult:
    """Call the method of an engine that handles this class of request.

    Args:
        engine: The engine.
        request: A request of any class.
        timeout_s: Seconds that each stage may wait in the queue.
        on_progress: Receives the fraction that is done.

    Returns:
        The result of the method.
    """
    match request:
        case LoraRequest():
            return await engine.create_lora(request, timeout_s, on_progress)
        case EditLoraRequest():
            return await engine.create_edit_lora(request, timeout_s, on_progress)
        case ImageRequest():
            return await engine.generate_image(request, timeout_s, on_progress)
        case EditImageRequest():
            return await engine.edit_image(request, timeout_s, on_progress)
        case SimilarityRequest():
            return await engine.compute_similarity(request, timeout_s, on_progress)
    assert_never(request)
