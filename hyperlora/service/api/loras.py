"""/v1/loras: photos of a subject to a LoRA; kept LoRAs."""

import asyncio
from base64 import b64encode
from hashlib import sha256
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Path, Request, Response, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.errors import InvalidArgumentError
from hyperlora.pipelines.generate import GenerationConfig
from hyperlora.pipelines.image_to_lora_base import SamplingConfig
from hyperlora.pipelines.refine_generated import RefineMethod
from hyperlora.service.api.responses import (
    Accept,
    Prefer,
    get_state,
    make_binary_schema,
    make_file_response,
    make_warning_headers,
    read_pairs,
    run_or_enqueue,
    wants_json,
)
from hyperlora.service.api.schemas import FileId, JobInfo, LoraResponse, Weight
from hyperlora.service.engine.requests import EditLoraRequest, EngineResult, LoraRequest
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.jobs import ProgressFn
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/loras", tags=["LoRAs"])
_MEDIA_TYPE = "application/octet-stream"
_FILE = make_binary_schema(_MEDIA_TYPE, "The .safetensors file; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_model=LoraResponse,
    responses=build_problem_responses(
        400, 403, 408, 413, 415, 503, 504, other_responses={200: _FILE, 202: _ACCEPTED}
    ),
)
async def create_lora(
    request: Request,
    owner: Caller,
    photos: Annotated[
        list[UploadFile] | None, File(description="PNG, JPEG or WEBP photos of one subject.")
    ] = None,
    before: Annotated[
        list[UploadFile] | None, File(description="Or: pictures before an edit.")
    ] = None,
    after: Annotated[
        list[UploadFile] | None, File(description="The same pictures after it, in this order.")
    ] = None,
    format: Annotated[Literal["diffusers", "kohya", "sgm"], Form()] = "diffusers",
    rank: Annotated[
        int | None, Form(ge=1, le=128, description="The model's own if not given.")
    ] = None,
    strength: Annotated[Weight, Form()] = 1.0,
    refine_steps: Annotated[
        int, Form(ge=0, le=500, description="Fine-tuning steps on the photos.")
    ] = 0,
    refine_method: Annotated[
        RefineMethod | None,
        Form(
            description="By who is recognised or by the photos' diffusion loss; the best the model can if not given."
        ),
    ] = None,
    method: Annotated[
        Literal["hyperdreambooth", "difflora"] | None,
        Form(description="Which model; the server's first if not given."),
    ] = None,
    seed: Annotated[int, Form(ge=0, lt=1 << 63, description="Another sample (difflora).")] = 0,
    title: Annotated[
        str, Form(max_length=100, description="Name of the file and in its header.")
    ] = "LoRA",
    store: Annotated[bool, Form(description="Keep the file on the server for a while.")] = False,
    consent: Annotated[
        bool, Form(description="The person shown agrees; recorded in the file's header.")
    ] = False,
    accept: Accept = "*/*",
    prefer: Prefer = "",
) -> Response:
    """One LoRA from photos of one subject, or of the change between pictures before and after an edit. Pictures are
    held in memory only; the LoRA is kept only if asked, or if the work is done as a job, whose result must lie
    somewhere."""
    state = get_state(request)
    photos = photos or []
    pairs = await read_pairs(before, after, state.settings.max_photos)
    if len(photos) > state.settings.max_photos:
        raise HTTPException(
            413, f"{len(photos)} photos sent, at most {state.settings.max_photos} are taken"
        )
    if bool(photos) == bool(pairs):
        raise InvalidArgumentError("send photos of one subject, or before and after, and not both")
    if pairs and (refine_steps or refine_method or rank or method or seed):
        raise InvalidArgumentError(
            "the LoRA of a pair has the model's rank, is not refined and leaves nothing to chance: leave rank, refine, "
            "refine_by, method and seed out"
        )
    if refine_method and not refine_steps:
        raise InvalidArgumentError(
            "refine_by says how to refine: give the number of steps as refine too"
        )
    config = GenerationConfig(
        format, rank, strength, refine_steps, SamplingConfig(seed), refine_method=refine_method
    )
    lora_request = LoraRequest(
        [await photo.read() for photo in photos], config, title, consent, method
    )
    edit_lora_request = EditLoraRequest(pairs, strength, format, title, consent)

    async def run_creation(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult:
        if pairs:
            return await state.engine.create_edit_lora(edit_lora_request, timeout_s)
        return await state.engine.create_lora(lora_request, timeout_s, on_progress)

    result = await run_or_enqueue(request, owner, prefer, "lora", run_creation)
    if isinstance(result, Response):
        return result
    data: bytes = result.value
    digest = (
        await asyncio.to_thread(state.files.store_bytes, data, "lora")
        if store
        else sha256(data).hexdigest()
    )
    if wants_json(accept):
        body = LoraResponse(
            sha256=digest,
            size=len(data),
            format=format,
            stored=store,
            content=b64encode(data).decode(),
        )
        headers = {"ETag": f'"{digest}"', **make_warning_headers(result.warnings)}
        return Response(body.model_dump_json(), media_type="application/json", headers=headers)
    return make_file_response(
        request, data, digest, _MEDIA_TYPE, f"{title}.safetensors", result.warnings
    )


@router.get(
    "/{id}",
    response_class=Response,
    responses=build_problem_responses(
        404, other_responses={200: _FILE, 304: {"description": "As you have it"}}
    ),
)
async def get_lora(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """A kept LoRA."""
    data = get_state(request).files.get_bytes(id, "lora")
    if data is None:
        raise HTTPException(
            404, "no LoRA of this id is kept here (any more): make it again with keep=true"
        )
    return make_file_response(request, data, id, _MEDIA_TYPE, f"{id[:12]}.safetensors")


@router.delete(
    "/{id}", status_code=204, response_class=Response, responses=build_problem_responses(404)
)
async def delete_lora(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Forget a kept LoRA."""
    if not get_state(request).files.delete(id, "lora"):
        raise HTTPException(404, "no LoRA of this id is kept here (any more)")
    return Response(status_code=204)
