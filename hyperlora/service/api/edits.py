"""/v1/edits: an image, edited as pairs show, by a LoRA, or by an instruction."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.api.forms import Call, EditForm, read_pairs
from hyperlora.service.api.responses import (
    ACCEPTED_RESPONSE,
    MEDIA_TYPES,
    FileContent,
    encode_png_result,
    make_binary_schema,
    make_file_response,
    read_stored_file,
    run_or_enqueue,
)
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.requests import EditImageRequest, EngineResult
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.state import AppState

router = APIRouter(prefix="/v1/edits", tags=["Edits"])
_FILE = make_binary_schema(MEDIA_TYPES["image"], "The edited image; its SHA-256 is the ETag")


@router.post(
    "",
    response_class=Response,
    responses=build_problem_responses(
        400, 403, 404, 408, 413, 415, 503, 504, other_responses={200: _FILE, 202: ACCEPTED_RESPONSE}
    ),
)
async def edit_image(call: Call, form: Annotated[EditForm, Depends()]) -> Response:
    """Edit one image. Edits of equal steps share a batch, each with its own LoRA.
    \f
    Args:
        call: The request and its preferences.
        form: The fields of the form.

    Returns:
        The PNG, or 202 with a job.
    """
    engine, edit_request = call.state.engine, await _read_request(form, call.state, call.owner)

    async def run_fn(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult[bytes]:
        return await encode_png_result(engine.run(edit_request, timeout_s, owner=call.owner))

    result = await run_or_enqueue(call, "image", run_fn)
    if isinstance(result, Response):
        return result
    return make_file_response(call.request, FileContent.from_png(result))


async def _read_request(form: EditForm, state: AppState, owner: str) -> EditImageRequest:
    """Read the uploads of a form into the engine's request."""
    pairs = await read_pairs(form.before, form.after, state.settings.max_photos)
    if sum((bool(pairs), form.lora is not None, form.lora_id is not None)) > 1:
        raise InvalidArgumentError(
            "send before and after, or a LoRA, or the id of a stored one: only one of these"
        )
    lora = await form.lora.read() if form.lora is not None else None
    if form.lora_id is not None:
        lora = read_stored_file(state.files, form.lora_id, "lora", owner)
    return EditImageRequest(
        image=await form.image.read(),
        pairs=pairs,
        lora=lora,
        strength=form.strength,
        instruction=form.instruction,
        seed=form.seed,
        num_inference_steps=form.num_inference_steps,
        preserve_unedited=form.preserve_unedited,
    )
