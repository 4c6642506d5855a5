"""/v1/loras: LoRAs from photos of a subject, or of an edit; stored LoRAs."""

import asyncio
from functools import partial
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from hyperlora.service.api.forms import Call, LoraForm
from hyperlora.service.api.responses import (
    ACCEPTED_RESPONSE,
    MEDIA_TYPES,
    NOT_MODIFIED_RESPONSE,
    FileContent,
    delete_stored_file,
    encode_base64,
    make_binary_schema,
    make_file_response,
    make_json_response,
    make_stored_file_response,
    run_or_enqueue,
    store_result,
)
from hyperlora.service.api.schemas import FileId, LoraResponse
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/loras", tags=["LoRAs"])
_FILE = make_binary_schema(MEDIA_TYPES["lora"], "The .safetensors file; its SHA-256 is the ETag")


@router.post(
    "",
    response_model=LoraResponse,
    responses=build_problem_responses(
        400, 403, 408, 413, 415, 503, 504, other_responses={200: _FILE, 202: ACCEPTED_RESPONSE}
    ),
)
async def create_lora(call: Call, form: Annotated[LoraForm, Depends()]) -> Response:
    """Create one LoRA from photos of one subject, or of the edit that before/after pairs show.

    Images are in memory only. The LoRA is stored only if asked, or as the result of a job.
    `model` names one of /v1/models; the first use of one loads it, so ask for a job then.
    `Hyperlora-Note` holds its licenses, and how to use the LoRA.
    \f
    Args:
        call: The request and its preferences.
        form: The fields of the form.

    Returns:
        The file, the file in JSON, or 202 with a job.
    """
    state = call.state
    lora_request = await form.read_request(state.settings.max_photos)
    result = await run_or_enqueue(
        call, "lora", partial(state.engine.run, lora_request, owner=call.owner)
    )
    if isinstance(result, Response):
        return result
    data, facts = result.value, result.lora
    negative = facts.negative if facts else None
    if form.store:
        digest = await asyncio.to_thread(store_result, state.files, result, "lora", call.owner)
    else:
        digest = sha256(data).hexdigest()
    notes = result.notes
    if negative is not None and not (form.store or call.wants_json):
        notes = (*notes, "this model makes a second LoRA for the negative branch: send store=true")
    if call.wants_json:
        file_format = facts.format if facts else None
        body = LoraResponse(
            sha256=digest,
            size=len(data),
            format=file_format or form.find_file_format(state.engine.list_models()),
            stored=form.store,
            content=encode_base64(data),
            notes=list(notes),
            negative_sha256=sha256(negative).hexdigest() if negative else None,
            negative_content=encode_base64(negative) if negative else None,
        )
        return make_json_response(body, digest, result.warnings, notes)
    name = f"{form.title}.safetensors"
    file = FileContent(data, digest, MEDIA_TYPES["lora"], name, result.warnings, notes)
    return make_file_response(call.request, file)


@router.get(
    "/{id}",
    response_class=Response,
    responses=build_problem_responses(
        404, other_responses={200: _FILE, 304: NOT_MODIFIED_RESPONSE}
    ),
)
async def get_lora(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Get a stored LoRA.
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.
        id: SHA-256 of the file.

    Returns:
        The file, or 304 if the caller has it.
    """
    return make_stored_file_response(request, id, "lora", owner)


@router.delete(
    "/{id}", status_code=204, response_class=Response, responses=build_problem_responses(404)
)
async def delete_lora(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Delete a stored LoRA.
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.
        id: SHA-256 of the file.

    Returns:
        204.
    """
    return delete_stored_file(request, id, "lora", owner)
