"""/v1/images: a prompt and LoRAs to a picture; pictures made by jobs."""

import asyncio
from base64 import b64encode
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.exceptions import HTTPException

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.api.responses import (
    Accept,
    Prefer,
    encode_png,
    get_state,
    get_stored_lora,
    make_binary_schema,
    make_file_response,
    make_png_response,
    run_or_enqueue,
    wants_json,
)
from hyperlora.service.api.schemas import FileId, ImageRequestBody, ImageResponse, JobInfo, LoraRef
from hyperlora.service.engine.requests import EngineResult, ImageRequest
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.file_store import FileStore
from hyperlora.service.jobs import ProgressFn
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/images", tags=["Images"])
_FILE = make_binary_schema("image/png", "The picture; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_model=ImageResponse,
    responses=build_problem_responses(
        400, 403, 404, 408, 413, 503, 504, other_responses={200: _FILE, 202: _ACCEPTED}
    ),
)
async def generate_image(
    request: Request,
    owner: Caller,
    body: ImageRequestBody,
    accept: Accept = "*/*",
    prefer: Prefer = "",
) -> Response:
    """A picture of a prompt, with LoRAs kept here, sent along, or named in the prompt. Requests of equal steps,
    guidance and size are drawn in one batch, each with its own LoRAs."""
    state = get_state(request)
    files = [(_get_lora_content(lora_ref, state.files), lora_ref.weight) for lora_ref in body.loras]
    fields = body.model_dump(exclude={"loras"})
    image_request = ImageRequest(**fields | {"loras": files})

    async def run_generation(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult:
        return EngineResult(
            await asyncio.to_thread(
                encode_png, await state.engine.generate_image(image_request, timeout_s)
            )
        )

    result = await run_or_enqueue(request, owner, prefer, "image", run_generation)
    if isinstance(result, Response):
        return result
    if wants_json(accept):
        digest = sha256(result.value).hexdigest()
        image_response = ImageResponse(
            sha256=digest, seed=body.seed, content=b64encode(result.value).decode()
        )
        return Response(
            image_response.model_dump_json(),
            media_type="application/json",
            headers={"ETag": f'"{digest}"'},
        )
    return make_png_response(request, result)


@router.get(
    "/{id}",
    response_class=Response,
    responses=build_problem_responses(
        404, other_responses={200: _FILE, 304: {"description": "As you have it"}}
    ),
)
async def get_image(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """A picture that a job made."""
    data = get_state(request).files.get_bytes(id, "image")
    if data is None:
        raise HTTPException(404, "no picture of this id is kept here (any more)")
    return make_file_response(request, data, id, "image/png", f"{id[:12]}.png")


@router.delete(
    "/{id}", status_code=204, response_class=Response, responses=build_problem_responses(404)
)
async def delete_image(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Forget a picture that a job made."""
    if not get_state(request).files.delete(id, "image"):
        raise HTTPException(404, "no picture of this id is kept here (any more)")
    return Response(status_code=204)


def _get_lora_content(lora_ref: LoraRef, file_store: FileStore) -> bytes:
    if (lora_ref.id is None) == (lora_ref.content is None):
        raise InvalidArgumentError(
            "each LoRA needs either the id of a kept one or a file's content, and not both"
        )
    if lora_ref.content is not None:
        return lora_ref.content
    return get_stored_lora(file_store, str(lora_ref.id))
