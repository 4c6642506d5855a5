"""What is here, and how it does."""

from fastapi import APIRouter, Request, Response

from hyperlora.service.api.responses import service_of
from hyperlora.service.api.schemas import Health
from hyperlora.service.engine.requests import ModelFacts
from hyperlora.service.errors import documented
from hyperlora.service.security import Caller

router = APIRouter(tags=["System"])


@router.get("/v1/models", responses=documented())
def models(request: Request, owner: Caller) -> list[ModelFacts]:
    """The models of this server."""
    return service_of(request).engine.models()


@router.get("/healthz")
async def healthz(request: Request) -> Health:
    """Whether the process answers."""
    return _health(request, "ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "Not ready"}})
def readyz(request: Request, response: Response) -> Health:
    """Whether requests would be taken."""
    ready = service_of(request).engine.ready
    response.status_code = 200 if ready else 503
    return _health(request, "ready" if ready else "the model's thread has stopped")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _health(request: Request, status: str) -> Health:
    service = service_of(request)
    return Health(status=status, waiting=service.engine.waiting, jobs=service.jobs.open)
