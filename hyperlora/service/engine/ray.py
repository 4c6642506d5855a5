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
from hyperlora.service.engine.base import Progress
from hyperlora.service.engine.batcher import Expired, QueueFull
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.requests import (
    ChangeOrder,
    EditOrder,
    LikenessOrder,
    LoraOrder,
    ModelFacts,
    Noticed,
    PictureOrder,
)

ATTEMPTS: Final = 3
"""Replicas that may die over one request before it is refused: it may be what kills them."""
REFUSALS: Final = (HyperloraError, QueueFull, Expired)
_log = logging.getLogger("hyperlora.service")


class Replica:
    """A ``LocalEngine`` as Serve runs it. ``open_engine`` loads the models and returns what starts the engine.

    Refusals are returned, not raised: Ray would log them, and what they quote is a caller's.
    """

    def __init__(self, open_engine: Callable[[], Callable[[Callable[[str, int], None]], LocalEngine]]) -> None:
        sizes = Histogram(
            "hyperlora_batch_size", "Requests done together", boundaries=[1, 2, 4, 8, 16, 32], tag_keys=("work",)
        )
        self._engine: LocalEngine | HyperloraError
        try:
            self._engine = open_engine()(lambda work, size: sizes.observe(size, {"work": work}))
        except HyperloraError as error:  # told to whoever asks for facts: Serve would only try again and again
            self._engine = error

    def check_health(self) -> None:
        """For Serve, which replaces a replica that raises."""
        if isinstance(self._engine, LocalEngine) and not self._engine.ready:
            raise RuntimeError("the model's thread has stopped")

    def facts(self) -> list[ModelFacts] | HyperloraError:
        """The models, or why they cannot be loaded."""
        return self._engine.models() if isinstance(self._engine, LocalEngine) else self._engine

    async def do(self, verb: str, order: Any, seconds: float) -> AsyncIterator[Any]:
        """Progress as it is made (floats), at last a tuple: result and refusal, one of them None."""
        if not isinstance(self._engine, LocalEngine):
            yield None, self._engine
            return
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()
        report = (lambda done: loop.call_soon_threadsafe(told.put_nowait, done),) if verb == "lora" else ()
        task = asyncio.ensure_future(getattr(self._engine, verb)(order, seconds, *report))
        task.add_done_callback(told.put_nowait)
        try:
            while (news := await told.get()) is not task:
                yield news
            yield _outcome(task)
        finally:
            task.cancel()


def _outcome(task: "asyncio.Future[Any]") -> tuple[Any, Exception | None]:
    try:
        return task.result(), None
    except REFUSALS as error:
        return None, error.with_traceback(None)


class RayEngine:
    """Asks the replicas behind ``handle``, which is of the deployment ``name`` in the application ``app``."""

    def __init__(self, handle: DeploymentHandle, app: str, name: str) -> None:
        self._handle, self._app, self._name = handle, app, name
        self._stream = handle.options(method_name="do", stream=True)
        self._facts: list[ModelFacts] | None = None
        self._open = 0

    @property
    def ready(self) -> bool:
        """Whether a replica runs. Asks Serve's controller, so not to be called on an event loop."""
        application = serve.status().applications.get(self._app)
        deployment = application.deployments.get(self._name) if application else None
        return deployment is not None and deployment.replica_states.get("RUNNING", 0) > 0  # type: ignore[call-overload]

    @property
    def waiting(self) -> int:
        return self._open

    def models(self) -> list[ModelFacts]:
        """Asked of a replica once, so not to be called on an event loop. Raises ``HyperloraError`` if they cannot be
        loaded."""
        if self._facts is None:
            facts = self._handle.facts.remote().result()
            if isinstance(facts, HyperloraError):
                raise facts
            self._facts = facts
        return self._facts

    async def lora(self, order: LoraOrder, seconds: float, progress: Progress | None = None) -> Noticed:
        made: Noticed = await self._done("lora", order, seconds, progress)
        return made

    async def likeness(self, order: LikenessOrder, seconds: float) -> list[float]:
        found: list[float] = await self._done("likeness", order, seconds)
        return found

    async def picture(self, order: PictureOrder, seconds: float) -> Image.Image:
        drawn: Image.Image = await self._done("picture", order, seconds)
        return drawn

    async def change(self, order: ChangeOrder, seconds: float) -> Noticed:
        noticed: Noticed = await self._done("change", order, seconds)
        return noticed

    async def edited(self, order: EditOrder, seconds: float) -> Noticed:
        noticed: Noticed = await self._done("edited", order, seconds)
        return noticed

    def close(self, seconds: float) -> None:
        """The replicas are Serve's to stop."""

    async def _done(self, verb: str, order: Any, seconds: float, progress: Progress | None = None) -> Any:
        """What a replica answers. An order is a pure function of its content, so another replica may do it again."""
        until = time.monotonic() + seconds
        self._open += 1
        try:
            for attempt in range(ATTEMPTS):
                try:
                    return await self._asked(verb, order, until - time.monotonic(), progress)
                except RayTaskError:
                    raise  # a mistake in the replica, which lives
                except RayError as error:
                    _log.warning("a replica died over a %s: %s", verb, type(error).__name__)
                    await asyncio.sleep(0.1 * 4**attempt)
            raise QueueFull(f"{ATTEMPTS} replicas died over this request: ask again in a moment, or for less")
        except BackPressureError as error:
            raise QueueFull("as many requests wait as may: ask again in a moment") from error
        finally:
            self._open -= 1

    async def _asked(self, verb: str, order: Any, seconds: float, progress: Progress | None) -> Any:
        answers = self._stream.remote(verb, order, seconds)
        assert isinstance(answers, DeploymentResponseGenerator)
        try:
            async for news in answers:
                if not isinstance(news, float):
                    result, refusal = news
                    if refusal is not None:
                        raise refusal
                    return result
                if progress is not None:
                    progress(news)
        finally:
            answers.cancel()
