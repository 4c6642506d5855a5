"""``Client`` and ``AsyncClient``: call a hyperlora server from Python.

    with Client("http://127.0.0.1:8000") as client:
        lora = client.create_lora(["me.png"])
        client.generate_image("a portrait of sks person, smiling", loras=[lora]).save("out.png")

Errors of the server are raised as ``ApiError`` with its message.
"""

import io
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, Generic, Self, TypedDict, TypeVar

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
_TIMEOUT_S: Final = 150.0
_File = tuple[str, tuple[str, bytes]]  # form field, (file name, content)
_ResultT = TypeVar("_ResultT")


class _RequestContent(TypedDict, total=False):
    """Arguments of httpx: a multipart form, or JSON."""

    files: list[_File]
    data: dict[str, str]
    json: dict[str, object]
    headers: dict[str, str]


@dataclass(frozen=True)
class _Request(Generic[_ResultT]):
    """A request to one endpoint, and how its result is read from the response."""

    method: str
    path: str
    content: _RequestContent
    read_result: Callable[[httpx.Response], _ResultT]


class ApiError(HyperloraError):
    """The server refused a request.

    Args:
        status_code: The HTTP status.
        detail: The message of the server.
    """

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code


class Client:
    """A connection pool to one server.

    Args:
        base_url: The address of the server.
        api_key: The API key, if the server needs one.
        **httpx_options: Further arguments of ``httpx.Client``, e.g. ``timeout``.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        **httpx_options: Any,
    ) -> None:
        self._http = httpx.Client(**_make_httpx_options(base_url, api_key, httpx_options))

    def create_lora(self, photos: Sequence[ImageInput], **options: FormValue) -> bytes:
        """Generate a LoRA from photos.

        Args:
            photos: Photos of one subject.
            **options: Further form fields, e.g. ``model`` (a name of ``list_models``), ``format``,
                ``rank``, ``strength``.

        Returns:
            A ``.safetensors`` file.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_lora_request(_build_files("photos", photos), options))

    def create_lora_files(
        self, photos: Sequence[ImageInput], **options: FormValue
    ) -> tuple[bytes, bytes | None]:
        """Generate a LoRA from photos, with that of the negative branch of guidance.

        Args:
            photos: Photos of one subject.
            **options: As ``create_lora``.

        Returns:
            A ``.safetensors`` file, and that of the negative branch; None for a model without it.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_lora_files_request(_build_files("photos", photos), options))

    def create_edit_lora(self, pairs: Sequence[ImageInputPair], **options: FormValue) -> bytes:
        """Generate a LoRA of the edit between the images of pairs.

        Args:
            pairs: Images before and after the edit.
            **options: Further form fields, e.g. ``format`` and ``strength``, which undoes the edit
                where it is below 0.

        Returns:
            A ``.safetensors`` file.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_lora_request(_build_pair_files(pairs), options))

    def edit_image(
        self,
        image: ImageInput,
        pairs: Sequence[ImageInputPair] = (),
        lora: bytes | None = None,
        **options: FormValue,
    ) -> Image.Image:
        """Apply an edit to an image.

        Args:
            image: The image.
            pairs: Images before and after the edit; empty if ``lora`` is given.
            lora: The file of a LoRA of the edit, instead of pairs.
            **options: Further form fields, e.g. ``strength``, ``seed``, ``preserve_unedited``.

        Returns:
            The edited image.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_edit_request(image, pairs, lora, options))

    def generate_image(
        self,
        prompt: str,
        loras: Sequence[bytes | str] = (),
        weights: Sequence[float] | None = None,
        **options: object,
    ) -> Image.Image:
        """Generate an image with LoRAs.

        Args:
            prompt: The prompt.
            loras: Files of LoRAs, or ids of LoRAs that the server stores.
            weights: The factor of each LoRA; by default the strength that its file recommends.
            **options: Further fields, e.g. ``seed``, ``num_inference_steps``, ``strategy``,
                ``negative_lora``.

        Returns:
            The image.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_image_request(prompt, loras, weights, options))

    def compute_identity_similarity(
        self, photos: Sequence[ImageInput], images: Sequence[ImageInput]
    ) -> list[float]:
        """Score images against photos of one subject.

        Args:
            photos: Photos of the subject.
            images: Images that should show the subject.

        Returns:
            Per image, 0 for a stranger and 1 for another real photo of the subject.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_build_similarity_request(photos, images))

    def list_models(self) -> list[dict[str, Any]]:
        """List the models of the server, as JSON.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(_MODELS_REQUEST)

    def _send(self, request: _Request[_ResultT]) -> _ResultT:
        response = self._http.request(request.method, request.path, **request.content)
        return request.read_result(_check_response(response))

    def __enter__(self) -> Self:
        """Return the client; leaving the context closes its connections."""
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


class AsyncClient:
    """``Client`` for asyncio; results and errors of its methods are those of ``Client``.

    Args:
        base_url: The address of the server.
        api_key: The API key, if the server needs one.
        **httpx_options: Further arguments of ``httpx.AsyncClient``, e.g. ``timeout``.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        **httpx_options: Any,
    ) -> None:
        self._http = httpx.AsyncClient(**_make_httpx_options(base_url, api_key, httpx_options))

    async def create_lora(self, photos: Sequence[ImageInput], **options: FormValue) -> bytes:
        """Generate a LoRA from photos.

        Args:
            photos: See ``Client.create_lora``.
            **options: See ``Client.create_lora``.
        """
        return await self._send(_build_lora_request(_build_files("photos", photos), options))

    async def create_lora_files(
        self, photos: Sequence[ImageInput], **options: FormValue
    ) -> tuple[bytes, bytes | None]:
        """Generate a LoRA from photos, with that of the negative branch of guidance.

        Args:
            photos: See ``Client.create_lora_files``.
            **options: See ``Client.create_lora_files``.
        """
        return await self._send(_build_lora_files_request(_build_files("photos", photos), options))

    async def create_edit_lora(
        self, pairs: Sequence[ImageInputPair], **options: FormValue
    ) -> bytes:
        """Generate a LoRA of the edit between the images of pairs.

        Args:
            pairs: See ``Client.create_edit_lora``.
            **options: See ``Client.create_edit_lora``.
        """
        return await self._send(_build_lora_request(_build_pair_files(pairs), options))

    async def edit_image(
        self,
        image: ImageInput,
        pairs: Sequence[ImageInputPair] = (),
        lora: bytes | None = None,
        **options: FormValue,
    ) -> Image.Image:
        """Apply an edit to an image.

        Args:
            image: See ``Client.edit_image``.
            pairs: See ``Client.edit_image``.
            lora: See ``Client.edit_image``.
            **options: See ``Client.edit_image``.
        """
        return await self._send(_build_edit_request(image, pairs, lora, options))

    async def generate_image(
        self,
        prompt: str,
        loras: Sequence[bytes | str] = (),
        weights: Sequence[float] | None = None,
        **options: object,
    ) -> Image.Image:
        """Generate an image with LoRAs.

        Args:
            prompt: See ``Client.generate_image``.
            loras: See ``Client.generate_image``.
            weights: See ``Client.generate_image``.
            **options: See ``Client.generate_image``.
        """
        return await self._send(_build_image_request(prompt, loras, weights, options))

    async def compute_identity_similarity(
        self, photos: Sequence[ImageInput], images: Sequence[ImageInput]
    ) -> list[float]:
        """Score images against photos of one subject.

        Args:
            photos: See ``Client.compute_identity_similarity``.
            images: See ``Client.compute_identity_similarity``.
        """
        return await self._send(_build_similarity_request(photos, images))

    async def list_models(self) -> list[dict[str, Any]]:
        """List the models of the server, as JSON."""
        return await self._send(_MODELS_REQUEST)

    async def _send(self, request: _Request[_ResultT]) -> _ResultT:
        response = await self._http.request(request.method, request.path, **request.content)
        return request.read_result(_check_response(response))

    async def __aenter__(self) -> Self:
        """Return the client; leaving the context closes its connections."""
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


def _make_httpx_options(
    base_url: str, api_key: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of httpx's clients, with a timeout above the server's."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": base_url, "headers": headers, "timeout": _TIMEOUT_S} | options


def _build_lora_request(files: list[_File], options: Mapping[str, FormValue]) -> _Request[bytes]:
    content = _build_form(files, options)
    return _Request("POST", "/v1/loras", content, lambda response: response.content)


def _build_lora_files_request(
    files: list[_File], options: Mapping[str, FormValue]
) -> _Request[tuple[bytes, bytes | None]]:
    content = _build_form(files, options)
    content["headers"] = {"Accept": "application/json"}
    return _Request("POST", "/v1/loras", content, _decode_lora_files)


def _decode_lora_files(response: httpx.Response) -> tuple[bytes, bytes | None]:
    body = response.json()
    negative = body.get("negative_content")
    return b64decode(body["content"]), b64decode(negative) if negative else None


def _build_edit_request(
    image: ImageInput,
    pairs: Sequence[ImageInputPair],
    lora: bytes | None,
    options: Mapping[str, FormValue],
) -> _Request[Image.Image]:
    files = [*_build_pair_files(pairs), ("image", ("image", _read_image_bytes(image)))]
    if lora:
        files.append(("lora", ("lora", lora)))
    return _Request("POST", "/v1/edits", _build_form(files, options), _decode_image)


def _build_image_request(
    prompt: str,
    loras: Sequence[bytes | str],
    weights: Sequence[float] | None,
    options: Mapping[str, object],
) -> _Request[Image.Image]:
    lora_refs: list[dict[str, object]] = [
        {"id": lora} if isinstance(lora, str) else {"content": b64encode(lora).decode()}
        for lora in loras
    ]
    if weights is not None:
        for lora_ref, weight in zip(lora_refs, weights, strict=True):
            lora_ref["weight"] = weight
    body = {"prompt": prompt, "loras": lora_refs, **options}
    return _Request("POST", "/v1/images", {"json": body}, _decode_image)


def _build_similarity_request(
    photos: Sequence[ImageInput], images: Sequence[ImageInput]
) -> _Request[list[float]]:
    files = _build_files("photos", photos) + _build_files("images", images)
    return _Request(
        "POST",
        "/v1/identity-similarity",
        {"files": files},
        lambda response: list(response.json()["similarities"]),
    )


_MODELS_REQUEST: Final[_Request[list[dict[str, Any]]]] = _Request(
    "GET", "/v1/models", {}, lambda response: list(response.json())
)


def _build_form(files: list[_File], options: Mapping[str, FormValue]) -> _RequestContent:
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def _build_files(field: str, images: Sequence[ImageInput]) -> list[_File]:
    """Files of one form field, with their index as names."""
    return [(field, (f"{i}", _read_image_bytes(image))) for i, image in enumerate(images)]


def _build_pair_files(pairs: Sequence[ImageInputPair]) -> list[_File]:
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


def _check_response(response: httpx.Response) -> httpx.Response:
    """The response; raises ``ApiError`` for an error status."""
    if response.is_error:
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"the server answered {response.status_code} {response.reason_phrase}"
        raise ApiError(response.status_code, detail)
    return response
