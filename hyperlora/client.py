"""``Client`` and ``AsyncClient``: call a hyperlora server from Python.

    with Client("http://127.0.0.1:8000") as client:
        lora = client.create_lora(["me.png"])
        client.generate_image("a portrait of sks person, smiling", loras=[lora]).save("out.png")

Errors of the server are raised as ``ApiError`` with its message.
"""

from collections.abc import Sequence
from typing import Any, Final, Self

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "Client and AsyncClient need the extra: pip install 'hyperlora[client]'"
    ) from error
from PIL import Image

from hyperlora.client_requests import (
    MODELS_REQUEST,
    ApiError,
    FormValue,
    ImageInput,
    ImageInputPair,
    Request,
    ResultT,
    build_edit_request,
    build_files,
    build_image_request,
    build_lora_files_request,
    build_lora_request,
    build_pair_files,
    build_similarity_request,
    check_response,
)

__all__ = ["ApiError", "AsyncClient", "Client"]

_TIMEOUT_S: Final = 150.0


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
        return self._send(build_lora_request(build_files("photos", photos), options))

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
        return self._send(build_lora_files_request(build_files("photos", photos), options))

    def create_edit_lora(
        self,
        pairs: Sequence[ImageInputPair],
        image: ImageInput | None = None,
        **options: FormValue,
    ) -> bytes:
        """Generate a LoRA of the edit between the images of pairs.

        Args:
            pairs: Images before and after the edit.
            image: The image to edit, for a model whose LoRAs are for one image (LoRWeB).
            **options: Further form fields, e.g. ``format`` and ``strength``, which undoes the edit
                where it is below 0.

        Returns:
            A ``.safetensors`` file.

        Raises:
            ApiError: The server refused the request.
        """
        files = build_pair_files(pairs) + build_files("image", [image] if image else [])
        return self._send(build_lora_request(files, options))

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
        return self._send(build_edit_request(image, pairs, lora, options))

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
        return self._send(build_image_request(prompt, loras, weights, options))

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
        return self._send(build_similarity_request(photos, images))

    def list_models(self) -> list[dict[str, Any]]:
        """List the models of the server, as JSON.

        Raises:
            ApiError: The server refused the request.
        """
        return self._send(MODELS_REQUEST)

    def _send(self, request: Request[ResultT]) -> ResultT:
        response = self._http.request(request.method, request.path, **request.content)
        return request.read_result(check_response(response))

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
        return await self._send(build_lora_request(build_files("photos", photos), options))

    async def create_lora_files(
        self, photos: Sequence[ImageInput], **options: FormValue
    ) -> tuple[bytes, bytes | None]:
        """Generate a LoRA from photos, with that of the negative branch of guidance.

        Args:
            photos: See ``Client.create_lora_files``.
            **options: See ``Client.create_lora_files``.
        """
        return await self._send(build_lora_files_request(build_files("photos", photos), options))

    async def create_edit_lora(
        self,
        pairs: Sequence[ImageInputPair],
        image: ImageInput | None = None,
        **options: FormValue,
    ) -> bytes:
        """Generate a LoRA of the edit between the images of pairs.

        Args:
            pairs: See ``Client.create_edit_lora``.
            image: See ``Client.create_edit_lora``.
            **options: See ``Client.create_edit_lora``.
        """
        files = build_pair_files(pairs) + build_files("image", [image] if image else [])
        return await self._send(build_lora_request(files, options))

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
        return await self._send(build_edit_request(image, pairs, lora, options))

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
        return await self._send(build_image_request(prompt, loras, weights, options))

    async def compute_identity_similarity(
        self, photos: Sequence[ImageInput], images: Sequence[ImageInput]
    ) -> list[float]:
        """Score images against photos of one subject.

        Args:
            photos: See ``Client.compute_identity_similarity``.
            images: See ``Client.compute_identity_similarity``.
        """
        return await self._send(build_similarity_request(photos, images))

    async def list_models(self) -> list[dict[str, Any]]:
        """List the models of the server, as JSON."""
        return await self._send(MODELS_REQUEST)

    async def _send(self, request: Request[ResultT]) -> ResultT:
        response = await self._http.request(request.method, request.path, **request.content)
        return request.read_result(check_response(response))

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
