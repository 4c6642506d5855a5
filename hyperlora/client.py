"""``Client`` and ``AsyncClient``: a hyperlora server from Python.

    with Client("http://127.0.0.1:8000") as server:
        lora = server.make_lora(["me.png"])
        server.draw("a portrait of sks person, smiling", loras=[lora]).save("out.png")

Both raise ``ServerRefused`` with the server's own sentence.
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

Photo = str | PathLike[str] | bytes | Image.Image
Pair = tuple[Photo, Photo]
_SIDES = ("before", "after")


class ServerRefused(HyperloraError):
    """The server's answer was no; ``status`` is HTTP's."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Client:
    """One connection pool; ``key`` is an API key where the server asks for one."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, **options: Any) -> None:
        self._http = httpx.Client(**_options(url, key, options))

    def make_lora(self, photos: Sequence[Photo], **options: Any) -> bytes:
        """A ``.safetensors`` file from photos of one subject; ``options`` are the form's: format, rank, strength..."""
        return _checked(self._http.post("/v1/loras", **_form(photos, options))).content

    def make_change(self, pairs: Sequence[Pair], **options: Any) -> bytes:
        """A ``.safetensors`` file of the edit that pairs (before, after) show."""
        return _checked(self._http.post("/v1/loras", **_change(pairs, options))).content

    def edit(
        self, picture: Photo, pairs: Sequence[Pair] = (), lora: bytes | None = None, **options: Any
    ) -> Image.Image:
        """The picture after the edit that pairs show, or a LoRA of a change holds; ``options``: strength, seed..."""
        return _opened(_checked(self._http.post("/v1/edits", **_edit(picture, pairs, lora, options))))

    def draw(self, prompt: str, loras: Sequence[bytes | str] = (), **options: Any) -> Image.Image:
        """A picture, with LoRA files or ids of kept ones; ``options`` are the request's: seed, steps, strategy..."""
        return _opened(_checked(self._http.post("/v1/images", json=_wanted(prompt, loras, options))))

    def likeness(self, photos: Sequence[Photo], pictures: Sequence[Photo]) -> list[float]:
        """How much each picture shows the person of the photos: 0 anyone, 1 another real photo of the same person."""
        return list(_checked(self._http.post("/v1/likeness", files=_compared(photos, pictures))).json()["pictures"])

    def models(self) -> list[dict[str, Any]]:
        """What the server has."""
        return list(_checked(self._http.get("/v1/models")).json())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


class AsyncClient:
    """``Client`` for asyncio."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, **options: Any) -> None:
        self._http = httpx.AsyncClient(**_options(url, key, options))

    async def make_lora(self, photos: Sequence[Photo], **options: Any) -> bytes:
        """As ``Client.make_lora``."""
        return _checked(await self._http.post("/v1/loras", **_form(photos, options))).content

    async def make_change(self, pairs: Sequence[Pair], **options: Any) -> bytes:
        """As ``Client.make_change``."""
        return _checked(await self._http.post("/v1/loras", **_change(pairs, options))).content

    async def edit(
        self, picture: Photo, pairs: Sequence[Pair] = (), lora: bytes | None = None, **options: Any
    ) -> Image.Image:
        """As ``Client.edit``."""
        return _opened(_checked(await self._http.post("/v1/edits", **_edit(picture, pairs, lora, options))))

    async def draw(self, prompt: str, loras: Sequence[bytes | str] = (), **options: Any) -> Image.Image:
        """As ``Client.draw``."""
        return _opened(_checked(await self._http.post("/v1/images", json=_wanted(prompt, loras, options))))

    async def likeness(self, photos: Sequence[Photo], pictures: Sequence[Photo]) -> list[float]:
        """As ``Client.likeness``."""
        answer = await self._http.post("/v1/likeness", files=_compared(photos, pictures))
        return list(_checked(answer).json()["pictures"])

    async def models(self) -> list[dict[str, Any]]:
        """As ``Client.models``."""
        return list(_checked(await self._http.get("/v1/models")).json())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


def _options(url: str, key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url, "headers": headers, "timeout": 150.0} | options


def _form(photos: Sequence[Photo], options: dict[str, Any]) -> dict[str, Any]:
    files = [("photos", (f"{i}", _bytes(photo))) for i, photo in enumerate(photos)]
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def _change(pairs: Sequence[Pair], options: dict[str, Any]) -> dict[str, Any]:
    files = [(side, (f"{i}", _bytes(p))) for i, pair in enumerate(pairs) for side, p in zip(_SIDES, pair, strict=True)]
    return {"files": files, "data": {name: str(value) for name, value in options.items()}}


def _edit(picture: Photo, pairs: Sequence[Pair], lora: bytes | None, options: dict[str, Any]) -> dict[str, Any]:
    form = _change(pairs, options)
    form["files"] += [("picture", ("picture", _bytes(picture))), *([("lora", ("lora", lora))] if lora else [])]
    return form


def _compared(photos: Sequence[Photo], pictures: Sequence[Photo]) -> list[tuple[str, tuple[str, bytes]]]:
    parts = {"photos": photos, "pictures": pictures}
    return [(name, (f"{i}", _bytes(one))) for name, many in parts.items() for i, one in enumerate(many)]


def _wanted(prompt: str, loras: Sequence[bytes | str], options: dict[str, Any]) -> dict[str, Any]:
    weights = options.pop("weights", None) or [1.0] * len(loras)
    chosen = [
        {"id": lora, "weight": w} if isinstance(lora, str) else {"content": b64encode(lora).decode(), "weight": w}
        for lora, w in zip(loras, weights, strict=True)
    ]
    return {"prompt": prompt, "loras": chosen, **options}


def _bytes(photo: Photo) -> bytes:
    if isinstance(photo, bytes):
        return photo
    if isinstance(photo, Image.Image):
        buffer = io.BytesIO()
        photo.save(buffer, "PNG")
        return buffer.getvalue()
    return Path(photo).read_bytes()


def _opened(response: httpx.Response) -> Image.Image:
    image = Image.open(io.BytesIO(response.content))
    image.load()
    return image


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"the server answered {response.status_code} {response.reason_phrase}"
        raise ServerRefused(response.status_code, detail)
    return response
