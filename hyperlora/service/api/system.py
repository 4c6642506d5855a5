"""Models, health and metrics of the server."""

from fastapi import APIRouter, Request, Response

from hyperlora.service.api.forms import get_state
from hyperlora.service.api.schemas import Health
from hyperlora.service.engine.requests import ModelInfo
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.security import Caller

router = APIRouter(tags=["System"])


@router.get("/v1/models", responses=build_problem_responses())
def list_models(request: Request, owner: Caller) -> list[ModelInfo]:
    """List the models of this server, the default one first.
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.

    Returns:
        The models.
    """
    return get_state(request).engine.list_models()


@router.get("/healthz")
async def get_health(request: Request) -> Health:
    """Answer if the process lives."""
    return _make_health(request, "ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "Not ready"}})
def get_readiness(request: Request, response: Response) -> Health:
    """Answer 200 if the server takes requests, 503 if not.
    \f
    Args:
        request: The HTTP request.
        response: The response, whose status is set.

    Returns:
        The health of the server.
    """
    is_ready = get_state(request).engine.is_ready
    response.status_code = 200 if is_ready else 503
    return _make_health(request, "ready" if is_ready else "the model thread has stopped")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics(request: Request) -> Response:
    """Answer the metrics in the text format of Prometheus."""
    return Response(
        get_state(request).metrics.render_text(),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


def _make_health(request: Request, status: str) -> Health:
    state = get_state(request)
    return Health(
        status=status, queue_length=state.engine.queue_length, active_jobs=state.jobs.num_active
    )
