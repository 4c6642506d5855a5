"""/v1/edits: the change that a pair shows (or a LoRA holds) made on another picture."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, Response, UploadFile

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.api.responses import (
    Prefer,
    encode_png,
    get_state,
    get_stored_lora,
    make_binary_schema,
    make_png_response,
    read_pairs,
    run_or_enqueue,
)
from hyperlora.service.api.schemas import FileId, JobInfo, Weight
from hyperlora.service.engine.requests import EditImageRequest, EngineResult
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.jobs import ProgressFn
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/edits", tags=["Edits"])
_FILE = make_binary_schema("image/png", "The edited picture; its SHA-256 is the ETag")
_ACCEPTED = {"model": JobInfo, "description": "Accepted"}


@router.post(
    "",
    response_class=Response,
    responses=build_problem_responses(
        400, 403, 404, 408, 413, 415, 503, 504, other_responses={200: _FILE, 202: _ACCEPTED}
    ),
)
async def edit_image(
    request: Request,
    owner: Caller,
    image: Annotated[UploadFile, File(description="The picture to edit_image.")],
    before: Annotated[
        list[UploadFile] | None, File(description="Pictures before the edit_image.")
    ] = None,
    after: Annotated[
        list[UploadFile] | None, File(description="The same pictures after it.")
    ] = None,
    lora: Annotated[
        UploadFile | None, File(description="Or the LoRA of a change, a .safetensors file.")
    ] = None,
    lora_id: Annotated[FileId | None, Form(description="Or the id of a kept one.")] = None,
    strength: Annotated[Weight, Form(description="Of a pair, below 0 undoes the change.")] = 1.0,
    instruction: Annotated[
        str, Form(max_length=1000, description="Words besides, or instead.")
    ] = "",
    seed: Annotated[int, Form(ge=0, le=2**63 - 1)] = 0,
    num_inference_steps: Annotated[
        int | None, Form(ge=1, le=50, description="The model's own if not given.")
    ] = None,
    repaint: Annotated[bool, Form(description="Repaint what the change leaves alone too.")] = False,
    prefer: Prefer = "",
) -> Response:
    """One picture edited as the pair shows. Edits of equal steps are made in one batch, each with its own LoRA."""
    state = get_state(request)
    pairs = await read_pairs(before, after, state.settings.max_photos)
    if sum((bool(pairs), lora is not None, lora_id is not None)) > 1:
        raise InvalidArgumentError(
            "send before and after, or a LoRA, or the id of a kept one: only one of these"
        )
    lora_data = await lora.read() if lora is not None else None
    if lora_id is not None:
        lora_data = get_stored_lora(state.files, lora_id)
    edit_request = EditImageRequest(
        await image.read(),
        pairs,
        lora_data,
        strength,
        instruction,
        seed,
        num_inference_steps,
        repaint,
    )

    async def run_edit(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult:
        result = await state.engine.edit_image(edit_request, timeout_s)
        return EngineResult(await asyncio.to_thread(encode_png, result.value), result.warnings)

    result = await run_or_enqueue(request, owner, prefer, "image", run_edit)
    return result if isinstance(result, Response) else make_png_response(request, result)
