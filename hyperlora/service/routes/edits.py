"""/v1/edits: the change that a pair shows (or a LoRA holds) made on another picture."""

import asyncio
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.errors import BadRequest
from hyperlora.service.changes import EditOrder, Noticed
from hyperlora.service.jobs import Report
from hyperlora.service.problems import documented
from hyperlora.service.routes.answers import (
    Prefer,
    binary,
    file_response,
    in_time,
    later,
    pairs_from,
    service_of,
    wants_job,
)
from hyperlora.service.routes.images import png_bytes
from hyperlora.service.schemas import Id, JobInfo, Weight
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/edits", tags=["Edits"])
_FILE = binary("image/png", "The edited picture; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_class=Response,
    responses=documented(400, 403, 404, 408, 413, 415, 503, 504, also={200: _FILE, 202: _ACCEPTED}),
)
async def edit(
    request: Request,
    owner: Caller,
    picture: Annotated[UploadFile, File(description="The picture to edit.")],
    before: Annotated[list[UploadFile] | None, File(description="Pictures before the edit.")] = None,
    after: Annotated[list[UploadFile] | None, File(description="The same pictures after it.")] = None,
    lora: Annotated[UploadFile | None, File(description="Or the LoRA of a change, a .safetensors file.")] = None,
    lora_id: Annotated[Id | None, Form(description="Or the id of a kept one.")] = None,
    strength: Annotated[Weight, Form(description="Below 0 undoes the change.")] = 1.0,
    instruction: Annotated[str, Form(max_length=1000, description="Words besides, or instead.")] = "",
    seed: Annotated[int, Form(ge=0, le=2**63 - 1)] = 0,
    steps: Annotated[int | None, Form(ge=1, le=50, description="The model's own if not given.")] = None,
    prefer: Prefer = "",
) -> Response:
    """One picture edited as the pair shows. Edits of equal steps are made in one batch, each with its own LoRA."""
    service = service_of(request)
    pairs = await pairs_from(before, after, service.settings.max_photos)
    if sum((bool(pairs), lora is not None, lora_id is not None)) > 1:
        raise BadRequest("send before and after, or a LoRA, or the id of a kept one: only one of these")
    file = await lora.read() if lora is not None else None
    if lora_id is not None:
        file = service.files.get(lora_id, "lora")
        if file is None:
            raise HTTPException(404, f"no LoRA {lora_id} is kept here (any more): make it again with keep=true")
    order = EditOrder(await picture.read(), pairs, file, strength, instruction, seed, steps)

    async def made(seconds: float) -> Noticed:
        noticed = await service.engine.edited(order, seconds)
        return Noticed(await asyncio.to_thread(png_bytes, noticed.made), noticed.notices)

    async def job(report: Report) -> str:
        return await asyncio.to_thread(service.files.put, (await made(float("inf"))).made, "image")

    if wants_job(prefer):
        return later(request, "image", owner, job)
    noticed = await in_time(request, made(service.settings.deadline), service.settings.deadline)
    found = sha256(noticed.made).hexdigest()
    return file_response(request, noticed.made, found, "image/png", f"{found[:12]}.png", noticed.notices)
