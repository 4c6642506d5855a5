"""``RayEngine``: an ``Engine`` whose work replicas in other processes do.

A request whose replica dies goes to another one.

route ── RayEngine ── Serve handle ──▶ Replica (LocalEngine, its own batches)  × replicas
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.metrics import Histogram

from hyperlora.errors import HyperloraError
from hyperlora.service.engine.base import Engine, EngineFactory
from hyperlora.service.engine.batcher import DeadlineExceededError, QueueFullError
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.requests import EngineRequest, EngineResult, ModelInfo, ValueT

MAX_ATTEMPTS: Final = 3
"""Replicas that may die over one request before it is refused: it may be what kills them."""
USER_ERRORS: Final = (HyperloraError, QueueFullError, DeadlineExceededError)
"""Errors whose message is for the caller."""
_log = logging.getLogger("hyperlora.service")


@dataclass(frozen=True)
class RequestOutcome(Generic[ValueT]):
    """The end of a replica's stream: a result, or the error that refuses the request."""

    result: EngineResult[ValueT] | None = None
    error: Exception | None = None


class Replica:
    """A ``LocalEngine`` as Ray Serve runs it.

    Refusals are returned, not raised: Ray logs what is raised, and messages may quote callers.

    Args:
        load_engine: Loads the models and returns the function that starts the engine.
    """

    def __init__(self, load_engine: Callable[[], EngineFactory]) -> None:
        batch_sizes = Histogram(
            "hyperlora_batch_size",
            "Requests in one batch",
            boundaries=[1, 2, 4, 8, 16, 32],
            tag_keys=("work",),
        )
        self._engine: Engine | HyperloraError
        try:
            self._engine = load_engine()(
                lambda kind, size: batch_sizes.observe(size, {"work": kind})
            )
        except HyperloraError as error:  # list_models reports it; Serve would restart for ever
            self._engine = error

    def check_health(self) -> None:
        """Check the model thread; Serve replaces a replica that raises.

        Raises:
            RuntimeError: If the thread has stopped.
        """
        if not isinstance(self._engine, HyperloraError) and not self._engine.is_ready:
            raise RuntimeError("the model thread has stopped")

    def list_models(self) -> list[ModelInfo] | HyperloraError:
        """List the models, or return why they cannot be loaded."""
        if isinstance(self._engine, HyperloraError):
            return self._engine
        return self._engine.list_models()

    async def run_request(
        self, request: EngineRequest[ValueT], timeout_s: float, owner: str = ""
    ) -> AsyncIterator[float | RequestOutcome[ValueT]]:
        """Run a request of any class.

        Args:
            request: The request.
            timeout_s: Seconds that each stage may take, with its time in the queue.
            owner: Who takes turns with others.

        Yields:
            Fractions that are done, then the outcome.
        """
        if isinstance(self._engine, HyperloraError):
            yield RequestOutcome(error=self._engine)
            return
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def report_progress(progress: float) -> None:
            loop.call_soon_threadsafe(events.put_nowait, progress)

        task = asyncio.ensure_future(
            self._engine.run(request, timeout_s, report_progress, owner=owner)
        )
        task.add_done_callback(events.put_nowait)
        try:
            while (event := await events.get()) is not task:
                yield event
            yield _get_outcome(task)
        finally:
            task.cancel()


def _get_outcome(task: "asyncio.Future[EngineResult[ValueT]]") -> RequestOutcome[ValueT]:
    try:
        return RequestOutcome(result=task.result())
    except USER_ERRORS as error:
        return RequestOutcome(error=error.with_traceback(None))


class RayEngine:
    """An ``Engine`` that sends requests to replicas.

    Args:
        handle: Serve's handle of the replicas.
        app_name: Name of the Serve application.
        deployment_name: Name of the deployment of the replicas.
    """

    def __init__(self, handle: DeploymentHandle, app_name: str, deployment_name: str) -> None:
        self._handle, self._app_name, self._deployment_name = handle, app_name, deployment_name
        self._stream = handle.options(method_name="run_request", stream=True)
        self._model_infos: list[ModelInfo] | None = None
        self._num_active = 0

    @property
    def is_ready(self) -> bool:
        """Whether a replica runs. It asks Serve's controller, so never call it on an event loop."""
        application = serve.status().applications.get(self._app_name)
        deployment = application.deployments.get(self._deployment_name) if application else None
        if deployment is None:
            return False
        states = deployment.replica_states
        return states.get("RUNNING", 0) > 0  # type: ignore[call-overload]

    @property
    def queue_length(self) -> int:
        """Number of requests that are not answered yet."""
        return self._num_active

    def list_models(self) -> list[ModelInfo]:
        """List the models of a replica; it blocks once, so never call it on an event loop.

        Raises:
            HyperloraError: If the models cannot be loaded.
        """
        if self._model_infos is None:
            model_infos = self._handle.list_models.remote().result()
            if isinstance(model_infos, HyperloraError):
                raise model_infos
            self._model_infos = model_infos
        return self._model_infos

    async def run(
        self,
        request: EngineRequest[ValueT],
        timeout_s: float,
        on_progress: ProgressFn | None = None,
        *,
        owner: str = "",
    ) -> EngineResult[ValueT]:
        """Run a request in a replica, again if the replica dies; see ``Engine.run``.

        A request is a pure function of its content, so another replica may run it.

        Args:
            request: A request of any class.
            timeout_s: Seconds that each stage of the work may take, with its time in the queue.
            on_progress: Receives the fraction of a refinement that is done.
            owner: Who takes turns with others.

        Returns:
            The result.

        Raises:
            QueueFullError: If too many requests wait, or too many replicas die over this one.
        """
        deadline = time.monotonic() + timeout_s
        self._num_active += 1
        try:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    remaining_s = deadline - time.monotonic()
                    return await self._stream_result(request, remaining_s, on_progress, owner)
                except RayTaskError:
                    raise  # a mistake in the replica, which lives
                except RayError as error:
                    kind, reason = type(request).__name__, type(error).__name__
                    _log.warning("a replica died over a %s: %s", kind, reason)
                    await asyncio.sleep(0.1 * 4**attempt)
            raise QueueFullError(
                f"{MAX_ATTEMPTS} replicas died over this request: "
                "ask again in a moment, or for less"
            )
        except BackPressureError as error:
            raise QueueFullError("as many requests wait as may: ask again in a moment") from error
        finally:
            self._num_active -= 1

    def close(self, timeout_s: float) -> None:
        """Do nothing: Serve stops the replicas."""

    async def _stream_result(
        self,
        request: EngineRequest[ValueT],
        timeout_s: float,
        on_progress: ProgressFn | None,
        owner: str,
    ) -> EngineResult[ValueT]:
        responses = self._stream.remote(request, timeout_s, owner)
        assert isinstance(responses, DeploymentResponseGenerator)
        try:
            async for event in responses:
                if isinstance(event, float):
                    if on_progress is not None:
                        on_progress(event)
                    continue
                result: EngineResult[ValueT] | None = event.result
                if result is None:
                    raise event.error
                return result
            raise RuntimeError("the replica ended its stream without an outcome")
        finally:
            responses.cancel()
