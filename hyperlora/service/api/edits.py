"""/v1/edits: the change that a pair shows (or a LoRA holds) made on another picture."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, Response, UploadFile

from hyperlora.errors import BadRequest
from hyperlora.service.api.responses import (
    Prefer,
    binary,
    kept_lora,
    now_or_later,
    pairs_from,
    png_bytes,
    png_response,
    service_of,
)
from hyperlora.service.api.schemas import Id, JobInfo, Weight
from hyperlora.service.engine.requests import EditOrder, Noticed
from hyperlora.service.errors import documented
from hyperlora.service.jobs import Report
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
    strength: Annotated[Weight, Form(description="Of a pair, below 0 undoes the change.")] = 1.0,
    instruction: Annotated[str, Form(max_length=1000, description="Words besides, or instead.")] = "",
    seed: Annotated[int, Form(ge=0, le=2**63 - 1)] = 0,
    steps: Annotated[int | None, Form(ge=1, le=50, description="The model's own if not given.")] = None,
    repaint: Annotated[bool, Form(description="Repaint what the change leaves alone too.")] = False,
    prefer: Prefer = "",
) -> Response:
    """One picture edited as the pair shows. Edits of equal steps are made in one batch, each with its own LoRA."""
    service = service_of(request)
    pairs = await pairs_from(before, after, service.settings.max_photos)
    if sum((bool(pairs), lora is not None, lora_id is not None)) > 1:
        raise BadRequest("send before and after, or a LoRA, or the id of a kept one: only one of these")
    file = await lora.read() if lora is not None else None
    if lora_id is not None:
        file = kept_lora(service.files, lora_id)
    order = EditOrder(await picture.read(), pairs, file, strength, instruction, seed, steps, repaint)

    async def make(seconds: float, report: Report | None) -> Noticed:
        noticed = await service.engine.edited(order, seconds)
        return Noticed(await asyncio.to_thread(png_bytes, noticed.made), noticed.notices)

    made = await now_or_later(request, owner, prefer, "image", make)
    return made if isinstance(made, Response) else png_response(request, made)
