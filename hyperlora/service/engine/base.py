"""``Engine``: what the routes need, whoever does the work."""

from collections.abc import Callable
from typing import Protocol

from hyperlora.service.engine.callbacks import BatchCallback, ProgressFn
from hyperlora.service.engine.requests import EngineRequest, EngineResult, ModelInfo, ValueT


class Engine(Protocol):
    """The models of a server, which run requests of every class."""

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

    async def run(
        self,
        request: EngineRequest[ValueT],
        timeout_s: float,
        on_progress: ProgressFn | None = None,
        *,
        owner: str = "",
    ) -> EngineResult[ValueT]:
        """Run a request.

        Cancelling the call takes the request out of the queue, or ends it at its next step.

        Args:
            request: A request of any class.
            timeout_s: Seconds that each stage of the work may take, with its time in the queue.
            on_progress: Receives the fraction of a refinement that is done, in another thread.
            owner: Who takes turns with others.

        Returns:
            The result, of the type that the class of the request names.

        Raises:
            HyperloraError: If the input is refused.
            QueueFullError: If too many requests wait, or the server stops.
            DeadlineExceededError: If the request takes too long.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Finish what waits and stop; after ``timeout_s`` seconds refuse the rest."""
        ...


EngineFactory = Callable[[BatchCallback], Engine]
"""Starts an engine over loaded models; the engine reports its batches to the callback."""
