"""/v1/loras: photos of a subject to a LoRA; kept LoRAs."""

import asyncio
from base64 import b64encode
from hashlib import sha256
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Path, Request, Response, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.errors import BadRequest
from hyperlora.pipelines.generate import Settings
from hyperlora.pipelines.image_to_lora_base import Sampling
from hyperlora.pipelines.refine_generated import RefineBy
from hyperlora.service.api.responses import (
    Accept,
    Prefer,
    binary,
    file_response,
    notice_headers,
    now_or_later,
    pairs_from,
    service_of,
    wants_json,
)
from hyperlora.service.api.schemas import Id, JobInfo, Made, Weight
from hyperlora.service.engine.requests import ChangeOrder, LoraOrder, Noticed
from hyperlora.service.errors import documented
from hyperlora.service.jobs import Report
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/loras", tags=["LoRAs"])
_MEDIA_TYPE = "application/octet-stream"
_FILE = binary(_MEDIA_TYPE, "The .safetensors file; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_model=Made,
    responses=documented(400, 403, 408, 413, 415, 503, 504, also={200: _FILE, 202: _ACCEPTED}),
)
async def make_lora(
    request: Request,
    owner: Caller,
    photos: Annotated[list[UploadFile] | None, File(description="PNG, JPEG or WEBP photos of one subject.")] = None,
    before: Annotated[list[UploadFile] | None, File(description="Or: pictures before an edit.")] = None,
    after: Annotated[list[UploadFile] | None, File(description="The same pictures after it, in this order.")] = None,
    format: Annotated[Literal["diffusers", "kohya", "sgm"], Form()] = "diffusers",
    rank: Annotated[int | None, Form(ge=1, le=128, description="The model's own if not given.")] = None,
    strength: Annotated[Weight, Form()] = 1.0,
    refine: Annotated[int, Form(ge=0, le=500, description="Fine-tuning steps on the photos.")] = 0,
    refine_by: Annotated[
        RefineBy | None,
        Form(description="By who is recognised or by the photos' diffusion loss; the best the model can if not given."),
    ] = None,
    method: Annotated[
        Literal["hyperdreambooth", "difflora"] | None, Form(description="Which model; the server's first if not given.")
    ] = None,
    seed: Annotated[int, Form(ge=0, lt=1 << 63, description="Another sample (difflora).")] = 0,
    title: Annotated[str, Form(max_length=100, description="Name of the file and in its header.")] = "LoRA",
    keep: Annotated[bool, Form(description="Keep the file on the server for a while.")] = False,
    consent: Annotated[bool, Form(description="The person shown agrees; recorded in the file's header.")] = False,
    accept: Accept = "*/*",
    prefer: Prefer = "",
) -> Response:
    """One LoRA from photos of one subject, or of the change between pictures before and after an edit. Pictures are
    held in memory only; the LoRA is kept only if asked, or if the work is done as a job, whose result must lie
    somewhere."""
    service = service_of(request)
    photos = photos or []
    pairs = await pairs_from(before, after, service.settings.max_photos)
    if len(photos) > service.settings.max_photos:
        raise HTTPException(413, f"{len(photos)} photos sent, at most {service.settings.max_photos} are taken")
    if bool(photos) == bool(pairs):
        raise BadRequest("send photos of one subject, or before and after, and not both")
    if pairs and (refine or refine_by or rank or method or seed):
        raise BadRequest(
            "the LoRA of a pair has the model's rank, is not refined and leaves nothing to chance: leave rank, refine, "
            "refine_by, method and seed out"
        )
    if refine_by and not refine:
        raise BadRequest("refine_by says how to refine: give the number of steps as refine too")
    settings = Settings(format, rank, strength, refine, Sampling(seed), refine_by=refine_by)
    order = LoraOrder([await photo.read() for photo in photos], settings, title, consent, method)
    change = ChangeOrder(pairs, strength, format, title, consent)

    async def make(seconds: float, report: Report | None) -> Noticed:
        if pairs:
            return await service.engine.change(change, seconds)
        return await service.engine.lora(order, seconds, report)

    noticed = await now_or_later(request, owner, prefer, "lora", make)
    if isinstance(noticed, Response):
        return noticed
    data: bytes = noticed.made
    found = await asyncio.to_thread(service.files.put, data, "lora") if keep else sha256(data).hexdigest()
    if wants_json(accept):
        body = Made(sha256=found, size=len(data), format=format, kept=keep, content=b64encode(data).decode())
        headers = {"ETag": f'"{found}"', **notice_headers(noticed.notices)}
        return Response(body.model_dump_json(), media_type="application/json", headers=headers)
    return file_response(request, data, found, _MEDIA_TYPE, f"{title}.safetensors", noticed.notices)


@router.get(
    "/{id}",
    response_class=Response,
    responses=documented(404, also={200: _FILE, 304: {"description": "As you have it"}}),
)
async def get_lora(request: Request, owner: Caller, id: Annotated[Id, Path()]) -> Response:
    """A kept LoRA."""
    data = service_of(request).files.get(id, "lora")
    if data is None:
        raise HTTPException(404, "no LoRA of this id is kept here (any more): make it again with keep=true")
    return file_response(request, data, id, _MEDIA_TYPE, f"{id[:12]}.safetensors")


@router.delete("/{id}", status_code=204, response_class=Response, responses=documented(404))
async def delete_lora(request: Request, owner: Caller, id: Annotated[Id, Path()]) -> Response:
    """Forget a kept LoRA."""
    if not service_of(request).files.delete(id, "lora"):
        raise HTTPException(404, "no LoRA of this id is kept here (any more)")
    return Response(status_code=204)
