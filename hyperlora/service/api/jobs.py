"""/v1/jobs: work that was accepted to be done later."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from hyperlora.service.api.responses import job_info, service_of
from hyperlora.service.api.schemas import JobId, JobInfo
from hyperlora.service.errors import documented
from hyperlora.service.jobs import Job
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])


def _own(request: Request, owner: Caller, id: Annotated[JobId, Path()]) -> Job:
    """The caller's job. Raises 404 for another's, or none."""
    if (job := service_of(request).jobs.get(id, owner)) is None:
        raise HTTPException(404, f"you have no job {id} here")
    return job


Own = Annotated[Job, Depends(_own)]


@router.get("/{id}", responses=documented(404))
async def get_job(job: Own) -> JobInfo:
    """Where a job stands."""
    return job_info(job)


@router.delete("/{id}", responses=documented(404))
async def cancel_job(request: Request, job: Own) -> JobInfo:
    """Cancel a job; a finished one stays as it is."""
    return job_info(await service_of(request).jobs.cancel(job))


@router.get("/{id}/events", response_class=EventSourceResponse, responses=documented(404))
async def follow_job(request: Request, job: Own) -> AsyncIterator[ServerSentEvent]:
    """The job now and after every change, as server-sent events, until it is finished."""
    async for state in service_of(request).jobs.follow(job):
        yield ServerSentEvent(event=state.state, data=job_info(state))
