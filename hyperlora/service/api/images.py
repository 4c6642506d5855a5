"""/v1/images: a prompt and LoRAs to a picture; pictures made by jobs."""

import asyncio
from base64 import b64encode
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.exceptions import HTTPException

from hyperlora.errors import BadRequest
from hyperlora.service.api.responses import (
    Accept,
    Prefer,
    binary,
    file_response,
    kept_lora,
    now_or_later,
    png_bytes,
    png_response,
    service_of,
    wants_json,
)
from hyperlora.service.api.schemas import Id, JobInfo, LoraChoice, Picture, PictureRequest
from hyperlora.service.engine.requests import Noticed, PictureOrder
from hyperlora.service.errors import documented
from hyperlora.service.file_store import Files
from hyperlora.service.jobs import Report
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/images", tags=["Images"])
_FILE = binary("image/png", "The picture; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_model=Picture,
    responses=documented(400, 403, 404, 408, 413, 503, 504, also={200: _FILE, 202: _ACCEPTED}),
)
async def draw(
    request: Request, owner: Caller, wanted: PictureRequest, accept: Accept = "*/*", prefer: Prefer = ""
) -> Response:
    """A picture of a prompt, with LoRAs kept here, sent along, or named in the prompt. Requests of equal steps,
    guidance and size are drawn in one batch, each with its own LoRAs."""
    service = service_of(request)
    files = [(_content(choice, service.files), choice.weight) for choice in wanted.loras]
    fields = wanted.model_dump(exclude={"loras"})
    order = PictureOrder(**fields | {"loras": files})

    async def make(seconds: float, report: Report | None) -> Noticed:
        return Noticed(await asyncio.to_thread(png_bytes, await service.engine.picture(order, seconds)))

    made = await now_or_later(request, owner, prefer, "image", make)
    if isinstance(made, Response):
        return made
    if wants_json(accept):
        found = sha256(made.made).hexdigest()
        picture = Picture(sha256=found, seed=wanted.seed, content=b64encode(made.made).decode())
        return Response(picture.model_dump_json(), media_type="application/json", headers={"ETag": f'"{found}"'})
    return png_response(request, made)


@router.get(
    "/{id}",
    response_class=Response,
    responses=documented(404, also={200: _FILE, 304: {"description": "As you have it"}}),
)
async def get_image(request: Request, owner: Caller, id: Annotated[Id, Path()]) -> Response:
    """A picture that a job made."""
    data = service_of(request).files.get(id, "image")
    if data is None:
        raise HTTPException(404, "no picture of this id is kept here (any more)")
    return file_response(request, data, id, "image/png", f"{id[:12]}.png")


@router.delete("/{id}", status_code=204, response_class=Response, responses=documented(404))
async def delete_image(request: Request, owner: Caller, id: Annotated[Id, Path()]) -> Response:
    """Forget a picture that a job made."""
    if not service_of(request).files.delete(id, "image"):
        raise HTTPException(404, "no picture of this id is kept here (any more)")
    return Response(status_code=204)


def _content(choice: LoraChoice, files: Files) -> bytes:
    if (choice.id is None) == (choice.content is None):
        raise BadRequest("each LoRA needs either the id of a kept one or a file's content, and not both")
    if choice.content is not None:
        return choice.content
    return kept_lora(files, str(choice.id))
