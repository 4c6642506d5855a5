"""/v1/images: images of a prompt with LoRAs; images that jobs stored."""

from hashlib import sha256
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.negative_lora import NEGATIVE_SHA256_KEY
from hyperlora.lora.io.safetensors_file import MAX_UPLOAD_HEADER_BYTES, read_header
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
        400, 403, 404, 408, 413, 415, 503, 504, other_responses={200: _FILE, 202: ACCEPTED_RESPONSE}
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
    engine, image_request = call.state.engine, _make_request(body, call.state.files, call.owner)

    async def run_fn(timeout_s: float, on_progress: ProgressFn | None) -> EngineResult[bytes]:
        return await encode_png_result(engine.run(image_request, timeout_s, owner=call.owner))

    result = await run_or_enqueue(call, "image", run_fn)
    if isinstance(result, Response):
        return result
    if call.wants_json:
        digest = sha256(result.value).hexdigest()
        content = encode_base64(result.value)
        image_response = ImageResponse(sha256=digest, seed=body.seed, content=content)
        return make_json_response(image_response, digest, result.warnings, result.notes)
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
    return make_stored_file_response(request, id, "image", owner)


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
    return delete_stored_file(request, id, "image", owner)


def _make_request(body: ImageRequestBody, file_store: FileStore, owner: str) -> ImageRequest:
    """Make the engine's request from the JSON of a caller."""
    loras = [(_get_lora_content(ref, file_store, owner), ref.weight) for ref in body.loras]
    branch: Literal["auto", "same", "off", "file"] = "auto"
    negative_lora = None
    if isinstance(body.negative_lora, LoraRef):
        branch, negative_lora = "file", _get_lora_content(body.negative_lora, file_store, owner)
    elif body.negative_lora is not None:
        branch = body.negative_lora
    elif len(loras) == 1:
        negative_lora = _find_negative_lora(loras[0][0], file_store, owner)
    return ImageRequest(
        prompt=body.prompt,
        loras=loras,
        negative_branch=branch,
        negative_lora=negative_lora,
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


def _find_negative_lora(data: bytes, file_store: FileStore, owner: str) -> bytes | None:
    """Find the stored LoRA for the negative branch that the header of a file names."""
    try:
        header = read_header(data, len(data), "the LoRA", MAX_UPLOAD_HEADER_BYTES)
    except InvalidLoraFileError:
        return None  # the engine refuses it, with its reason
    metadata = header.get("__metadata__")
    digest = metadata.get(NEGATIVE_SHA256_KEY) if isinstance(metadata, dict) else None
    return file_store.get_bytes(digest, "lora", owner) if isinstance(digest, str) else None


def _get_lora_content(lora_ref: LoraRef, file_store: FileStore, owner: str) -> bytes:
    if (lora_ref.id is None) == (lora_ref.content is None):
        raise InvalidArgumentError(
            "each LoRA needs either the id of a stored one or a file's content, and not both"
        )
    if lora_ref.content is not None:
        return lora_ref.content
    return read_stored_file(file_store, str(lora_ref.id), "lora", owner)
