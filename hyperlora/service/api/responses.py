"""How every route answers: now or later, as the file itself or as JSON, and not at all once the caller has gone."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import Header, Request, Response, UploadFile
from PIL import Image
from starlette.exceptions import HTTPException

from hyperlora.errors import BadRequest
from hyperlora.service.api.schemas import JobInfo
from hyperlora.service.engine.batcher import Expired
from hyperlora.service.engine.requests import Noticed
from hyperlora.service.errors import Gone
from hyperlora.service.file_store import Files
from hyperlora.service.jobs import Job, Report

if TYPE_CHECKING:
    from hyperlora.service.state import Service

T = TypeVar("T")
Prefer = Annotated[
    str, Header(description="`respond-async`: 202 and a job at once, instead of waiting.", max_length=200)
]
Accept = Annotated[str, Header(description="`application/json`: JSON instead of the file itself.", max_length=1000)]


def service_of(request: Request) -> "Service":
    """What the app's routes share."""
    service: Service = request.app.state.service
    return service


def wants_json(accept: str) -> bool:
    """Whether JSON was asked for by name."""
    return "application/json" in accept.lower()


def wants_job(prefer: str) -> bool:
    """RFC 7240's respond-async."""
    return "respond-async" in prefer.lower()


async def in_time(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of ``work``; it is cancelled when the caller leaves. Raises ``Expired`` after ``seconds``."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise Gone
        raise Expired(f"this took longer than {seconds:g} s: ask for less, or with Prefer: respond-async")
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


Make = Callable[[float, Report | None], Coroutine[Any, Any, Noticed]]
"""Makes a file (bytes) within some seconds, and reports on the way."""


async def now_or_later(
    request: Request, owner: str, prefer: str, kind: Literal["lora", "image"], make: Make
) -> Noticed | Response:
    """What ``make`` makes, within the server's deadline; 202 with a job that keeps it, if that is preferred."""
    service = service_of(request)

    async def job(report: Report) -> str:
        noticed = await make(float("inf"), report)
        return await asyncio.to_thread(service.files.put, noticed.made, kind)

    if wants_job(prefer):
        return later(request, kind, owner, job)
    return await in_time(request, make(service.settings.deadline, None), service.settings.deadline)


def later(request: Request, kind: str, owner: str, work: Callable[[Report], Awaitable[str]]) -> Response:
    """202 with the accepted job."""
    job = service_of(request).jobs.accept(kind, owner, work)
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return Response(job_info(job).model_dump_json(), 202, headers, "application/json")


def job_info(job: Job) -> JobInfo:
    """A job as callers see it."""
    paths = {"lora": "/v1/loras/", "image": "/v1/images/"}
    fields = {k: v for k, v in job.__dict__.items() if k != "owner"}
    return JobInfo(**fields | {"result": paths[job.kind] + job.result if job.result else None})


def kept_lora(files: Files, id: str) -> bytes:
    """The file of a kept LoRA. Raises 404."""
    if (data := files.get(id, "lora")) is None:
        raise HTTPException(404, f"no LoRA {id} is kept here (any more): make it again with keep=true")
    return data


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def png_response(request: Request, noticed: Noticed) -> Response:
    """A picture's file, named after its digest."""
    found = sha256(noticed.made).hexdigest()
    return file_response(request, noticed.made, found, "image/png", f"{found[:12]}.png", noticed.notices)


def notice_headers(notices: Sequence[str]) -> dict[str, str]:
    """``Hyperlora-Notice``, if there is something to say about the input."""
    return {"Hyperlora-Notice": "; ".join(notices)} if notices else {}


async def pairs_from(
    before: list[UploadFile] | None, after: list[UploadFile] | None, most: int
) -> list[tuple[bytes, bytes]]:
    """The pairs of two lists of uploads. Raises ``BadRequest`` if they are not equally long, ``HTTPException`` 413 for
    more than ``most``."""
    one, other = before or [], after or []
    if len(one) != len(other):
        raise BadRequest(f"{len(one)} pictures before and {len(other)} after sent: one after for each before expected")
    if len(one) > most:
        raise HTTPException(413, f"{len(one)} pairs sent, at most {most} are taken")
    return [(await a.read(), await b.read()) for a, b in zip(one, other, strict=True)]


def file_response(
    request: Request, data: bytes, sha256: str, media_type: str, name: str, notices: Sequence[str] = ()
) -> Response:
    """The file with its digest as ETag; 304 if the caller has it."""
    headers = {
        "ETag": f'"{sha256}"',
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        **notice_headers(notices),
    }
    if request.method == "GET" and request.headers.get("if-none-match", "").strip(' W/"') == sha256:
        return Response(status_code=304, headers=headers)
    return Response(data, 200, headers, media_type)


def binary(media_type: str, description: str) -> dict[str, Any]:
    """OpenAPI entry for a 200 that is a file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"description": description, "content": content}
