"""/v1/jobs: work that was accepted to be done later."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from hyperlora.service.problems import documented
from hyperlora.service.routes.answers import job_info, service_of
from hyperlora.service.schemas import JobId, JobInfo
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])


@router.get("/{id}", responses=documented(404))
async def get_job(request: Request, owner: Caller, id: Annotated[JobId, Path()]) -> JobInfo:
    """Where a job stands."""
    if (job := service_of(request).jobs.get(id, owner)) is None:
        raise _unknown(id)
    return job_info(job)


@router.delete("/{id}", responses=documented(404))
async def cancel_job(request: Request, owner: Caller, id: Annotated[JobId, Path()]) -> JobInfo:
    """Cancel a job; a finished one stays as it is."""
    if (job := await service_of(request).jobs.cancel(id, owner)) is None:
        raise _unknown(id)
    return job_info(job)


@router.get("/{id}/events", response_class=EventSourceResponse, responses=documented(404))
async def follow_job(request: Request, owner: Caller, id: Annotated[JobId, Path()]) -> AsyncIterator[ServerSentEvent]:
    """The job now and after every change, as server-sent events, until it is finished."""
    jobs = service_of(request).jobs
    if jobs.get(id, owner) is None:
        raise _unknown(id)
    async for job in jobs.follow(id, owner):
        yield ServerSentEvent(event=job.state, data=job_info(job))


def _unknown(id: str) -> HTTPException:
    return HTTPException(404, f"you have no job {id} here")
