"""Answers of the routes: at once or by a job, as a file or as JSON."""

import asyncio
import io
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, TypeVar
from urllib.parse import quote

from fastapi import Request, Response
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hyperlora.service.api.forms import CallContext, get_state
from hyperlora.service.api.schemas import JobInfo
from hyperlora.service.engine.batcher import DeadlineExceededError
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.requests import EngineResult
from hyperlora.service.errors import ClientDisconnectedError, JsonObject
from hyperlora.service.file_store import SUFFIXES, FileKind, FileStore
from hyperlora.service.job_table import Job

ValueT = TypeVar("ValueT")

RunFn = Callable[[float, ProgressFn | None], Awaitable[EngineResult[bytes]]]
"""Makes a file within some seconds, and reports its progress."""
ACCEPTED_RESPONSE: Final[JsonObject] = {"model": JobInfo, "description": "Accepted"}
NOT_MODIFIED_RESPONSE: Final[JsonObject] = {"description": "The caller has this file"}
MEDIA_TYPES: Final[Mapping[FileKind, str]] = {
    "lora": "application/octet-stream",
    "image": "image/png",
}
_FILE_NOUNS: Final[Mapping[FileKind, str]] = {"lora": "LoRA", "image": "image"}
_DISCONNECT_POLL_S: Final = 0.1
_RESULT_PATHS: Final = {"lora": "/v1/loras/", "image": "/v1/images/"}


async def run_with_timeout(
    request: Request, awaitable: Awaitable[ValueT], timeout_s: float
) -> ValueT:
    """Wait for a result; cancel the work when the caller leaves.

    Args:
        request: The HTTP request.
        awaitable: The work.
        timeout_s: Seconds that the work may take.

    Returns:
        The result of the work.

    Raises:
        DeadlineExceededError: After ``timeout_s`` seconds.
        ClientDisconnectedError: If the caller leaves.
    """
    task = asyncio.ensure_future(awaitable)
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
        await asyncio.sleep(_DISCONNECT_POLL_S)


async def run_or_enqueue(
    call: CallContext, kind: FileKind, run_fn: RunFn
) -> EngineResult[bytes] | Response:
    """Make a file within the server's time limit, or accept a job that stores it.

    Args:
        call: The request and its preferences.
        kind: Kind of the file.
        run_fn: Makes the file.

    Returns:
        The file, or 202 with the job if the caller prefers one.
    """
    state = call.state
    if not call.wants_job:
        timeout_s = state.settings.timeout_s
        return await run_with_timeout(call.request, run_fn(timeout_s, None), timeout_s)

    async def run_job(on_progress: ProgressFn) -> str:
        result = await run_fn(float("inf"), on_progress)
        return await asyncio.to_thread(store_result, state.files, result, kind, call.owner)

    job = await state.jobs.submit(kind, call.owner, run_job)
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return Response(make_job_info(job).model_dump_json(), 202, headers, "application/json")


def store_result(
    file_store: FileStore, result: EngineResult[bytes], kind: FileKind, owner: str
) -> str:
    """Store a file, and the LoRA of its negative branch if it has one.

    Args:
        file_store: The stored files.
        result: The result of the engine.
        kind: Kind of the file.
        owner: Who may read and delete it.

    Returns:
        The id of the file; its header names that of the other.
    """
    if result.lora is not None and result.lora.negative is not None:
        file_store.store_bytes(result.lora.negative, kind, owner)
    return file_store.store_bytes(result.value, kind, owner)


def make_job_info(job: Job) -> JobInfo:
    """Make the JSON of a job as its owner sees it."""
    return JobInfo(
        id=job.id,
        kind=job.kind,
        state=job.state,
        progress=job.progress,
        created=job.created,
        finished=job.finished,
        result=_RESULT_PATHS[job.kind] + job.result if job.result else None,
        error=job.error,
    )


async def encode_png_result(image: Awaitable[EngineResult[Image.Image]]) -> EngineResult[bytes]:
    """Await an image and encode it as a PNG file, in another thread."""
    result = await image
    data = await asyncio.to_thread(_encode_png, result.value)
    return EngineResult(data, result.warnings, result.notes)


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encode_base64(data: bytes) -> str:
    """Encode bytes as base64 text."""
    return b64encode(data).decode()


@dataclass(frozen=True)
class FileContent:
    """A file that a route answers.

    Attributes:
        data: Content of the file.
        digest: SHA-256 of the content, for the ETag.
        media_type: Type of the content.
        name: Name of the file for the caller.
        warnings: What may be wrong with the input, one sentence each.
        notes: What to know about the file, likewise.
    """

    data: bytes
    digest: str
    media_type: str
    name: str
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @classmethod
    def from_png(cls, result: EngineResult[bytes]) -> "FileContent":
        """Describe a PNG, named after its digest."""
        digest = sha256(result.value).hexdigest()
        name = f"{digest[:12]}.png"
        media_type = MEDIA_TYPES["image"]
        return cls(result.value, digest, media_type, name, result.warnings, result.notes)


def make_file_response(request: Request, file: FileContent) -> Response:
    """Answer a file with its digest as ETag.

    Args:
        request: The HTTP request.
        file: The file.

    Returns:
        200 with the file, or 304 for a GET by a caller that has it.
    """
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name, safe='')}",
        **_make_headers(file.digest, file.warnings, file.notes),
    }
    known_digest = request.headers.get("if-none-match", "").strip(' W/"')
    if request.method == "GET" and known_digest == file.digest:
        return Response(status_code=304, headers=headers)
    return Response(file.data, 200, headers, file.media_type)


def read_stored_file(file_store: FileStore, id: str, kind: FileKind, owner: str) -> bytes:
    """Read a stored file.

    Args:
        file_store: The stored files.
        id: SHA-256 of the file.
        kind: Kind of the file.
        owner: Who asks.

    Returns:
        Content of the file.

    Raises:
        HTTPException: 404 if it is not stored (any more).
    """
    if (data := file_store.get_bytes(id, kind, owner)) is None:
        hint = ": make it again with store=true" if kind == "lora" else ""
        raise HTTPException(404, f"no {_FILE_NOUNS[kind]} {id} is stored here (any more){hint}")
    return data


def make_stored_file_response(request: Request, id: str, kind: FileKind, owner: str) -> Response:
    """Answer a stored file, named after its digest.

    Args:
        request: The HTTP request.
        id: SHA-256 of the file.
        kind: Kind of the file.
        owner: Who asks.

    Returns:
        200 with the file, or 304 if the caller has it.

    Raises:
        HTTPException: 404 if it is not stored (any more).
    """
    data = read_stored_file(get_state(request).files, id, kind, owner)
    file = FileContent(data, id, MEDIA_TYPES[kind], f"{id[:12]}{SUFFIXES[kind]}")
    return make_file_response(request, file)


def delete_stored_file(request: Request, id: str, kind: FileKind, owner: str) -> Response:
    """Delete a stored file.

    Args:
        request: The HTTP request.
        id: SHA-256 of the file.
        kind: Kind of the file.
        owner: Who asks.

    Returns:
        204.

    Raises:
        HTTPException: 404 if it is not stored (any more).
    """
    if not get_state(request).files.delete(id, kind, owner):
        raise HTTPException(404, f"no {_FILE_NOUNS[kind]} {id} is stored here (any more)")
    return Response(status_code=204)


def make_json_response(
    body: BaseModel, digest: str, warnings: Sequence[str] = (), notes: Sequence[str] = ()
) -> Response:
    """Answer JSON with the digest of the file in it as ETag.

    Args:
        body: The JSON.
        digest: SHA-256 of the file.
        warnings: What may be wrong with the input, one sentence each.
        notes: What to know about the result, likewise.

    Returns:
        200 with the JSON.
    """
    headers = _make_headers(digest, warnings, notes)
    return Response(body.model_dump_json(), media_type="application/json", headers=headers)


def _make_headers(digest: str, warnings: Sequence[str], notes: Sequence[str]) -> dict[str, str]:
    """Make the ETag, and ``Hyperlora-Warning`` and ``Hyperlora-Note`` if there are sentences."""
    sentences = {"Hyperlora-Warning": warnings, "Hyperlora-Note": notes}
    texts = {name: "; ".join(values) for name, values in sentences.items() if values}
    # a note may quote a title in any script, and headers are Latin-1
    safe_texts = {
        name: text.encode("latin-1", "replace").decode("latin-1") for name, text in texts.items()
    }
    return {"ETag": f'"{digest}"', **safe_texts}


def make_binary_schema(media_type: str, description: str) -> JsonObject:
    """Make the OpenAPI entry of a 200 that is a file.

    Args:
        media_type: Type of the file.
        description: What the file is.

    Returns:
        An OpenAPI response.
    """
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"description": description, "content": content}
