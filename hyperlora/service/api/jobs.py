"""/v1/jobs: accepted work that runs later."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from hyperlora.service.api.forms import get_state
from hyperlora.service.api.responses import make_job_info
from hyperlora.service.api.schemas import JobId, JobInfo
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.job_table import Job
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])


async def _get_own_job(request: Request, owner: Caller, id: Annotated[JobId, Path()]) -> Job:
    """Return the caller's job; raise 404 for another owner's or none."""
    if (job := await get_state(request).jobs.get(id, owner)) is None:
        raise HTTPException(404, f"you have no job {id} here")
    return job


OwnJob = Annotated[Job, Depends(_get_own_job)]
"""The job of a path, in a route's parameters."""


@router.get("/{id}", responses=build_problem_responses(404, 503))
async def get_job(job: OwnJob) -> JobInfo:
    """Get the state of a job."""
    return make_job_info(job)


@router.delete("/{id}", responses=build_problem_responses(404, 503))
async def cancel_job(request: Request, job: OwnJob) -> JobInfo:
    """Cancel a job; a finished job stays as it is.
    \f
    Args:
        request: The HTTP request.
        job: The job.

    Returns:
        The job as it is then.
    """
    return make_job_info(await get_state(request).jobs.cancel(job))


@router.get(
    "/{id}/events", response_class=EventSourceResponse, responses=build_problem_responses(404, 503)
)
async def stream_job(request: Request, job: OwnJob) -> AsyncIterator[ServerSentEvent]:
    """Stream the job now and after every change, as server-sent events, until it is finished.
    \f
    Args:
        request: The HTTP request.
        job: The job.

    Yields:
        One event per change.
    """
    async for update in get_state(request).jobs.stream(job):
        yield ServerSentEvent(event=update.state, data=make_job_info(update))
