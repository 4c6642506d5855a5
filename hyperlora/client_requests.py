"""What ``Client`` and ``AsyncClient`` send, and how they read what comes back."""

import io
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, Generic, TypedDict, TypeVar

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "Client and AsyncClient need the extra: pip install 'hyperlora[client]'"
    ) from error
from PIL import Image, ImageOps

from hyperlora.errors import HyperloraError

ImageInput = str | PathLike[str] | bytes | Image.Image
"""A path, the bytes of an image file, or an image."""
ImageInputPair = tuple[ImageInput, ImageInput]
"""An image before and after an edit."""
FormValue = str | int | float | bool
"""A value of a form field."""
_PAIR_FIELDS: Final = ("before", "after")
FormFile = tuple[str, tuple[str, bytes]]  # form field, (file name, content)
ResultT = TypeVar("ResultT")


class RequestContent(TypedDict, total=False):
    """Arguments of httpx: a multipart form, or JSON."""

    files: list[FormFile]
    data: dict[str, str]
    json: dict[str, object]
    headers: dict[str, str]


@dataclass(frozen=True)
class Request(Generic[ResultT]):
    """A request to one endpoint, and how its result is read from the response."""

    method: str
    path: str
    content: RequestContent
    read_result: Callable[[httpx.Response], ResultT]


class ApiError(HyperloraError):
    """The server refused a request.

    Args:
        status_code: The HTTP status.
        detail: The message of the server.
    """

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code


def build_lora_request(files: list[FormFile], options: Mapping[str, FormValue]) -> Request[bytes]:
    """Build the request for a LoRA of photos or pairs.

    Args:
        files: Files of the form.
        options: Other fields of the form.
    """
    content = _build_form(files, options)
    return Request("POST", "/v1/loras", content, lambda response: response.content)


def build_lora_files_request(
    files: list[FormFile], options: Mapping[str, FormValue]
) -> Request[tuple[bytes, bytes | None]]:
    """Build the request for a LoRA and the one of the negative branch.

    Args:
        files: Files of the form.
        options: Other fields of the form.
    """
    content = _build_form(files, options)
    content["headers"] = {"Accept": "application/json"}
    return Request("POST", "/v1/loras", content, _decode_lora_files)


def _decode_lora_files(response: httpx.Response) -> tuple[bytes, bytes | None]:
    body = response.json()
    negative = body.get("negative_content")
    return b64decode(body["content"]), b64decode(negative) if negative else None


def build_edit_request(
    image: ImageInput,
    pairs: Sequence[ImageInputPair],
    lora: bytes | None,
    options: Mapping[str, FormValue],
) -> Request[Image.Image]:
    """Build the request for an edited image.

    Args:
        image: The image to edit.
        pairs: Images before and after the edit.
        lora: The LoRA of the edit, instead of pairs.
        options: Other fields of the form.
    """
    files = [*build_pair_files(pairs), ("image", ("image", _read_image_bytes(image)))]
    if lora:
        files.append(("lora", ("lora", lora)))
    return Request("POST", "/v1/edits", _build_form(files, options), _decode_image)


def build_image_request(
    prompt: str,
    loras: Sequence[bytes | str],
    weights: Sequence[float] | None,
    options: Mapping[str, object],
) -> Request[Image.Image]:
    """Build the request for an image with LoRAs.

    Args:
        prompt: The prompt.
        loras: LoRA files, or ids of stored ones.
        weights: A factor for each LoRA; None for those that the files recommend.
        options: Other fields of the body.
    """
    lora_refs: list[dict[str, object]] = [
        {"id": lora} if isinstance(lora, str) else {"content": b64encode(lora).decode()}
        for lora in loras
    ]
    if weights is not None:
        for lora_ref, weight in zip(lora_refs, weights, strict=True):
            lora_ref["weight"] = weight
    body = {"prompt": prompt, "loras": lora_refs, **options}
    return Request("POST", "/v1/images", {"json": body}, _decode_image)


def build_similarity_request(
    photos: Sequence[ImageInput], images: Sequence[ImageInput]
) -> Request[list[float]]:
    """Build the request for identity similarities.

    Args:
        photos: Photos of the person.
        images: Images to compare with them.
    """
    files = build_files("photos", photos) + build_files("images", images)
    return Request(
        "POST",
        "/v1/identity-similarity",
        {"files": files},
        lambda response: list(response.json()["similarities"]),
    )


MODELS_REQUEST: Final[Request[list[dict[str, Any]]]] = Request(
    "GET", "/v1/models", {}, lambda response: list(response.json())
)


def _build_form(files: list[FormFile], options: Mapping[str, FormValue]) -> RequestContent:
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def build_files(field: str, images: Sequence[ImageInput]) -> list[FormFile]:
    """Build the files of one form field, with their index as names.

    Args:
        field: The name of the form field.
        images: Paths, bytes of image files, or images.
    """
    return [(field, (f"{i}", _read_image_bytes(image))) for i, image in enumerate(images)]


def build_pair_files(pairs: Sequence[ImageInputPair]) -> list[FormFile]:
    """Build the files of pairs, with their index as names."""
    return [
        (side, (f"{i}", _read_image_bytes(image)))
        for i, pair in enumerate(pairs)
        for side, image in zip(_PAIR_FIELDS, pair, strict=True)
    ]


def _read_image_bytes(image: ImageInput) -> bytes:
    """The bytes of an image file; images are encoded as PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        # PNG has no orientation, and no pixels of inks
        options = {"format": "JPEG", "quality": 100} if image.mode == "CMYK" else {"format": "PNG"}
        profile = image.info.get("icc_profile")
        ImageOps.exif_transpose(image).save(buffer, **options, icc_profile=profile)
        return buffer.getvalue()
    return Path(image).read_bytes()


def _decode_image(response: httpx.Response) -> Image.Image:
    image = Image.open(io.BytesIO(response.content), formats=("PNG", "JPEG", "WEBP"))
    image.load()
    return image


def check_response(response: httpx.Response) -> httpx.Response:
    """The response; raises ``ApiError`` for an error status."""
    if response.is_error:
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"the server answered {response.status_code} {response.reason_phrase}"
        raise ApiError(response.status_code, detail)
    return response
