"""``RayEngine``: an ``Engine`` whose work is done by replicas in other processes, and done again where one dies.

route ── RayEngine ── Serve handle ──▶ Replica (LocalEngine, its own micro-batching)  × replicas
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from PIL import Image
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.metrics import Histogram

from hyperlora.errors import HyperloraError
from hyperlora.service.engine.base import ProgressFn
from hyperlora.service.engine.batcher import DeadlineExceededError, QueueFullError
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.requests import (
    EditImageRequest,
    EditLoraRequest,
    EngineResult,
    ImageRequest,
    LoraRequest,
    ModelInfo,
    SimilarityRequest,
)

MAX_ATTEMPTS: Final = 3
"""Replicas that may die over one request before it is refused: it may be what kills them."""
USER_ERRORS: Final = (HyperloraError, QueueFullError, DeadlineExceededError)
_log = logging.getLogger("hyperlora.service")


class Replica:
    """A ``LocalEngine`` as Serve runs it. ``make_engine_factory`` loads the models and returns what starts the engine.

    Refusals are returned, not raised: Ray would log them, and what they quote is a caller's.
    """

    def __init__(
        self, make_engine_factory: Callable[[], Callable[[Callable[[str, int], None]], LocalEngine]]
    ) -> None:
        batch_sizes = Histogram(
            "hyperlora_batch_size",
            "Requests done together",
            boundaries=[1, 2, 4, 8, 16, 32],
            tag_keys=("work",),
        )
        self._engine: LocalEngine | HyperloraError
        try:
            self._engine = make_engine_factory()(
                lambda work, size: batch_sizes.observe(size, {"work": work})
            )
        except (
            HyperloraError
        ) as error:  # told to whoever asks for facts: Serve would only try again and again
            self._engine = error

    def check_health(self) -> None:
        """For Serve, which replaces a replica that raises."""
        if isinstance(self._engine, LocalEngine) and not self._engine.is_ready:
            raise RuntimeError("the model's thread has stopped")

    def list_models(self) -> list[ModelInfo] | HyperloraError:
        """The models, or why they cannot be loaded."""
        return self._engine.list_models() if isinstance(self._engine, LocalEngine) else self._engine

    async def run_request(self, method: str, request: Any, timeout_s: float) -> AsyncIterator[Any]:
        """Progress as it is made (floats), at last a tuple: result and refusal, one of them None."""
        if not isinstance(self._engine, LocalEngine):
            yield None, self._engine
            return
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        progress_args = (
            (lambda done: loop.call_soon_threadsafe(events.put_nowait, done),)
            if method == "lora"
            else ()
        )
        task = asyncio.ensure_future(
            getattr(self._engine, method)(request, timeout_s, *progress_args)
        )
        task.add_done_callback(events.put_nowait)
        try:
            while (event := await events.get()) is not task:
                yield event
            yield _get_outcome(task)
        finally:
            task.cancel()


def _get_outcome(task: "asyncio.Future[Any]") -> tuple[Any, Exception | None]:
    try:
        return task.result(), None
    except USER_ERRORS as error:
        return None, error.with_traceback(None)


class RayEngine:
    """Asks the replicas behind ``handle``, which is of the deployment ``deployment_name`` in the application ``app_name``."""

    def __init__(self, handle: DeploymentHandle, app_name: str, deployment_name: str) -> None:
        self._handle, self._app_name, self._deployment_name = handle, app_name, deployment_name
        self._stream = handle.options(method_name="do", stream=True)
        self._model_infos: list[ModelInfo] | None = None
        self._num_active = 0

    @property
    def is_ready(self) -> bool:
        """Whether a replica runs. Asks Serve's controller, so not to be called on an event loop."""
        application = serve.status().applications.get(self._app_name)
        deployment = application.deployments.get(self._deployment_name) if application else None
        return deployment is not None and deployment.replica_states.get("RUNNING", 0) > 0  # type: ignore[call-overload]

    @property
    def queue_length(self) -> int:
        return self._num_active

    def list_models(self) -> list[ModelInfo]:
        """Asked of a replica once, so not to be called on an event loop. Raises ``HyperloraError`` if they cannot be
        loaded."""
        if self._model_infos is None:
            model_infos = self._handle.facts.remote().result()
            if isinstance(model_infos, HyperloraError):
                raise model_infos
            self._model_infos = model_infos
        return self._model_infos

    async def create_lora(
        self, request: LoraRequest, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> EngineResult:
        result: EngineResult = await self._run_with_retries("lora", request, timeout_s, on_progress)
        return result

    async def compute_similarity(self, request: SimilarityRequest, timeout_s: float) -> list[float]:
        similarities: list[float] = await self._run_with_retries("likeness", request, timeout_s)
        return similarities

    async def generate_image(self, request: ImageRequest, timeout_s: float) -> Image.Image:
        image: Image.Image = await self._run_with_retries("picture", request, timeout_s)
        return image

    async def create_edit_lora(self, request: EditLoraRequest, timeout_s: float) -> EngineResult:
        result: EngineResult = await self._run_with_retries("change", request, timeout_s)
        return result

    async def edit_image(self, request: EditImageRequest, timeout_s: float) -> EngineResult:
        result: EngineResult = await self._run_with_retries("edited", request, timeout_s)
        return result

    def close(self, timeout_s: float) -> None:
        """The replicas are Serve's to stop."""

    async def _run_with_retries(
        self, method: str, request: Any, timeout_s: float, on_progress: ProgressFn | None = None
    ) -> Any:
        """What a replica answers. An order is a pure function of its content, so another replica may do it again."""
        deadline = time.monotonic() + timeout_s
        self._num_active += 1
        try:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    return await self._stream_result(
                        method, request, deadline - time.monotonic(), on_progress
                    )
                except RayTaskError:
                    raise  # a mistake in the replica, which lives
                except RayError as error:
                    _log.warning("a replica died over a %s: %s", method, type(error).__name__)
                    await asyncio.sleep(0.1 * 4**attempt)
            raise QueueFullError(
                f"{MAX_ATTEMPTS} replicas died over this request: ask again in a moment, or for less"
            )
        except BackPressureError as error:
            raise QueueFullError("as many requests wait as may: ask again in a moment") from error
        finally:
            self._num_active -= 1

    async def _stream_result(
        self, method: str, request: Any, timeout_s: float, on_progress: ProgressFn | None
    ) -> Any:
        responses = self._stream.remote(method, request, timeout_s)
        assert isinstance(responses, DeploymentResponseGenerator)
        try:
            async for event in responses:
                if not isinstance(event, float):
                    result, error = event
                    if error is not None:
                        raise error
                    return result
                if on_progress is not None:
                    on_progress(event)
        finally:
            responses.cancel()
