"""``Client`` and ``AsyncClient``: a hyperlora server from Python.

    with Client("http://127.0.0.1:8000") as server:
        lora = server.make_lora(["me.png"])
        server.draw("a portrait of sks person, smiling", loras=[lora]).save("out.png")

Both raise ``ApiError`` with the server's own sentence.
"""

import io
from base64 import b64encode
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import httpx
from PIL import Image

from hyperlora.errors import HyperloraError

ImageInput = str | PathLike[str] | bytes | Image.Image
ImageInputPair = tuple[ImageInput, ImageInput]
_PAIR_FIELDS = ("before", "after")


class ApiError(HyperloraError):
    """The server's answer was no; ``status_code`` is HTTP's."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code


class Client:
    """One connection pool; ``api_key`` is an API key where the server asks for one."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        **httpx_options: Any,
    ) -> None:
        self._http = httpx.Client(**_make_httpx_options(base_url, api_key, httpx_options))

    def create_lora(self, photos: Sequence[ImageInput], **options: Any) -> bytes:
        """A ``.safetensors`` file from photos of one subject; ``httpx_options`` are the form's: format, rank, strength..."""
        return _check_response(
            self._http.post("/v1/loras", **_build_photo_form(photos, options))
        ).content

    def create_edit_lora(self, pairs: Sequence[ImageInputPair], **options: Any) -> bytes:
        """A ``.safetensors`` file of the edit that pairs (before, after) show."""
        return _check_response(
            self._http.post("/v1/loras", **_build_pair_form(pairs, options))
        ).content

    def edit_image(
        self,
        image: ImageInput,
        pairs: Sequence[ImageInputPair] = (),
        lora: bytes | None = None,
        **options: Any,
    ) -> Image.Image:
        """The picture after the edit that pairs show, or a LoRA of a change holds; ``httpx_options``: strength, seed..."""
        return _decode_image(
            _check_response(
                self._http.post("/v1/edits", **_build_edit_form(image, pairs, lora, options))
            )
        )

    def generate_image(
        self, prompt: str, loras: Sequence[bytes | str] = (), **options: Any
    ) -> Image.Image:
        """A picture, with LoRA files or ids of kept ones; ``httpx_options`` are the request's: seed, steps, strategy..."""
        return _decode_image(
            _check_response(
                self._http.post("/v1/images", json=_build_image_request(prompt, loras, options))
            )
        )

    def compute_identity_similarity(
        self, photos: Sequence[ImageInput], images: Sequence[ImageInput]
    ) -> list[float]:
        """How much each picture shows the person of the photos: 0 anyone, 1 another real photo of the same person."""
        return list(
            _check_response(
                self._http.post(
                    "/v1/identity-similarity", files=_build_similarity_files(photos, images)
                )
            ).json()["similarities"]
        )

    def list_models(self) -> list[dict[str, Any]]:
        """What the server has."""
        return list(_check_response(self._http.get("/v1/models")).json())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


class AsyncClient:
    """``Client`` for asyncio."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        **httpx_options: Any,
    ) -> None:
        self._http = httpx.AsyncClient(**_make_httpx_options(base_url, api_key, httpx_options))

    async def create_lora(self, photos: Sequence[ImageInput], **options: Any) -> bytes:
        """As ``Client.create_lora``."""
        return _check_response(
            await self._http.post("/v1/loras", **_build_photo_form(photos, options))
        ).content

    async def create_edit_lora(self, pairs: Sequence[ImageInputPair], **options: Any) -> bytes:
        """As ``Client.create_edit_lora``."""
        return _check_response(
            await self._http.post("/v1/loras", **_build_pair_form(pairs, options))
        ).content

    async def edit_image(
        self,
        image: ImageInput,
        pairs: Sequence[ImageInputPair] = (),
        lora: bytes | None = None,
        **options: Any,
    ) -> Image.Image:
        """As ``Client.edit_image``."""
        return _decode_image(
            _check_response(
                await self._http.post("/v1/edits", **_build_edit_form(image, pairs, lora, options))
            )
        )

    async def generate_image(
        self, prompt: str, loras: Sequence[bytes | str] = (), **options: Any
    ) -> Image.Image:
        """As ``Client.generate_image``."""
        return _decode_image(
            _check_response(
                await self._http.post(
                    "/v1/images", json=_build_image_request(prompt, loras, options)
                )
            )
        )

    async def compute_identity_similarity(
        self, photos: Sequence[ImageInput], images: Sequence[ImageInput]
    ) -> list[float]:
        """As ``Client.compute_identity_similarity``."""
        response = await self._http.post(
            "/v1/identity-similarity", files=_build_similarity_files(photos, images)
        )
        return list(_check_response(response).json()["similarities"])

    async def list_models(self) -> list[dict[str, Any]]:
        """As ``Client.list_models``."""
        return list(_check_response(await self._http.get("/v1/models")).json())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


def _make_httpx_options(
    base_url: str, api_key: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": base_url, "headers": headers, "timeout": 150.0} | options


def _build_photo_form(photos: Sequence[ImageInput], options: dict[str, Any]) -> dict[str, Any]:
    files = [("photos", (f"{i}", _read_image_bytes(photo))) for i, photo in enumerate(photos)]
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def _build_pair_form(pairs: Sequence[ImageInputPair], options: dict[str, Any]) -> dict[str, Any]:
    files = [
        (side, (f"{i}", _read_image_bytes(image)))
        for i, pair in enumerate(pairs)
        for side, image in zip(_PAIR_FIELDS, pair, strict=True)
    ]
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def _build_edit_form(
    image: ImageInput, pairs: Sequence[ImageInputPair], lora: bytes | None, options: dict[str, Any]
) -> dict[str, Any]:
    form = _build_pair_form(pairs, options)
    form["files"] += [
        ("image", ("image", _read_image_bytes(image))),
        *([("lora", ("lora", lora))] if lora else []),
    ]
    return form


def _build_similarity_files(
    photos: Sequence[ImageInput], images: Sequence[ImageInput]
) -> list[tuple[str, tuple[str, bytes]]]:
    fields = {"photos": photos, "images": images}
    return [
        (name, (f"{i}", _read_image_bytes(image)))
        for name, field_images in fields.items()
        for i, image in enumerate(field_images)
    ]


def _build_image_request(
    prompt: str, loras: Sequence[bytes | str], options: dict[str, Any]
) -> dict[str, Any]:
    weights = options.pop("weights", None) or [1.0] * len(loras)
    lora_refs = [
        {"id": lora, "weight": weight}
        if isinstance(lora, str)
        else {"content": b64encode(lora).decode(), "weight": weight}
        for lora, weight in zip(loras, weights, strict=True)
    ]
    return {"prompt": prompt, "loras": lora_refs, **options}


def _read_image_bytes(image: ImageInput) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    return Path(image).read_bytes()


def _decode_image(response: httpx.Response) -> Image.Image:
    image = Image.open(io.BytesIO(response.content))
    image.load()
    return image


def _check_response(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"the server answered {response.status_code} {response.reason_phrase}"
        raise ApiError(response.status_code, detail)
    return response
