from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from PIL import Image

from hyperlora.service.engine.batcher import Work
from hyperlora.service.engine.requests import (
    ChangeOrder,
    EditOrder,
    LikenessOrder,
    LoraOrder,
    ModelFacts,
    Noticed,
    PictureOrder,
)


class Do(Protocol):
    """Hands work to the thread that owns the models."""

    def __call__(self, work: Work, payload: Any, seconds: float) -> Awaitable[Any]: ...


Progress = Callable[[float], None]


class Engine(Protocol):
    """Does the work; refuses with ``HyperloraError``, ``QueueFull`` or ``Expired``. Cancelling an awaited call takes
    it out of the queue, and ends refining at its next step."""

    @property
    def ready(self) -> bool: ...

    @property
    def waiting(self) -> int: ...

    def models(self) -> list[ModelFacts]: ...

    async def lora(self, order: LoraOrder, seconds: float, progress: Progress | None = None) -> Noticed:
        """A ``.safetensors`` file; ``progress`` is told, in another thread, which fraction of refining is done."""
        ...

    async def picture(self, order: PictureOrder, seconds: float) -> Image.Image: ...

    async def likeness(self, order: LikenessOrder, seconds: float) -> list[float]:
        """Of each picture to the photos: 0 is anyone, 1 another photo of the same person."""
        ...

    async def change(self, order: ChangeOrder, seconds: float) -> Noticed:
        """A ``.safetensors`` file of a before/after pair's change."""
        ...

    async def edited(self, order: EditOrder, seconds: float) -> Noticed:
        """A picture with a change made on it."""
        ...

    def close(self, seconds: float) -> None:
        """Finish what waits; after ``seconds``, leave it."""
        ...
