"""/v1/images: images of a prompt with LoRAs; images that jobs stored."""

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.api.forms import Call
from hyperlora.service.api.responses import (
    ACCEPTED_RESPONSE,
    MEDIA_TYPES,
    NOT_MODIFIED_RESPONSE,
    FileContent,
    delete_stored_file,
    encode_base64,
    encode_png_result,
    make_binary_schema,
    make_file_response,
    make_json_response,
    make_stored_file_response,
    read_stored_file,
    run_or_enqueue,
)
from hyperlora.service.api.schemas import FileId, ImageRequestBody, ImageResponse, LoraRef
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.engine.requests import EngineResult, ImageRequest, ImageSampling
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.file_store import FileStore
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/images", tags=["Images"])
_FILE = make_binary_schema(MEDIA_TYPES["image"], "The image; its SHA-256 is the ETag")


@router.post(
    "",
    response_model=ImageResponse,
    responses=build_problem_responses(
        400, 403, 404, 408, 413, 503, 504, other_responses={200: _FILE, 202: ACCEPTED_RESPONSE}
    ),
)
async def generate_image(call: Call, body: ImageRequestBody) -> Response:
    """Generate an image of a prompt, with LoRAs stored here, sent along, or named in the prompt.

    Requests of equal steps, guidance and size share a batch, each with its own LoRAs.
    \f
    Args:
        call: The request and its preferences.
        body: What to generate.

    Returns:
        The PNG, the PNG in JSON, or 202 with a job.
    """
    engine, image_request = call.state.engine, _make_request(body, call.state.files)

    async def run_fn(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult[bytes]:
        return await encode_png_result(engine.run(image_request, timeout_s))

    result = await run_or_enqueue(call, "image", run_fn)
    if isinstance(result, Response):
        return result
    if call.wants_json:
        digest = sha256(result.value).hexdigest()
        content = encode_base64(result.value)
        image_response = ImageResponse(sha256=digest, seed=body.seed, content=content)
        return make_json_response(image_response, digest, result.warnings)
    return make_file_response(call.request, FileContent.from_png(result))


@router.get(
    "/{id}",
    response_class=Response,
    responses=build_problem_responses(
        404, other_responses={200: _FILE, 304: NOT_MODIFIED_RESPONSE}
    ),
)
async def get_image(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Get an image that a job stored.
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.
        id: SHA-256 of the file.

    Returns:
        The PNG, or 304 if the caller has it.
    """
    return make_stored_file_response(request, id, "image")


@router.delete(
    "/{id}", status_code=204, response_class=Response, responses=build_problem_responses(404)
)
async def delete_image(request: Request, owner: Caller, id: Annotated[FileId, Path()]) -> Response:
    """Delete an image that a job stored.
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.
        id: SHA-256 of the file.

    Returns:
        204.
    """
    return delete_stored_file(request, id, "image")


def _make_request(body: ImageRequestBody, file_store: FileStore) -> ImageRequest:
    """Make the engine's request from the JSON of a caller."""
    return ImageRequest(
        prompt=body.prompt,
        loras=[(_get_lora_content(ref, file_store), ref.weight) for ref in body.loras],
        strategy=body.strategy,
        gamma=body.gamma,
        regions=body.regions,
        windowed=body.windowed,
        seed=body.seed,
        sampling=ImageSampling(
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            scheduler=body.scheduler,
            width=body.width,
            height=body.height,
        ),
    )


def _get_lora_content(lora_ref: LoraRef, file_store: FileStore) -> bytes:
    if (lora_ref.id is None) == (lora_ref.content is None):
        raise InvalidArgumentError(
            "each LoRA needs either the id of a stored one or a file's content, and not both"
        )
    if lora_ref.content is not None:
        return lora_ref.content
    return read_stored_file(file_store, str(lora_ref.id), "lora")
