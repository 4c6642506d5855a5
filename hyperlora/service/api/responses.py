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

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.api.schemas import JobInfo
from hyperlora.service.engine.batcher import DeadlineExceededError
from hyperlora.service.engine.requests import EngineResult
from hyperlora.service.errors import ClientDisconnectedError
from hyperlora.service.file_store import FileStore
from hyperlora.service.jobs import Job, ProgressFn

if TYPE_CHECKING:
    from hyperlora.service.state import AppState

T = TypeVar("T")
Prefer = Annotated[
    str,
    Header(
        description="`respond-async`: 202 and a job at once, instead of waiting.", max_length=200
    ),
]
Accept = Annotated[
    str, Header(description="`application/json`: JSON instead of the file itself.", max_length=1000)
]


def get_state(request: Request) -> "AppState":
    """What the app's routes share."""
    state: AppState = request.app.state.service
    return state


def wants_json(accept: str) -> bool:
    """Whether JSON was asked for by name."""
    return "application/json" in accept.lower()


def wants_job(prefer: str) -> bool:
    """RFC 7240's respond-async."""
    return "respond-async" in prefer.lower()


async def run_with_timeout(
    request: Request, coroutine: Coroutine[Any, Any, T], timeout_s: float
) -> T:
    """The result of ``work``; it is cancelled when the caller leaves. Raises ``DeadlineExceededError`` after ``timeout_s``."""
    task = asyncio.create_task(coroutine)
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait(
            {task, disconnect_task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        if disconnect_task.done():
            raise ClientDisconnectedError
        raise DeadlineExceededError(
            f"this took longer than {timeout_s:g} s: ask for less, or with Prefer: respond-async"
        )
    finally:
        for pending_task in (task, disconnect_task):
            pending_task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


RunFn = Callable[[float, ProgressFn | None], Coroutine[Any, Any, EngineResult]]
"""Makes a file (bytes) within some seconds, and reports on the way."""


async def run_or_enqueue(
    request: Request, owner: str, prefer: str, kind: Literal["lora", "image"], run_fn: RunFn
) -> EngineResult | Response:
    """What ``run_fn`` makes, within the server's deadline; 202 with a job that keeps it, if that is preferred."""
    state = get_state(request)

    async def run_job(on_progress: ProgressFn) -> str:
        result = await run_fn(float("inf"), on_progress)
        return await asyncio.to_thread(state.files.store_bytes, result.value, kind)

    if wants_job(prefer):
        return submit_job(request, kind, owner, run_job)
    return await run_with_timeout(
        request, run_fn(state.settings.timeout_s, None), state.settings.timeout_s
    )


def submit_job(
    request: Request, kind: str, owner: str, run_fn: Callable[[ProgressFn], Awaitable[str]]
) -> Response:
    """202 with the accepted job."""
    job = get_state(request).jobs.submit(kind, owner, run_fn)
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return Response(make_job_info(job).model_dump_json(), 202, headers, "application/json")


def make_job_info(job: Job) -> JobInfo:
    """A job as callers see it."""
    paths = {"lora": "/v1/loras/", "image": "/v1/images/"}
    fields = {k: v for k, v in job.__dict__.items() if k != "owner"}
    return JobInfo(**fields | {"result": paths[job.kind] + job.result if job.result else None})


def get_stored_lora(file_store: FileStore, id: str) -> bytes:
    """The file of a kept LoRA. Raises 404."""
    if (data := file_store.get_bytes(id, "lora")) is None:
        raise HTTPException(
            404, f"no LoRA {id} is kept here (any more): make it again with keep=true"
        )
    return data


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_png_response(request: Request, result: EngineResult) -> Response:
    """A picture's file, named after its digest."""
    digest = sha256(result.value).hexdigest()
    return make_file_response(
        request, result.value, digest, "image/png", f"{digest[:12]}.png", result.warnings
    )


def make_warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """``Hyperlora-Notice``, if there is something to say about the input."""
    return {"Hyperlora-Notice": "; ".join(warnings)} if warnings else {}


async def read_pairs(
    before: list[UploadFile] | None, after: list[UploadFile] | None, max_pairs: int
) -> list[tuple[bytes, bytes]]:
    """The pairs of two lists of uploads. Raises ``InvalidArgumentError`` if they are not equally long, ``HTTPException`` 413 for
    more than ``max_pairs``."""
    before_files, after_files = before or [], after or []
    if len(before_files) != len(after_files):
        raise InvalidArgumentError(
            f"{len(before_files)} pictures before and {len(after_files)} after sent: one after for each before expected"
        )
    if len(before_files) > max_pairs:
        raise HTTPException(413, f"{len(before_files)} pairs sent, at most {max_pairs} are taken")
    return [
        (await a.read(), await b.read()) for a, b in zip(before_files, after_files, strict=True)
    ]


def make_file_response(
    request: Request,
    data: bytes,
    digest: str,
    media_type: str,
    name: str,
    warnings: Sequence[str] = (),
) -> Response:
    """The file with its digest as ETag; 304 if the caller has it."""
    headers = {
        "ETag": f'"{digest}"',
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        **make_warning_headers(warnings),
    }
    if request.method == "GET" and request.headers.get("if-none-match", "").strip(' W/"') == digest:
        return Response(status_code=304, headers=headers)
    return Response(data, 200, headers, media_type)


def make_binary_schema(media_type: str, description: str) -> dict[str, Any]:
    """OpenAPI entry for a 200 that is a file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"description": description, "content": content}
